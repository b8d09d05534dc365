"""The G-effect of a finished run: at its start, at its checkpoints, and of the adapter it ended with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..attribution.callback import describe, own, probe_batches, track
from ..attribution.effect import Effects, measure
from ..data.alternates import add_alternates
from ..data.collate import padding_id
from ..errors import Errors, UserError
from ..evaluation.subjects import check_data
from ..folder.base import load_tokenizer
from ..folder.digest import digest_checkpoint
from ..folder.read import WEIGHTS, AdapterFolder, read_adapter
from ..folder.results import check_place, write_file
from ..folder.yaml_io import parse_yaml
from ..forward import Reference
from ..gradients.parse import SCOPES, parse_method, parse_terms
from ..gradients.terms import Term, alternates_of
from ..gradients.vector import Space
from ..reporting.effect_pictures import pictures
from ..reporting.result import Result
from ..stack.fits import check_base
from ..training.adapt import get_forget_model
from ..training.checkpoints import STATE, damage
from ..training.config import WORK, encode_set
from ..training.fila import begun
from ..training.recipe import Run, prepare
from ..training.selecting import NEVER, chosen
from ..training.train import generate_alternates

ADAPTER = "default"
Progress = Callable[[str, int, int], None]


@dataclass
class _Point:
    """Where the adapter stood: its step, its weights file (None = untrained), the engine's state there, if it is known."""

    step: int
    weights: Path | None
    state: Path | None = None


def parse_objectives(spec: Any) -> dict[str, list[Term]]:
    """Label -> terms of ``"ga,npo"``, a list of names, or ``{label: {objective: {hyper.., weight, batch}}}`` (also as YAML text,
    ``{rmu: {layer: 2}}`` standing for one objective of that name). Sets default to forget.

    Raises:
        UserError: everything wrong with it at once.
    """
    from .. import registry

    if isinstance(spec, str) and spec.lstrip().startswith("{"):
        spec = parse_yaml(spec, "objectives")
    if isinstance(spec, str):
        spec = [name.strip() for name in spec.split(",")]
    if not isinstance(spec, Mapping):
        spec = {str(name): {} for name in spec or () if str(name)}
    known = {m.name for m in registry.methods("objective")}
    errors, out = Errors(), {}
    for label, objectives in spec.items():
        objectives = objectives or {}
        single = str(label).replace("-", "_")
        # {ga: {}} and {rmu: {layer: 2}} name the objective itself; {mixed: {ga: {}, npo: {}}} a label.
        if not (isinstance(objectives, Mapping) and objectives and set(objectives) <= known):
            objectives = {single: objectives}
        sets = {
            o: {"batch": "forget", **(h or {})} if (h is None or isinstance(h, Mapping)) else h
            for o, h in objectives.items()
        }
        nested = Errors()
        out[str(label)] = parse_terms({"objectives": sets}, nested)
        for message in nested.messages:
            errors.add(message.removeprefix("terms.objectives: "))
    errors.raise_if_any("objectives")
    return out


@dataclass
class RunEffects(Result):
    """Effects of a saved run at its start, at every whole checkpoint and of the finished adapter.

    space: of the gradients.   rule: the run's.   objectives: label -> {objective: hyper-parameters}.   rows: of each batch, by set.
    points: the measurements, in order of steps.   notes: what a reader has to know about them.   files: where `write` put it.
    """

    name: str
    adapter_id: str
    base: str
    space: str
    rule: Any
    objectives: dict[str, Any]
    rows: list[dict[str, int]]
    points: list[Effects]
    notes: list[str]
    files: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        about = ("adapter_id", "name", "base", "space", "rule", "objectives", "rows")
        return track(self.points, self.notes, **{key: getattr(self, key) for key in about})

    def __str__(self) -> str:
        return "\n".join(map(str, self.files))

    def remarks(self) -> list[str]:
        return self.notes

    def write(self, out: str | Path) -> list[Path]:
        """effect.json and its pictures in the folder `out`; returns their paths."""
        folder = check_out(out)
        found = self.to_dict()
        content: dict[str, bytes | str] = {"effect.json": json.dumps(found, indent=1, allow_nan=False)}
        content |= {f"{name}.png": png for name, png in pictures(found).items()}
        places = {check_place(folder / name): some for name, some in content.items()}
        self.files = [write_file(place, some) for place, some in places.items()]
        return self.files


