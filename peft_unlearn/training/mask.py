"""An update mask over the trained parameters, and one that is chosen anew while a sparse adapter trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..tuners.selection import Selection
from ..tuners.sparse.export import layers_of
from ..tuners.sparse.layer import SparseLayer
from .selecting import EPOCH, NEVER, Selecting


class UpdateMask(TrainerCallback):
    """Only entries inside the mask move: their gradient is taken before clipping, and what an optimizer does to the others all the
    same (weight decay, momentum of an earlier mask) is undone.

    masks: parameter -> bool of its shape; parameters that are not in it move as ever.
    clip_first: the gradient is clipped with what lies outside still in it, as WAGLE's released code does.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor], clip_first: bool = False) -> None:
        self.masks, self.clip_first = dict(masks), clip_first
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_gradient(self) -> None:
        """Called once ``.grad`` is there, before it is clipped."""
        if not self.clip_first:
            self._cut()

    def _cut(self) -> None:
        for p, mask in self.masks.items():
            if p.grad is not None:
                p.grad.mul_(mask)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cut()
        self._before = [(p, mask, p.detach().clone()) for p, mask in self.masks.items()]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for p, mask, before in self._before:
                p.copy_(torch.where(mask, p, before))
        self._before = []


class Refresh(UpdateMask):
    """The mask of a sparse adapter that holds every candidate entry: the latest selection. At the end the adapter is cut down to the
    union of all of them (`compact`).

    Args:
        spec: when to choose anew. first: the selection of the start. choose: (number of the selection) -> one, on the model as it is.
        epoch: optimizer steps in a pass over the anchor rows.
    """

    def __init__(
        self,
        model: Any,
        adapter: str,
        spec: Selecting,
        first: Selection,
        choose: Callable[[int], Selection],
        epoch: float,
    ) -> None:
        super().__init__({})
        self.model, self.adapter, self.choose, self.turn = model, adapter, choose, 0
        self.about = {**first.about, "refresh": spec.refresh}
        self.every = epoch if spec.refresh == EPOCH else float(spec.refresh)
        self.union: dict[str, Tensor] = {}
        self._take(first.indices)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (turn := int(state.global_step / self.every + 1e-9)) > self.turn:
            self.turn = turn
            self._take(self.choose(turn).indices)

    def _take(self, indices: Mapping[str, Tensor]) -> None:
        self.now = {n: i.cpu() for n, i in indices.items() if len(i)}
        for n, i in self.now.items():
            self.union[n] = torch.unique(torch.cat([self.union.get(n, i), i]))
        for values, parts in self._places():
            mask = torch.zeros(values.shape, dtype=torch.bool)
            for name, at in parts.items():
                if name in self.now:
                    mask[at + self.now[name]] = True
            self.masks[values] = mask.to(values.device)

    def _places(self) -> Iterator[tuple[Tensor, dict[str, int]]]:
        """Each layer's values, with where in them the parameters of a name begin."""
        for path, layer in layers_of(self.model, self.adapter).items():
            at, parts = 0, {}
            for leaf, k in layer.counts[self.adapter].items():
                parts[f"{path}.{leaf}"], at = at, at + k
            yield layer.values(self.adapter), parts

    def idle(self) -> list[str]:
        """Modules of which no selection chose anything."""
        chosen = {n.rpartition(".")[0] for n in self.union}
        return [path for path in layers_of(self.model, self.adapter) if path not in chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn, "now": self.now, "union": self.union}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.turn, self.union = state["turn"], dict(state["union"])
        self._take(state["now"])

    def compact(self) -> None:
        """Cut the adapter down to the union of the selections; what is outside has never moved."""
        config = self.model.peft_config[self.adapter]
        for path, layer in layers_of(self.model, self.adapter).items():
            _cut(layer, self.adapter, path, self.union)
        for module, name in _empty(self.model, self.adapter):
            self.model.set_submodule(name, module.base_layer)
        chosen = dict(sorted(self.union.items()))
        config.counts = {n: len(i) for n, i in chosen.items()}
        config.shapes = {n: config.shapes[n] for n in chosen}
        shapes = {n: tuple(s) for n, s in config.shapes.items()}
        config.chosen = Selection(chosen, shapes, {**self.about, "selections": self.turn + 1})
        left = layers_of(self.model, self.adapter)
        tuner = self.model.base_model
        tuner.targeted_module_names = [n for n in tuner.targeted_module_names if n in left]


def _cut(layer: SparseLayer, adapter: str, path: str, union: Mapping[str, Tensor]) -> None:
    at, counts, positions, values = 0, {}, [], []
    for leaf, k in layer.counts[adapter].items():
        kept = union.get(f"{path}.{leaf}")
        if kept is not None:
            counts[leaf] = len(kept)
            positions.append(kept)
            values.append(layer.values(adapter).detach()[at + kept.to(layer.values(adapter).device)])
        at += k
    if counts:
        layer.place(adapter, counts, torch.cat(positions), torch.cat(values))
    else:
        layer.delete_adapter(adapter)


def _empty(model: Any, adapter: str) -> list[tuple[SparseLayer, str]]:
    """Layers that hold no adapter any more."""
    return [(m, n) for n, m in model.named_modules() if isinstance(m, SparseLayer) and not m.scaling]


def refreshed(run: Any, trainer: Any, tokenizer: Any) -> Refresh | None:
    """The mask of a run whose recipe chooses anew, in use by `trainer`; None where it does not."""
    spec, first = run.selecting, run.selected
    if spec is None or spec.refresh == NEVER:
        return None
    among = [n if len(s) > 2 else n.removesuffix(".weight") for n, s in first.shapes.items()]

    def choose(turn: int) -> Selection:
        return replace(spec, target_modules=among).choose(trainer.bare, tokenizer, run.data, run.config, turn)

    epoch = len(trainer.rows) / run.config.rows_per_step
    trainer.use_mask(mask := Refresh(trainer.bare, trainer.trained_adapter, spec, first, choose, epoch))
    return mask
