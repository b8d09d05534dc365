"""The G-effect while a run goes on, recorded every few steps."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..data.collate import PairedRows, collate, padding_id
from ..errors import UserError
from ..folder.results import write_file
from ..forward import Reference
from ..gradients.terms import Term
from .effect import Effects, measure, plain

FORMAT = 1


def track(points: Sequence[Effects], notes: Sequence[str] = (), **about: Any) -> dict[str, Any]:
    """Effects at several steps as the JSON that is written and drawn."""
    return {"format": FORMAT, **plain(about), "notes": list(notes), "points": [p.to_dict() for p in points]}


def probe_batches(
    sets: Mapping[str, list[dict[str, Any]]], n: int, rows: int, per_anchor: int, pad_id: int, seed: int, device: Any,
    rank: int = 0, world: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """n batches of `rows` forget rows, each with `per_anchor` rows of every other set per forget row.

    Fixed by the seed, so that steps, checkpoints and runs are measured on the same rows. Batches share no forget row while the set has
    enough of them. On several ranks each gets its share.
    """
    rows = max(1, min(rows, len(sets["forget"]) // (n * world)))
    pairs = PairedRows(sets, "forget", per_anchor, seed)
    starts = [(i * world + rank) * rows for i in range(n)]
    found = [collate([pairs[at + j] for j in range(rows)], pad_id) for at in starts]
    return [to_device(batch, device) for batch in found]


def to_device(x: Any, device: Any) -> Any:
    """Tensors of nested mappings moved to `device`."""
    return {k: to_device(v, device) for k, v in x.items()} if isinstance(x, Mapping) else x.to(device)


class EffectRecorder(TrainerCallback):
    """Callback of `UnlearnTrainer` that measures effects at the start, every `every` steps and at the end; training itself does not
    notice (weights, gradients, random states).

    Args:
        objectives: label -> terms (`effect_of_run.parse_objectives`), beside the run's own forget terms.
        every: optimizer steps between two measurements. One costs about batches * (2 + objectives) sweeps of a batch.
        batches, rows: how many batches, and forget rows in each (default: as in training, without repeating rows).
        space: "adapter" or "base".
        instances: forget rows measured token by token (or four times as many sequences), at the start and at the end.
        trainer: if given, the update of the run's rule is measured too, with the state (moving averages, dual variables) it has.
        out: JSON file rewritten after every measurement.

    Attributes:
        points: the measurements, in order of steps.
    """

    def __init__(
        self,
        objectives: Mapping[str, Sequence[Term]] | None = None,
        *,
        every: int = 10,
        batches: int = 4,
        rows: int | None = None,
        space: str = "adapter",
        instances: int = 0,
        trainer: Any = None,
        out: str | Path | None = None,
    ) -> None:
        self.objectives, self.every, self.n, self.rows = dict(objectives or {}), every, batches, rows
        self.space, self.instances, self.trainer, self.out = space, instances, trainer, out
        self.points: list[Effects] = []
        self._batches: list[dict[str, Any]] | None = None
        self._reduce: Callable[[Tensor], Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return track(self.points, space=self.space, objectives=describe(self.objectives))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = _bare(kwargs["model"])
        pairs: Any = kwargs["train_dataloader"].dataset
        tokenizer = kwargs["processing_class"]
        pad_id = padding_id(tokenizer)
        if "retain" not in pairs.sets or "forget" not in pairs.sets:
            raise UserError("effects need a forget and a retain set, and the terms of this run read only one of them")
        mine = own(args.term_list)
        self.objectives = {**mine, **{k: v for k, v in self.objectives.items() if k not in mine}}
        self._batches = probe_batches(
            pairs.sets, self.n, self.rows or args.train_batch_size,
            pairs.per_anchor if pairs.anchor == "forget" else 1, pad_id, args.seed,
            next(model.parameters()).device, args.process_index, args.world_size,
        )  # fmt: skip
        self._reduce = torch.distributed.all_reduce if args.world_size > 1 else None  # type: ignore[assignment]
        if not self.points or self.points[-1].step != state.global_step:
            self._record(args, state, model, self.instances)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if state.global_step % self.every == 0 or last:
            self._record(args, state, _bare(kwargs["model"]), self.instances if last else 0)

    def _record(self, args: Any, state: Any, model: Any, instances: int) -> None:
        assert self._batches is not None
        trained = getattr(self.trainer, "trained_adapter", None) or list(model.active_adapters)[-1]
        reference = Reference(args.reference, trained)
        update = None
        if self.trainer is not None and self.space == "adapter":
            update = args.window(model, reference, self._reduce)
            if self.trainer.window is not None:
                update.load_state_dict(copy.deepcopy(self.trainer.window.state_dict()))
        point = measure(
            model, self.objectives, self._batches, reference=reference, space=self.space, update=update,
            instances=instances, reduce=self._reduce, step=state.global_step,
        )  # fmt: skip
        self.points.append(point)
        if self.out is not None and state.is_world_process_zero:
            write_file(self.out, json.dumps(self.to_dict(), allow_nan=False))


def own(terms: Sequence[Term]) -> dict[str, list[Term]]:
    """The terms of a run's forget gradient as one objective, labelled by their names."""
    mine = [t for t in terms if t.gradient == "forget"]
    return {"+".join(t.objective.name for t in mine): mine} if mine else {}


def describe(objectives: Mapping[str, Sequence[Term]]) -> dict[str, Any]:
    """Label -> {objective: hyper-parameters}, for the JSON."""
    return {
        label: {t.objective.name: {**t.hyper, "weight": t.weight, "batch": t.batch} for t in terms}
        for label, terms in objectives.items()
    }


def _bare(model: Any) -> Any:
    return getattr(model, "module", model)
