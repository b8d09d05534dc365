"""What a merge kept of its adapters: the table, and the refusal where it is too little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UserError
from .rounding import Sums
from .stream import Unit

MIN_COSINE = 0.9
MAX_DRIFT = 0.1
"""Stochastic rounding: how far the gain of a layer may be from 1 before its noise is said to drown the delta."""


@dataclass
class LayerMerge:
    """One layer, or one expert of it. Of the kept delta with the wanted one: cosine, and gain <kept, D> / <D, D>; None
    where none was wanted. changed: share of weights; relative: |D| / |W|."""

    name: str
    cosine: float | None
    changed: float
    relative: float
    gain: float | None = None


@dataclass
class MergeReport:
    """scale: of the one adapter, or name -> scale of several. digest: of the files written; base_digest: of those read."""

    out: str
    dtype: str
    scale: float | dict[str, float]
    layers: list[LayerMerge] = field(default_factory=list)
    digest: str | None = None
    rounding: str = "nearest"
    base_digest: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    check: dict[str, Any] | None = None

    @property
    def worst_cosine(self) -> float | None:
        return min((row.cosine for row in self.layers if row.cosine is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst_cosine": self.worst_cosine}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.layers), default=5)
        head = f"{'layer':<{width}}  cosine   gain  changed  |D|/|W|"
        none = "  none"
        rows = [
            f"{r.name:<{width}}  {none if r.cosine is None else f'{r.cosine:6.4f}'}  "
            f"{none[1:] if r.gain is None else f'{r.gain:5.2f}'}  {r.changed:6.1%}  {r.relative:8.2e}"
            for r in self.layers
        ]
        scale = self.scale if isinstance(self.scale, dict) else {"": self.scale}
        scales = ", ".join(f"{n} {v:g}".strip() for n, v in scale.items())
        lines = [f"merged in float32, stored as {self.dtype}, scale {scales}", head, *rows]
        if self.rounding == "stochastic":
            lines[0] += " (stochastic rounding)"
            lines.append(
                "Stochastic rounding: the cosine is low by nature, the gain says how much of the change is in the mean."
            )
        if self.check is not None:
            from .check import ProbeCheck

            lines.append(str(ProbeCheck(**self.check)))
        return "\n".join(lines)


class MergeRefused(UserError):
    """The cast would lose too much of the adapter; `report` holds the table."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


def table(units: Mapping[Unit, Sums]) -> list[LayerMerge]:
    rows = []
    for (weight, expert), s in units.items():
        name = weight.removesuffix(".weight") if expert is None else f"{weight}[{expert}]"
        relative = math.sqrt(s.wanted / s.weight) if s.weight > 0 else 0.0
        rows.append(LayerMerge(name, s.cosine, s.changed / s.n if s.n else 0.0, relative, s.gain))
    return rows


def refuse_lossy(report: MergeReport, min_cosine: float) -> None:
    """Raise `MergeRefused` where a layer's delta does not survive the cast."""
    wanted = [r for r in report.layers if r.cosine is not None and r.gain is not None]
    stochastic = report.rounding == "stochastic"
    bad = [r for r in wanted if (abs(r.gain - 1) > MAX_DRIFT if stochastic else r.cosine < min_cosine)]  # type: ignore[operator]
    if not bad:
        return
    if stochastic:
        worst = max(bad, key=lambda r: abs((r.gain or 0) - 1))
        what = f"what was kept along the wanted change is not all of it, the noise of rounding is too large (worst gain {worst.gain:.2f}"
    else:
        worst = min(bad, key=lambda r: r.cosine or 0)
        what = f"the kept change has a cosine under {min_cosine:g} with the wanted one (worst {worst.cosine:.2f}"
    other = "" if stochastic else "--rounding stochastic (keeps the change in the mean, adds noise); "
    raise MergeRefused(
        f"Merging as {report.dtype} would lose the adapter: in {len(bad)} of {len(report.layers)} layers {what}, "
        f"{worst.name}); nothing was written.\n{report}\nWays out: --dtype float32; a larger --scale; {other}merging into the "
        "base as it is after quantization (--onto, see docs/merge.md); or serve the adapter unmerged on the base.",
        report,
    )
