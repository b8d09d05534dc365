"""Adapters at equal retention: how strongly one may be dialed so that the retain set is still kept.

The scale of a LoRA adapter is the exact mix of two models: base + scale * delta, so the weight on the original is 1 - scale, and
no weights are ever written to try one out. Searched is the scale that forgets most among those whose retain value stays at or
above a floor times the base's own. Source: Towards Effective Evaluations and Comparisons for LLM Unlearning Methods (2025),
https://arxiv.org/abs/2406.09179; there theta = w * original + (1 - w) * unlearned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import Errors, UserError
from ..evaluation import suites
from ..evaluation.measured import bootstrap_ci
from ..evaluation.plan import Progress, make_plan, measure, rows_of
from ..evaluation.score import Number, numbers_of, on_one_model
from ..registry import get

if TYPE_CHECKING:
    from ..folder.read import AdapterFolder
    from ..stack.model import ForgetModel

METRIC = "extraction_strength"
FLOOR, TOLERANCE, STEP = 0.95, 0.01, 0.1
ROUNDING = 1e-9  # a floor met up to rounding (0.95 of 0.8 against 0.76) is met


@dataclass(frozen=True)
class Levels:
    """One metric on the two sets that matter, of one model."""

    forget: Number
    retain: Number

    def as_json(self) -> dict[str, Any]:
        return {
            side: {"value": number.value, **number.detail()}
            for side, number in (("forget", self.forget), ("retain", self.retain))
        }


@dataclass(frozen=True)
class Point:
    """An adapter at one scale. scale: 0 = the base, 1 = as trained."""

    scale: float
    levels: Levels

    def as_json(self) -> dict[str, Any]:
        return {"scale": self.scale, **self.levels.as_json()}


@dataclass(frozen=True)
class Calibration:
    """chosen: the point that was found, None where no scale above 0 will do (`reason` says why).

    wanted: the retain value that had to be held.   rises: the largest rise of each curve from one grid point to the next (both
    should only fall).   monotone: neither rises by more than one row can.   how: which search decided.
    """

    chosen: Point | None
    curve: tuple[Point, ...]
    floor: float
    wanted: float
    monotone: bool
    rises: Mapping[str, float]
    how: str
    reason: str | None

    def as_json(self) -> dict[str, Any]:
        retention = None
        base = self.curve[0].levels.retain
        if self.chosen is not None and self.chosen.levels.retain.rows is not None and base.value:
            kept = self.chosen.levels.retain.rows / base.value
            ci = bootstrap_ci(kept)
            retention = {"value": float(kept.mean()), "n": len(kept), "ci95": None if ci is None else list(ci)}
        return {
            "floor": self.floor,
            "wanted": self.wanted,
            "scale": None if self.chosen is None else self.chosen.scale,
            "weight_on_original": None if self.chosen is None else round(1.0 - self.chosen.scale, 10),
            "chosen": None if self.chosen is None else self.chosen.as_json(),
            "retention": retention,
            "monotone": self.monotone,
            "rises": dict(self.rises),
            "how": self.how,
            "tolerance": TOLERANCE,
            "reason": self.reason,
            "curve": [p.as_json() for p in self.curve],
        }


def check_exact(folder: AdapterFolder) -> None:
    """Refuse an adapter whose scale is not the exact mix of base and unlearned model.

    Exact is base + scale * delta for every changed weight. DoRA re-normalizes, trained biases and whole modules saved beside the
    factors do not follow the scale, and some initializations change the base itself.
    """
    from ..folder.read import WEIGHTS
    from ..folder.safetensors_io import read_header

    config, errors = folder.config, Errors()
    kind = str(config["peft_type"])
    if kind not in ("LORA", "PEFT_UNLEARN_EXPERT_LORA"):
        errors.add(f"its PEFT type is {kind}, which has no scale")
    if config.get("use_dora"):
        errors.add("it is a DoRA adapter, which re-normalizes the weights: half the scale is not half the change")
    if config.get("bias") not in (None, "none"):
        errors.add(f"it trained biases (bias={config['bias']!r}), which are there at any scale")
    for key in ("modules_to_save", "trainable_token_indices", "kasa_config", "layer_replication"):
        if config.get(key):
            errors.add(f"it has {key}={config[key]!r}, which the scale does not reach")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        errors.add(f"init_lora_weights={start!r} changes the base's own weights")
    if folder.manifest.depends_on:
        errors.add("it was trained on top of other adapters: at scale 0 those are left, not the base")
    if not errors.messages:
        stray = [n for n in read_header(folder.path / WEIGHTS) if "lora_" not in n]
        if stray:
            errors.add(f"{len(stray)} of its tensors are no LoRA factors, first {stray[0]!r}")
    if errors.messages:
        raise UserError(
            f"{folder.path}: cannot be calibrated, since its scale is not the exact mix of the two models: "
            f"{'; '.join(errors.messages)}."
        )


def dialed(stack: ForgetModel, name: str) -> Callable[[float], AbstractContextManager[Any]]:
    """A function scale -> context manager, inside which the model is the base with adapter `name` alone at that scale."""
    only = on_one_model(stack.model, {name: name})[name]

    @contextmanager
    def at(scale: float) -> Iterator[Any]:
        before = stack.scales()[name]
        with only() as model:
            stack.scale(name, scale)
            try:
                yield model
            finally:
                stack.scale(name, before)

    return at


def make_read(
    data: Any, tokenizer: Any, metric: str = METRIC, n: int | None = None, template: str | None = None
) -> Callable[[Any], Levels]:
    """A function model -> Levels. The rows are tokenized once, here; a reading is one forward for each answer, no generation.

    metric: one value per row, lower better on the forget and higher on the retain set.   n: at most so many rows of each set.
    """
    method = get("metric", metric)
    if method.extra["better"] != {"forget": "lower", "retain": "higher"} or set(method.needs) & {
        "generation", "perturbed", "twin",
    }:  # fmt: skip
        raise UserError(
            f"metric {metric!r} cannot calibrate: it takes one that is read off the right answers and is lower on what is "
            "forgotten, such as extraction_strength, exact_memorization or probability"
        )
    for name in ("forget", "retain"):
        if not rows_of(data, name):
            raise UserError(f"calibration needs a {name} set, and these data have none; give one with --data")
    spec = {name: {"role": name, "metrics": [metric]} for name in ("forget", "retain")}
    plan = make_plan(
        suites.load({"format": suites.FORMAT, "name": "calibration", "sets": spec}), data, tokenizer, n, template
    )

    def read(model: Any) -> Levels:
        found = numbers_of(plan, measure(model, plan), None)
        return Levels(found[f"forget/{metric}"], found[f"retain/{metric}"])

    return read


def search(
    read: Callable[[Any], Levels],
    at: Callable[[float], AbstractContextManager[Any]],
    base: Levels,
    floor: float = FLOOR,
    max_scale: float = 1.0,
    progress: Progress | None = None,
) -> Calibration:
    """The scale in (0, max_scale] with the lowest forget value whose retain value is at least floor times the base's.

    First a grid in steps of 0.1. Where both curves only fall, the floor is met up to one scale: that one is bisected to
    `TOLERANCE`, from below, so the scale returned was itself measured and holds. Where one of them rises by more than one row
    can make it, the best grid point is taken (of equals the smaller scale).

    base: the levels of the base, which are the point at scale 0.
    Raises UserError where a floor is no share or the base has no levels to compare with.
    """
    if not 0 < floor <= 1:
        raise UserError(
            f"the retain floor is a share of what the base has, above 0 and at most 1, e.g. 0.95, not {floor:g}"
        )
    if not STEP <= max_scale <= 4:
        raise UserError(f"max_scale is the largest scale tried, from {STEP} to 4, not {max_scale:g}")
    for side, number in (("forget", base.forget), ("retain", base.retain)):
        if number.value is None:
            raise UserError(f"the base has no number on the {side} set ({number.reason}), so nothing can be held to it")
    if not base.retain.value:
        raise UserError("the base scores 0 on the retain set: there is nothing to keep, so no scale can be too strong")
    steps = round(max_scale / STEP)
    scales = [round(max_scale * k / steps, 6) for k in range(1, steps + 1)]
    seen = {0.0: Point(0.0, base)}
    wanted = floor * base.retain.value

    def measured(scale: float) -> Point:
        if scale not in seen:
            with at(scale) as model:
                seen[scale] = Point(scale, read(model))
            if progress is not None:
                progress("trying scales", len(seen) - 1, max(len(seen) - 1, steps + 4))
        return seen[scale]

    def holds(point: Point) -> bool:
        value = point.levels.retain.value
        return value is not None and point.levels.forget.value is not None and value >= wanted - ROUNDING

    grid = [seen[0.0], *(measured(s) for s in scales)]
    rises = {side: _largest_rise([_value(p, side) for p in grid]) for side in ("forget", "retain")}
    one_row = {"forget": 1 / max(base.forget.n, 1), "retain": 1 / max(base.retain.n, 1)}
    monotone = all(rises[side] <= one_row[side] + ROUNDING for side in rises)
    if not monotone:
        how = "best point of the grid, because the curves do not only fall"
        good = [p for p in grid[1:] if holds(p)]
        chosen = min(good, key=lambda p: (_value(p, "forget"), p.scale), default=None)
    elif holds(grid[-1]):
        how, chosen = f"the largest scale searched, {max_scale:g}, holds the floor", grid[-1]
    else:
        how = "bisection"
        low = max(p.scale for p in grid if holds(p))
        high = min(p.scale for p in grid if p.scale > low)
        while high - low > TOLERANCE:
            middle = round((low + high) / 2, 6)
            low, high = (middle, high) if holds(measured(middle)) else (low, middle)
        chosen = seen[low] if low > 0 else None
    reason = None
    if chosen is None:
        reason = f"no scale above 0 keeps {100 * floor:g} % of the base's retain value"
    elif _value(chosen, "forget") >= _value(seen[0.0], "forget") - ROUNDING:
        reason = "at no scale that holds the floor is the forget value below the base's: nothing is forgotten there"
        chosen = None
    curve = tuple(seen[s] for s in sorted(seen))
    return Calibration(chosen, curve, floor, wanted, monotone, rises, how, reason)


def _value(point: Point, side: str) -> float:
    """inf where the model gave no number (NaN logits): neither forgotten nor kept."""
    number = point.levels.forget if side == "forget" else point.levels.retain
    return float("inf") if number.value is None else number.value


def _largest_rise(values: Sequence[float]) -> float:
    """Largest step up between neighbors; steps into and out of what has no number are no rise."""
    known = [v for v in values if v != float("inf")]
    return max([b - a for a, b in pairwise(known)] + [0.0])
