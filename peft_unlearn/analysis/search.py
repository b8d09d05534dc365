"""The search for a scale: a grid, then bisection where both curves only fall. Knows models as functions, and no files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import UserError
from ..evaluation.measured import bootstrap_ci
from ..evaluation.numbers import Number
from ..evaluation.plan import Progress
from ..reporting.result import fields_of

FLOOR, TOLERANCE, STEP, SHARE, LEAST = 0.95, 0.01, 0.1, 0.15, 5e-4
ROUNDING = 1e-9  # a floor met up to rounding (0.95 of 0.8 against 0.76) is met


@dataclass(frozen=True)
class Levels:
    """One metric on the two sets that matter, of one model."""

    forget: Number
    retain: Number

    def to_dict(self) -> dict[str, Any]:
        sides = {"forget": self.forget, "retain": self.retain}
        return {side: {"value": number.value, **number.to_dict()} for side, number in sides.items()}


@dataclass(frozen=True)
class Point:
    """An adapter at one scale. scale: 0 = the base, 1 = as trained."""

    scale: float
    levels: Levels

    def to_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, **self.levels.to_dict()}


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

    def to_dict(self) -> dict[str, Any]:
        chosen, base = self.chosen, self.curve[0].levels.retain
        retention = None
        if chosen is not None and chosen.levels.retain.rows is not None and base.value:
            kept = chosen.levels.retain.rows / base.value
            ci = bootstrap_ci(kept)
            retention = {"value": float(kept.mean()), "n": len(kept), "ci95": None if ci is None else list(ci)}
        return {
            **fields_of(self), "scale": None if chosen is None else chosen.scale,
            "weight_on_original": None if chosen is None else round(1.0 - chosen.scale, 10), "retention": retention,
            "tolerance": TOLERANCE,
        }  # fmt: skip


def search(
    read: Callable[[Any], Levels], at: Callable[[float], AbstractContextManager[Any]], base: Levels, floor: float = FLOOR,
    max_scale: float = 1.0, progress: Progress | None = None,
) -> Calibration:  # fmt: skip
    """The scale in (0, max_scale] with the lowest forget value whose retain value is at least floor times the base's.

    First a grid in steps of 0.1. Where both curves only fall, the floor is met up to one scale: that one is bisected to
    `TOLERANCE`, from below, so the scale returned was itself measured and holds. Where one of them rises by more than one row
    can make it, the best grid point is taken (of equals the smaller scale). Where no grid point holds it, the
    scales below the first are bisected down to `LEAST`.

    Args:
        base: the levels of the base, which are the point at scale 0.

    Raises:
        UserError: a floor that is no share, or a base without levels to compare with.
    """
    _check_settings(base, floor, max_scale)
    steps = round(max_scale / STEP)
    tried = _Tried(read, at, floor * (base.retain.value or 0.0), progress, steps, {0.0: Point(0.0, base)})
    grid = [tried.at(round(max_scale * k / steps, 6)) for k in range(steps + 1)]
    rises = {side: _largest_rise([_value(p, side) for p in grid]) for side in ("forget", "retain")}
    one_row = {"forget": 1 / max(base.forget.n, 1), "retain": 1 / max(base.retain.n, 1)}
    monotone = all(rises[side] <= one_row[side] + ROUNDING for side in rises)
    if not monotone:
        how = "best point of the grid, because the curves do not only fall"
        good = [p for p in grid[1:] if tried.holds(p)]
        chosen = min(good, key=lambda p: (_value(p, "forget"), p.scale), default=None) or _bisected(
            tried, 0.0, grid[1].scale
        )
    elif tried.holds(grid[-1]):
        how, chosen = f"the largest scale searched, {max_scale:g}, holds the floor", grid[-1]
    else:
        low = max(p.scale for p in grid if tried.holds(p))
        how, chosen = "bisection", _bisected(tried, low, min(p.scale for p in grid if p.scale > low))
    reason = None
    if chosen is None:
        reason = f"no scale above 0 keeps {100 * floor:g} % of the base's retain value"
    elif _value(chosen, "forget") >= _value(grid[0], "forget") - ROUNDING:
        reason = "at no scale that holds the floor is the forget value below the base's: nothing is forgotten there"
        chosen = None
    curve = tuple(tried.seen[s] for s in sorted(tried.seen))
    return Calibration(chosen, curve, floor, tried.wanted, monotone, rises, how, reason)


def _check_settings(base: Levels, floor: float, max_scale: float) -> None:
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
        raise UserError("the base scores 0 on the retain set: there is nothing to keep, so no scale can be too large")


@dataclass
class _Tried:
    """The scales measured so far; none is measured twice. wanted: the retain value to hold.   steps: of the grid, for the bar."""

    read: Callable[[Any], Levels]
    switch: Callable[[float], AbstractContextManager[Any]]
    wanted: float
    progress: Progress | None
    steps: int
    seen: dict[float, Point] = field(default_factory=dict)

    def at(self, scale: float) -> Point:
        if scale not in self.seen:
            with self.switch(scale) as model:
                self.seen[scale] = Point(scale, self.read(model))
            if self.progress is not None:
                done = len(self.seen) - 1
                self.progress("trying scales", done, max(done, self.steps + 4))
        return self.seen[scale]

    def holds(self, point: Point) -> bool:
        value = point.levels.retain.value
        return value is not None and point.levels.forget.value is not None and value >= self.wanted - ROUNDING


def _bisected(tried: _Tried, low: float, high: float) -> Point | None:
    """The largest scale between one that holds the floor and one that does not, to `TOLERANCE`, or to `SHARE` of itself where that is less:
    strong adapters live far below the grid. None where nothing from `LEAST` on holds."""
    while high - low > max(min(TOLERANCE, SHARE * low), LEAST):
        middle = round((low + high) / 2, 6)
        low, high = (middle, high) if tried.holds(tried.at(middle)) else (low, middle)
    return tried.at(low) if low > 0 else None


def _value(point: Point, side: str) -> float:
    """inf where the model gave no number (NaN logits): neither forgotten nor kept."""
    number = point.levels.forget if side == "forget" else point.levels.retain
    return float("inf") if number.value is None else number.value


def _largest_rise(values: Sequence[float]) -> float:
    """Largest step up between neighbors; steps into and out of what has no number are no rise."""
    known = [v for v in values if v != float("inf")]
    return max([b - a for a, b in pairwise(known)] + [0.0])
