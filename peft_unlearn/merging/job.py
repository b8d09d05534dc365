"""A merge that was asked for, as both ways of doing it understand it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.read import AdapterFolder
from .delta import Deltas
from .report import MergeReport
from .stream import Overlay


@dataclass
class Job:
    """A merge that was asked for, checked as far as it can be without reading the base's weights."""

    folders: dict[str, AdapterFolder]
    scales: dict[str, float]
    base_path: Path
    expected: str | None
    out: Path
    dtype: str
    rounding: str
    seed: int

    def report(self) -> MergeReport:
        scale = dict(self.scales) if len(self.scales) > 1 else next(iter(self.scales.values()))
        ids = {n: f.adapter_id for n, f in self.folders.items()}
        return MergeReport(str(self.out), self.dtype, scale, rounding=self.rounding, adapters=ids)

    def record(self, report: MergeReport) -> dict[str, Any]:
        """forget-merge.json: no times and no places, so that equal merges are equal bytes."""
        base = next(iter(self.folders.values())).manifest.base
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

    def overlay(self, model: Any) -> Overlay:
        return Overlay([(Deltas(f, model), self.scales[n]) for n, f in self.folders.items()])

    @property
    def tokenizers(self) -> list[Path]:
        return [*(f.path for f in self.folders.values()), self.base_path]


def refuse_tied(weight: str, other: str | None) -> None:
    if other is not None:
        raise UserError(
            f"The adapted weight {weight} is tied to {other}: merging into one would change both. Serve the adapter unmerged, "
            "or untie the two in a copy of the base and train there."
        )
