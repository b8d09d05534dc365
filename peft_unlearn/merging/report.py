"""A merge that was asked for, and what it kept of its adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..folder.read import AdapterFolder
from ..reporting.result import Result
from ..reporting.tables import Table, to_text
from ..stack.fits import check_base
from ..tuners.delta import read_deltas
from .checks import ProbeCheck, SuiteCheck
from .layout import Unit
from .rounding import Sums
from .stream import Overlay

MIN_COSINE = 0.9
SHOWN = 10
"""Layers in the printed table, the worst."""


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
class MergeReport(Result):
    """scale: of the one adapter, or name -> scale of several. digest: of the files written; base_digest: of those read.
    adapters: name -> adapter id. resumed: shards that an earlier run had written. done: an earlier run had written all.
    check: what the merged model was judged by, see `gate`. lossy: which layers lost much of their change, in words.
    losses: for a quantized base: model -> set -> nats per target token."""

    out: str
    dtype: str
    scale: float | dict[str, float]
    layers: list[LayerMerge] = field(default_factory=list)
    digest: str | None = None
    rounding: str = "nearest"
    base_digest: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    check: ProbeCheck | SuiteCheck | None = None
    done: bool = False
    lossy: str | None = None
    losses: dict[str, dict[str, float]] | None = None

    @property
    def worst_cosine(self) -> float | None:
        return min((row.cosine for row in self.layers if row.cosine is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        found = {k: v for k, v in asdict(self).items() if k not in ("done", "lossy")}
        if self.losses is None:
            del found["losses"]
        return found | {"worst_cosine": self.worst_cosine}

    def remarks(self) -> list[str]:
        done = f"{self.out}: an earlier run of this merge had finished; nothing was written again."
        kept = (
            "the merged model behaves as the unmerged one, see below"
            if self.check
            else "written all the same (--force)"
        )
        return [done] * self.done + ([f"{self.lossy}; {kept}."] if self.lossy else [])

    def table(self) -> str:
        """The worst layers, in the order of their numbers."""
        worst = {id(r) for r in sorted(self.layers, key=lambda r: 2.0 if r.cosine is None else r.cosine)[:SHOWN]}
        rows = [
            (
                r.name, "none" if r.cosine is None else f"{r.cosine:.4f}", "none" if r.gain is None else f"{r.gain:.2f}",
                f"{r.changed:.1%}", f"{r.relative:.2e}",
            )
            for r in self.layers if id(r) in worst
        ]  # fmt: skip
        text = to_text(Table(("layer", "cosine", "gain", "changed", "|D|/|W|"), rows))
        more = len(self.layers) - len(rows)
        return f"{text}\n{more} more layers, all of a higher cosine (--json has them)" if more else text

    def __str__(self) -> str:
        scale = self.scale if isinstance(self.scale, dict) else {"": self.scale}
        scales = ", ".join(f"{n} {v:g}".strip() for n, v in scale.items())
        lines = [f"merged in float32, stored as {self.dtype}, scale {scales}", self.table()]
        if self.rounding == "stochastic":
            lines[0] += " (stochastic rounding)"
            lines.append(
                "Stochastic rounding: the cosine is low by nature, the gain says how much of the change is in the mean."
            )
        lines += [] if self.check is None else [str(self.check)]
        for name, losses in (self.losses or {}).items():
            lines.append(f"{name}: " + ", ".join(f"{s} loss {v:.3f}" for s, v in losses.items()))
        return "\n".join(lines)


def by_number(name: str) -> list[Any]:
    """A sort key in which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@dataclass
class Job:
    """A merge that was asked for, checked as far as it can be without reading the base's weights; and its report.

    expected: the base's digest; None where the weights are taken from elsewhere (`onto`).
    """

    folders: dict[str, AdapterFolder]
    scales: dict[str, float]
    base_path: Path
    expected: str | None
    out: Path
    dtype: str
    rounding: str
    seed: int

    def __post_init__(self) -> None:
        scale = dict(self.scales) if len(self.scales) > 1 else next(iter(self.scales.values()))
        ids = {n: f.adapter_id for n, f in self.folders.items()}
        self.report = MergeReport(str(self.out), self.dtype, scale, rounding=self.rounding, adapters=ids)

    @property
    def tokenizers(self) -> list[Path]:
        return [*(f.path for f in self.folders.values()), self.base_path]

    @property
    def targets(self) -> list[str]:
        """What the first adapter is on."""
        return next(iter(self.folders.values())).manifest.targets

    def overlay(self, model: Any) -> Overlay:
        """The deltas, checked against the model's shapes. Raises `UserError` also for a weight that is tied to another."""
        found = Overlay([(read_deltas(f, model, self.base_path), self.scales[n]) for n, f in self.folders.items()])
        found.refuse_tied(model)
        return found

    def was_read(self, digest: str) -> None:
        """Note the digest of the base's files, and refuse them if they are not those of training."""
        self.report.base_digest = digest
        for folder in self.folders.values() if self.expected is not None else ():
            check_base(folder, self.base_path, digest)

    def account(self, units: Mapping[Unit, Sums]) -> None:
        """Fill the table, in the order of the layers' numbers."""
        for (weight, expert), s in units.items():
            name = weight.removesuffix(".weight") if expert is None else f"{weight}[{expert}]"
            relative = math.sqrt(s.wanted / s.weight) if s.weight > 0 else 0.0
            row = LayerMerge(name, s.cosine, s.changed / s.n if s.n else 0.0, relative, s.gain)
            self.report.layers.append(row)
        self.report.layers.sort(key=lambda r: by_number(r.name))

    def record(self) -> dict[str, Any]:
        """forget-merge.json: no times and no places, so that equal merges are equal bytes."""
        base, report = next(iter(self.folders.values())).manifest.base, self.report
        return {
            "format": 1,
            "base": {"ref": base.ref, "revision": base.revision, "digest": base.digest},
            "onto": report.base_digest if self.expected is None else None,
            "adapters": [
                {"name": n, "adapter_id": f.adapter_id, "scale": self.scales[n]} for n, f in self.folders.items()
            ],
            "dtype": self.dtype,
            "rounding": self.rounding,
            "seed": self.seed if self.rounding == "stochastic" else None,
            "digest": report.digest,
            "worst_cosine": report.worst_cosine,
            "layers": [asdict(row) for row in report.layers],
        }
