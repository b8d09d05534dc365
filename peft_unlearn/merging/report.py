"""A merge that was asked for, what it kept of its adapters, and the refusal where that is too little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.base import load_base, load_tokenizer
from ..folder.manifest import NEUTRAL_PROMPTS, probe_logits
from ..folder.read import AdapterFolder
from ..reporting.result import Result
from ..reporting.tables import Table, to_text
from ..stack.fits import check_base
from ..stack.model import ForgetModel
from ..tuners.delta import Deltas
from .layout import Unit
from .rounding import Sums
from .stream import Overlay

MIN_COSINE = 0.9
MAX_DRIFT = 0.1
"""Stochastic rounding: how far the gain of a layer may be from 1 before its noise is taken to drown the delta."""


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
class ProbeCheck:
    """Largest |logit - logit| at the prompts' last positions, all computed in float32: merged against unmerged, and for
    comparison unmerged against the base. same_top: at how many prompts merged and unmerged agree on the likeliest token."""

    prompts: int
    difference: float
    effect: float
    same_top: int

    def __str__(self) -> str:
        return (
            f"on {self.prompts} probe prompts merged and unmerged differ by at most {self.difference:.2g} in a logit (the "
            f"adapters themselves move one by {self.effect:.2g}); the likeliest token is the same at {self.same_top}. What is "
            "forgotten is judged by `peft-unlearn eval`, not by these."
        )


@dataclass
class MergeReport(Result):
    """scale: of the one adapter, or name -> scale of several. digest: of the files written; base_digest: of those read.
    adapters: name -> adapter id. resumed: shards that an earlier run had written. done: an earlier run had written all."""

    out: str
    dtype: str
    scale: float | dict[str, float]
    layers: list[LayerMerge] = field(default_factory=list)
    digest: str | None = None
    rounding: str = "nearest"
    base_digest: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    check: ProbeCheck | None = None
    done: bool = False

    @property
    def worst_cosine(self) -> float | None:
        return min((row.cosine for row in self.layers if row.cosine is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "done"} | {"worst_cosine": self.worst_cosine}

    def remarks(self) -> list[str]:
        return (
            [f"{self.out}: an earlier run of this merge had finished; nothing was written again."] if self.done else []
        )

    def __str__(self) -> str:
        rows = [
            (
                r.name, "none" if r.cosine is None else f"{r.cosine:.4f}", "none" if r.gain is None else f"{r.gain:.2f}",
                f"{r.changed:.1%}", f"{r.relative:.2e}",
            )
            for r in self.layers
        ]  # fmt: skip
        table = to_text(Table(("layer", "cosine", "gain", "changed", "|D|/|W|"), rows))
        scale = self.scale if isinstance(self.scale, dict) else {"": self.scale}
        scales = ", ".join(f"{n} {v:g}".strip() for n, v in scale.items())
        lines = [f"merged in float32, stored as {self.dtype}, scale {scales}", table]
        if self.rounding == "stochastic":
            lines[0] += " (stochastic rounding)"
            lines.append(
                "Stochastic rounding: the cosine is low by nature, the gain says how much of the change is in the mean."
            )
        return "\n".join(lines if self.check is None else [*lines, str(self.check)])


class MergeRefused(UserError):
    """The cast would lose too much of the adapter; `report` holds the table."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


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
        found = Overlay([(Deltas(f, model), self.scales[n]) for n, f in self.folders.items()])
        found.refuse_tied(model)
        return found

    def was_read(self, digest: str) -> None:
        """Note the digest of the base's files, and refuse them if they are not those of training."""
        self.report.base_digest = digest
        for folder in self.folders.values() if self.expected is not None else ():
            check_base(folder, self.base_path, digest)

    def account(self, units: Mapping[Unit, Sums], min_cosine: float) -> None:
        """Fill the table; raise `MergeRefused` where a layer's delta does not survive the cast."""
        for (weight, expert), s in units.items():
            name = weight.removesuffix(".weight") if expert is None else f"{weight}[{expert}]"
            relative = math.sqrt(s.wanted / s.weight) if s.weight > 0 else 0.0
            row = LayerMerge(name, s.cosine, s.changed / s.n if s.n else 0.0, relative, s.gain)
            self.report.layers.append(row)
        _refuse_lossy(self.report, min_cosine)

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

    def check_probes(self) -> None:
        """Load the merged and the unmerged model, one after the other, and compare them on the first manifest's prompts."""
        paths = {n: f.path for n, f in self.folders.items()}
        probes = next(iter(self.folders.values())).manifest.probes
        prompts = (probes and probes.prompts) or list(NEUTRAL_PROMPTS)
        tokenizer = load_tokenizer(*self.tokenizers)
        stack = ForgetModel.from_pretrained(self.base_path, paths, self.scales)
        on = probe_logits(stack.model, tokenizer, prompts)
        with stack.disabled() as plain:
            off = probe_logits(plain, tokenizer, prompts)
        del stack, plain
        now = probe_logits(load_base(self.out, fits=self.targets), tokenizer, prompts)
        same_top = int((now.argmax(-1) == on.argmax(-1)).sum())
        difference, effect = float((now - on).abs().max()), float((on - off).abs().max())
        self.report.check = ProbeCheck(len(prompts), difference, effect, same_top)


def _refuse_lossy(report: MergeReport, min_cosine: float) -> None:
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