def check_out(out: str | Path) -> Path:
    """The folder for effect.json and its pictures; refuses what is none, before any work."""
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    return check_place(folder / "effect.json").parent


def effect(
    folder: str | Path, *, objectives: Any = None, space: str = "adapter", batches: int = 4, rows: int | None = None,
    instances: int = 6, repro: bool = False, base: str | None = None, data: str | None = None, progress: Progress | None = None,
) -> RunEffects:  # fmt: skip
    """Effects of a saved run at its start, at every whole checkpoint in ``<folder>.work`` and of the finished adapter.

    Args:
        objectives: what to measure beside the run's own forget terms; see `parse_objectives`.
        batches, rows: number of batches, and forget rows in each (default: as in training, fewer where rows would repeat).
        instances: forget rows measured token by token (for objectives per sequence: four times as many answers), at the first, the
            middle and the last point.
        repro: the released code's estimator, see `attribution.effect.measure`.

    Raises:
        UserError: no such folder, unknown objective, other base or data than the run's.
    """
    wanted = parse_objectives(objectives)
    if space not in ("adapter", "base"):
        raise UserError(f"space={space!r} is not one of adapter, base")
    if batches < 1:
        raise UserError(f"batches={batches}: at least one is needed")
    found = read_adapter(folder)
    mine, rule, options = _method(found)
    wanted = {**(ours := own(mine)), **{k: v for k, v in wanted.items() if k not in ours}}  # the run's own come first
    run = _run(found, mine, wanted, base, data)
    config = run.config
    model, sets, pad_id = _model(run)
    points, notes = _points(found)
    reference = Reference(config.reference, ADAPTER)
    per_anchor = config.per_anchor if config.anchor == "forget" else 1
    probe = probe_batches(
        sets, batches, rows or config.train_batch_size, per_anchor, pad_id, config.seed, config.device
    )
    update = None
    if space == "adapter" and rule is not None:
        ran = copy.copy(config)
        ran.term_list, ran.rule_method, ran.scope = mine, rule, options.get("scope", "global")
        update = ran.window(model, reference)
    measured = []
    looked_at = {0, len(points) // 2, len(points) - 1}
    for i, point in enumerate(_at_points(model, points, update, progress)):
        measured.append(measure(
            model, wanted, probe, reference=reference, space=space, update=update, repro=repro, step=point.step,
            instances=instances if i in looked_at else 0,
        ))  # fmt: skip
    return RunEffects(
        name=found.manifest.name, adapter_id=found.adapter_id, base=found.manifest.base.ref, space=space,
        rule=found.manifest.method.get("rule"), objectives=describe(wanted),
        rows=[{k: len(v["input_ids"]) for k, v in b.items()} for b in probe], points=measured, notes=notes,
    )  # fmt: skip


def _method(found: AdapterFolder) -> tuple[list[Term], Any, Mapping[str, Any]]:
    """Terms, rule and the rule's options of a saved run."""
    errors, method = Errors(), found.manifest.method
    terms = parse_terms(method.get("terms", {}), errors)
    rule, options = parse_method("rule", method.get("rule"), errors, scope=SCOPES)
    errors.raise_if_any(f"{found.path.name}: its method")
    return terms, rule, options


def _run(
    found: AdapterFolder, mine: list[Term], wanted: Mapping[str, list[Term]], base: str | None, data: str | None
) -> Run:
    """The run of a saved adapter, prepared again for all these terms, on its own base and data."""
    run = prepare(found.recipe, found.path, base, data)
    check_data(run.data, found.manifest)
    config = copy.copy(run.config)
    config.term_list = [*mine, *(t for ts in wanted.values() for t in ts if t not in mine)]
    run = replace(run, config=config)
    if run.selecting is not None and run.selecting.refresh != NEVER:
        raise UserError(
            f"{found.path}: its entries were chosen anew while it trained (selection.refresh), and effects over checkpoints are not "
            "worked out for those"
        )
    _check_sets(run)
    check_base(found, run.base_dir, digest_checkpoint(run.base_dir))
    if found.manifest.depends_on:
        raise UserError(
            f"{found.path}: was trained on top of other adapters, and effects over checkpoints are not worked out for those"
        )
    return run


def _at_points(model: Any, points: Sequence[_Point], update: Any, progress: Progress | None) -> Iterator[_Point]:
    """The points one after the other, the model's adapter and the window's state as they were there."""
    start = Space.trainable(model).read()
    for i, point in enumerate(points):
        if progress is not None:
            progress("measuring", i, len(points))
        if point.weights is None:
            Space.trainable(model).write(start)
        else:
            _put(model, point.weights)
        if update is not None:
            update.rule_state = {}
            if point.state is not None:  # written by the trainer: tensors and plain values only
                update.load_state_dict(torch.load(point.state, weights_only=True)["window"])
        yield point
    if progress is not None:
        progress("measuring", len(points), len(points))


def _check_sets(run: Run) -> None:
    if not run.data.retain:
        raise UserError(
            "data: there is no retain set, and the retaining effect is measured on one; give it with --data"
        )
    for batch, kinds in alternates_of(run.config.term_list).items():
        if len(kinds) > 1:
            raise UserError(
                f"objectives: the {batch} rows would need several winner answers ({', '.join(sorted(kinds))}); measure them apart"
            )
        if kinds <= {"row", "refusal"}:
            add_alternates(run.data.rows(batch) or [], next(iter(kinds)), run.config.seed, batch)


def _model(run: Run) -> tuple[Any, dict[str, list[dict[str, Any]]], int]:
    """The model with the adapter as it started (same seed as in training), the sets as token rows, the padding token."""
    from transformers import set_seed

    config = run.config
    base, tokenizer = run.load(), load_tokenizer(run.base_dir)
    generate_alternates(run, base, tokenizer)
    if run.selecting is not None:
        run.adapter = run.selecting.adapter(chosen(run, base, tokenizer, resume=True))
    set_seed(config.seed)
    model = get_forget_model(base, run.adapter, adapter_name=ADAPTER).to(config.device).eval()
    if run.fila:
        begun(run, model, tokenizer, ADAPTER)
    names = sorted({"forget", "retain", *(t.batch for t in config.term_list)})
    sets = {name: encode_set(config, run.data, name, tokenizer) for name in names}
    pad_id = padding_id(tokenizer)
    return model, sets, pad_id


def _points(found: AdapterFolder) -> tuple[list[_Point], list[str]]:
    """Start, whole checkpoints, finished adapter; and what a reader has to know about them."""
    method, notes = found.manifest.method, []
    at = found.path.resolve()
    work = at.with_name(at.name + WORK)
    kept = sorted(_checkpoints(work), key=lambda p: p.step)
    last = int(method.get("best_step") or method.get("steps") or (kept[-1].step if kept else 1))
    if method.get("negate"):
        notes.append("the finished adapter is the negated one; the checkpoints before it learn what it takes away")
    if method.get("averaging"):
        notes.append("the finished adapter is an average over steps; the checkpoints are the single steps")
    states = {p.step: p.state for p in kept}
    # The last step is the finished adapter's, whether or not a checkpoint was written there too.
    path = [p for p in kept if p.step != last]
    if not path:
        notes.append(
            f"{work.name} holds no checkpoint from before the end: only the start and the finished adapter were measured. A run "
            "keeps some with train: {save_strategy: steps, save_steps: 20}"
        )
    final = _Point(last, (found.compact or found.path) / WEIGHTS, states.get(last))
    return [_Point(0, None), *sorted([*path, final], key=lambda p: p.step)], notes


def _checkpoints(work: Path) -> Iterator[_Point]:
    for p in work.glob("checkpoint-*"):
        number = p.name.rpartition("-")[2]
        if number.isdigit() and damage(p) is None and (p / WEIGHTS).is_file():
            yield _Point(int(number), p / WEIGHTS, p / STATE)


def _put(model: Any, weights: Path) -> None:
    """Read an adapter's weights into the adapter of `model`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(model, load_file(weights), adapter_name=ADAPTER)
    if result.unexpected_keys:
        raise UserError(f"{weights.parent.name}: holds tensors of another adapter, first {result.unexpected_keys[0]}")
