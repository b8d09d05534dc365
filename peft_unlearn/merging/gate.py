"""Whether a merged model still does what its adapters do: judged by what it answers, explained by the cosines of its layers.

A layer under the bound of cosines says that rounding took much of its change, not that the model knows again what it had forgotten.
So such a merge is refused only if the merged model behaves otherwise than the unmerged one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import UserError
from ..folder.base import load_base, load_tokenizer
from ..folder.device import placed
from ..folder.manifest import NEUTRAL_PROMPTS, probe_logits
from ..stack.model import ForgetModel
from .checks import ProbeCheck, SuiteCheck
from .report import Job, LayerMerge, MergeReport

MAX_DRIFT = 0.1
"""Stochastic rounding: how far the gain of a layer may be from 1 before its noise is taken to drown the delta."""
SMALLEST = 1e-3
"""Adapters that move no probe logit by more than this cannot be judged by them."""


Judge = Callable[[Job, Path], ProbeCheck | SuiteCheck | None]


class MergeRefused(UserError):
    """The cast would lose too much of the adapter; `report` holds the table."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


def by_probes(job: Job, place: Path, why: str | None = None) -> ProbeCheck | None:
    """Load the unmerged and the merged model at `place`, one after the other, and compare them on the first manifest's prompts.

    None where the weights are others than the adapters' (`Job.expected`): there is nothing that they could be compared with.
    """
    if job.expected is None:
        return None
    paths = {n: f.path for n, f in job.folders.items()}
    probes = next(iter(job.folders.values())).manifest.probes
    prompts = (probes and probes.prompts) or list(NEUTRAL_PROMPTS)
    tokenizer = load_tokenizer(*job.tokenizers)
    stack = ForgetModel.from_pretrained(job.base_path, paths, job.scales)
    on = probe_logits(stack.model, tokenizer, prompts)
    with stack.disabled() as plain:
        off = probe_logits(plain, tokenizer, prompts)
    del stack, plain
    now = probe_logits(placed(load_base(place, fits=job.targets)), tokenizer, prompts)
    same_top = int((now.argmax(-1) == on.argmax(-1)).sum())
    difference, effect = float((now - on).abs().max()), float((on - off).abs().max())
    found = ProbeCheck(len(prompts), difference, effect, same_top, why=why)
    if effect > SMALLEST:
        wanted, kept = (on - off).flatten().double(), (now - off).flatten().double()
        found.cosine = float(torch.cosine_similarity(kept, wanted, dim=0))
        found.gain = float(kept @ wanted / (wanted @ wanted))
    return found


def lossy(report: MergeReport, min_cosine: float) -> tuple[list[LayerMerge], str]:
    """(layers of which the cast kept too little, that in words)."""
    wanted = [r for r in report.layers if r.cosine is not None and r.gain is not None]
    if report.rounding == "stochastic":
        bad = [r for r in wanted if abs((r.gain or 0) - 1) > MAX_DRIFT]
        worst = max(bad, key=lambda r: abs((r.gain or 0) - 1), default=None)
        what = "what was kept along the wanted change is not all of it, the noise of rounding is too large (worst gain"
    else:
        bad = [r for r in wanted if (r.cosine or 0) < min_cosine]
        worst = min(bad, key=lambda r: r.cosine or 0, default=None)
        what = f"the kept change has a cosine under {min_cosine:g} with the wanted one (worst"
    if worst is None:
        return [], ""
    number = worst.gain if report.rounding == "stochastic" else worst.cosine
    return bad, f"in {len(bad)} of {len(report.layers)} layers {what} {number:.2f}, {worst.name})"


def gate(job: Job, place: Path, min_cosine: float, judge: Judge, check: bool = False, force: bool = False) -> None:
    """Judge the model at `place` where a layer lost much of its change, or where the user asked (`check`); fill the report.

    Raises:
        MergeRefused: its behavior is not the unmerged model's; or it cannot be judged, and a layer lost much. Never with `force`.
    """
    report = job.report
    bad, why = lossy(report, min_cosine)
    if check or (bad and not force):
        report.check = judge(job, place)
    found = report.check
    report.lossy = why or None
    lost = found.lost if found is not None and found.conclusive else why
    if lost and not force:
        raise MergeRefused(_refusal(report, "; ".join(dict.fromkeys(filter(None, (lost, why))))), report)


def _refusal(report: MergeReport, why: str) -> str:
    other = (
        "" if report.rounding == "stochastic" else "--rounding stochastic (keeps the change in the mean, adds noise); "
    )
    return (
        f"Merging as {report.dtype} would lose the adapter: {why}; nothing was written.\n{report.table()}\nWays out: --dtype "
        f"float32; a larger --scale; {other}merging into the base as it is after quantization (--onto, see docs/merge.md); serving the "
        "adapter unmerged on the base; or --force, which writes it as it is."
    )
