"""`merge` with the merged model judged by the suite of its adapters, where their data are at hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.bundle import ForgetRetain
from ..data.collate import pad, padding_id
from ..errors import UserError
from ..evaluation import suites
from ..evaluation.numbers import Number, numbers_of
from ..evaluation.plan import make_plan, measure
from ..evaluation.subjects import bundle_of, check_data, matches, suite_of
from ..folder.base import load_base
from ..folder.device import placed
from ..folder.dtype import fast_dtype
from ..folder.quantized import name_of, options_of, trained_on
from ..folder.read import AdapterFolder
from ..forward import Pass
from ..merging.checks import ProbeCheck, SuiteCheck, SuiteNumber
from ..merging.gate import by_probes
from ..merging.merge import given
from ..merging.merge import merge as written
from ..merging.report import Job, MergeReport
from ..registry import get
from ..stack.model import ForgetModel
from ..stack.names import Adapters

WORSE = 0.05
"""By how much a number of the merged model may be worse than the unmerged one's; one row where a set has fewer than twenty."""
Progress = Callable[[str, int, int], None]


def merge(
    adapters: Adapters, base_dir: str | Path | None = None, out: str | Path = "", *args: Any, data: str | None = None,
    suite: str | None = None, progress: Progress | None = None, **settings: Any,
) -> MergeReport:  # fmt: skip
    """Write base + adapters as a plain model, see `merging.merge.merge`; where a layer lost much of its change, or with ``check=True``,
    the merged model is judged before it appears.

    Judged by the quick sets and metrics of the suite, where the rows that an adapter was trained on are at hand, else by the probe prompts.

    Args:
        data: the forget and retain rows of the (first) adapter; default those that its recipe names.
        suite: default the recipe's own.
        args, settings: of `merging.merge.merge`.

    Raises:
        MergeRefused: the merged model does not behave as the unmerged one, and there is no ``force=True``.
        UserError: as `merging.merge.merge`, and for data of another forget set.
    """
    judge = partial(by_suite, data=data, suite=suite, progress=progress)
    report = written(adapters, base_dir, out, *args, judge=judge, progress=progress, **settings)
    report.losses = _losses(adapters, base_dir, out, report.scale, data)
    return report


def _losses(
    adapters: Adapters, base_dir: Any, out: str | Path, scale: Any, data: str | None
) -> dict[str, dict[str, float]] | None:
    """Nats per target token of the adapters' sets on the quantized base that they were trained on, and of the merged model; None for
    adapters of other bases, and where no rows are at hand."""
    folders, scales = given(adapters, scale)
    held = [trained_on(f.manifest.method) for f in folders.values()]
    if None in held or any(h != held[0] for h in held):
        return None
    try:
        bundle = _rows(next(iter(folders.values())), data)
    except UserError:
        if data is not None:
            raise
        return None
    stack = ForgetModel.from_pretrained(base_dir, {n: f.path for n, f in folders.items()}, scales, "auto")
    tokenizer, name, targets = (
        stack.tokenizer,
        name_of(options_of(stack.model)),
        next(iter(folders.values())).manifest.targets,
    )
    found = {f"unmerged, on the base in {name}": _loss(stack.model, bundle, tokenizer)}
    del stack
    found["merged"] = _loss(placed(load_base(out, fits=targets)), bundle, tokenizer)
    return found


@torch.no_grad()
def _loss(model: Any, bundle: ForgetRetain, tokenizer: Any, size: int = 16) -> dict[str, float]:
    """Forget and retain set: nats per target token."""
    out, pad_id, device = {}, padding_id(tokenizer), next(model.parameters()).device
    for name in (n for n in ("forget", "retain") if bundle.rows(n)):
        rows = sorted(bundle.encode(name, tokenizer), key=lambda r: len(r["input_ids"]))
        values = []
        for at in range(0, len(rows), size):
            batch = {k: v.to(device) for k, v in pad(rows[at : at + size], pad_id).items()}
            p = Pass(model, batch)
            values.append(p.logp.double().cpu())
        out[name] = -float(torch.cat(values).mean())
    return out


def by_suite(
    job: Job, place: Path, data: str | None = None, suite: str | None = None, progress: Progress | None = None
) -> ProbeCheck | SuiteCheck | None:
    """The quick numbers of merged and unmerged model on the rows of every adapter whose rows are at hand; else `by_probes`."""
    if job.expected is None:
        return None
    bundles: dict[str, ForgetRetain] = {}
    why = "no rows are at hand"
    for name, folder in job.folders.items():
        try:
            bundles[name] = _rows(folder, data if not bundles else None)
        except UserError as problem:
            if data is not None and not bundles:
                raise
            why = f"the rows are not at hand: {problem}"
    if not bundles:
        return by_probes(job, place, why)
    dtype = fast_dtype(job.base_path)
    paths = {n: f.path for n, f in job.folders.items()}
    stack = ForgetModel.from_pretrained(job.base_path, paths, job.scales, dtype)
    chosen = {n: suites.load(suite or suite_of(job.folders[n])) for n in bundles}
    plans = {n: make_plan(s.quick(), bundles[n], stack.tokenizer, s.quick_rows, brief=True) for n, s in chosen.items()}
    before = {
        n: numbers_of(p, measure(stack.model, p, _named(progress, "unmerged")), None, ci=False)
        for n, p in plans.items()
    }
    del stack
    model = placed(load_base(place, dtype, job.targets))
    after = {n: numbers_of(p, measure(model, p, _named(progress, "merged")), None, ci=False) for n, p in plans.items()}
    found = SuiteCheck(", ".join(dict.fromkeys(s.name for s in chosen.values())), dtype)
    for n, plan in plans.items():
        label = f"{n}: " if len(plans) > 1 else ""
        for key, a in before[n].items():
            role = plan.sets[key.partition("/")[0]].spec.role
            if (number := _compared(label + key, role, a, after[n][key])) is not None:
                found.numbers.append(number)
    return found if found.conclusive else by_probes(job, place, "the suite gives no number on these rows")


def _compared(key: str, role: str, unmerged: Number, merged: Number) -> SuiteNumber | None:
    better = get("metric", key.rpartition("/")[2]).extra["better"].get(role)
    if unmerged.value is None or better not in ("lower", "higher"):
        return None
    worse = 1.0  # where the merged model has no number, its logits are NaN
    if merged.value is not None:
        worse = merged.value - unmerged.value if better == "lower" else unmerged.value - merged.value
    return SuiteNumber(key, unmerged.value, merged.value, worse, max(WORSE, 1 / max(1, unmerged.n)) + 1e-9, unmerged.n)


def _rows(folder: AdapterFolder, data: str | None) -> ForgetRetain:
    """The rows of an adapter's training. Raises `UserError` where they are not there, or are others."""
    bundle = bundle_of(folder, data)
    if data is not None or matches(bundle, folder.manifest) is False:
        check_data(bundle, folder.manifest)
    return bundle


def _named(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda what, done, total: progress(f"{name}: {what}", done, total)
