"""The numbers of a record, measured again: means, bounds on people, the wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluation import suites
from ..evaluation.plan import Progress
from ..evaluation.score import Report, score
from ..evaluation.subjects import (
    embedded_retain_model,
    loaded_retain_model,
    named_retain_model,
    stack_of,
    subjects_on,
    suite_of,
)
from ..folder.read import AdapterFolder
from ..reporting.verdict import Evidence
from . import statements as st
from .claims import Audit
from .record import rows_of
from .statistics import leak_bound, relative_test

TOLERANCE = 0.01
"""How far a mean of a few hundred rows may lie from the signed one: other kernels flip the odd greedy token."""


def numbers(found: AdapterFolder, told: Mapping[str, Any], run: Any, progress: Progress | None, out: Audit) -> None:
    """Measure the suite again and compare: the signed means, the bounds on people, the wording."""
    bounds = [a["conditions"] for a in told[st.SCAI]["attributes"] if "conditions" in a]
    stored = st.evidence_of(found)
    again = _measured(found, stored, run, progress, out) if run is not None else None
    if again is None:
        _unmeasured(bounds, stored, out)
        return
    report = again
    _means(stored, report, out)
    for b in bounds:
        rows = report.per_row["adapter"].get(f"{b['set']}/{b['metric']}")
        name = f"leak, {b['set']}, {b['precision']}"
        if rows is None or b["precision"] != report.dtype or not rows.size == b["rows"] == len(report.rows[b["set"]]):
            out.add(name, None, f"at most {b['upper']:.1%} of people ({b['decoding']}, alpha {b['alpha']:.2g})")
            continue
        seen = leak_bound(rows.tolist(), st.people_in(report.rows[b["set"]]), b["alpha"])
        out.add(name, seen.upper <= b["upper"] + 1e-9, f"{seen.leaked} of {seen.subjects} people leak here, so at most {seen.upper:.1%}; "
                f"signed {b['upper']:.1%}")  # fmt: skip
    _attacks(stored, out)
    subjects = {**(stored.evaluation.get("subjects") or {}), **{s: v for s, v in report.subjects.items() if v}}
    level = st.wording(Evidence("", "", evaluation={"subjects": subjects}))
    if out.relative is not None and level == st.SUPPRESSED and out.relative.p <= told[st.ERASURE]["alpha"]:
        level = st.CLOSER
    order = [st.NOT_SHOWN, st.IN_PART, st.SUPPRESSED, st.CLOSER]
    fits = out.wording in order and order.index(level) >= order.index(out.wording)
    out.add("wording", fits, f"signed {out.wording}, measured here {level}")


def _unmeasured(bounds: Sequence[Mapping[str, Any]], stored: Evidence, out: Audit) -> None:
    out.add("numbers", None, "of the suite, as they stand in eval.json")
    for b in bounds:
        out.add(
            f"leak, {b['set']}, {b['precision']}",
            None,
            f"at most {b['upper']:.1%} of people ({b['decoding']}, alpha {b['alpha']:.2g})",
        )
    _attacks(stored, out)
    out.add("wording", None, out.wording)


def _attacks(stored: Evidence, out: Audit) -> None:
    if found := (stored.blocks("attacks") or {}).get("attacks"):
        out.add("attacks", None, f"{', '.join(found)}: peft-unlearn attack runs them")


def _measured(found: AdapterFolder, stored: Evidence, run: Any, progress: Progress | None, out: Audit) -> Report | None:
    """The suite again: the adapter on all of it, base and retain models on the sets that are to be forgotten."""
    base, data, retain_models = run
    notes: list[str] = []
    try:
        bundle = rows_of(found, data, notes)
        if bundle is None:
            raise UserError("; ".join(notes))
        suite = suites.load(stored.evaluation.get("suite") or suite_of(found))
        stack = stack_of({"adapter": found}, base)
    except UserError as e:
        out.add("measuring", None, str(e))
        return None
    suite = replace(suite, sets={n: replace(s, measurable_if=None) for n, s in suite.sets.items()}, whole={})
    forget = replace(suite, sets={n: s for n, s in suite.sets.items() if s.role == "forget"})
    subjects = subjects_on(stack, ["adapter"])
    retain = {}
    for i, name in enumerate(retain_models):
        if not isinstance(given := named_retain_model(name), Path):
            raise UserError(
                f"--retain-model {name}: is an adapter; the test takes models that were trained without the forget set."
            )
        retain[f"retain {i}"] = loaded_retain_model(given, stack.tokenizer, stack.dtype)
    own = None if retain else embedded_retain_model(found.manifest.base.ref, bundle, stack.dtype)
    others = {"base": subjects["base"], **retain, **({"retain_only": own} if own else {})}
    report = score({"adapter": subjects["adapter"]}, suite, bundle, stack.tokenizer, progress, brief=True)
    beside = score(others, forget, bundle, stack.tokenizer, progress, brief=True)
    report.subjects |= beside.subjects
    report.per_row |= beside.per_row
    report.dtype = stack.dtype
    if retain:
        _relative(report, list(retain), out)
    return report


def _relative(report: Report, retain: list[str], out: Audit) -> None:
    try:
        u, b, *others = (features(report, s) for s in ("adapter", "base", *retain))
        found = relative_test(u, b, others)
    except ValueError as e:
        out.add("nearer to retain models", None, f"cannot be tested: {e}")
        return
    out.relative = found
    ends = [f"{min(d):.3g} to {max(d):.3g}" for d in (found.to_retain, found.spread)]
    out.add(
        "nearer to retain models",
        True if found.p <= 0.05 else None,
        f"squared MMD to the base {found.to_base:.3g}, to {len(retain)} retain models {ends[0]}, among these {ends[1]}; p = {found.p:.3g}",
    )


def features(report: Report, subject: str) -> np.ndarray:
    """(rows, features) of one subject on the sets that are to be forgotten: log-probability and extraction strength of each row."""
    rows = report.per_row[subject]
    names = [
        k for k in rows if k.startswith("forget") and k.rpartition("/")[2] in ("probability", "extraction_strength")
    ]
    if not names:
        raise ValueError("the suite measures neither probability nor extraction strength")
    n = min(rows[k].size for k in names)
    columns = [np.log(np.clip(rows[k][:n], 1e-12, 1)) if k.endswith("probability") else rows[k][:n] for k in names]
    return np.stack(columns, 1)


def _means(stored: Evidence, report: Report, out: Audit) -> None:
    odd, n = [], 0
    for key, rows in report.per_row["adapter"].items():
        signed = stored.value("adapter", key)
        if signed is None:
            continue
        n += 1
        if abs(signed - float(np.nanmean(rows))) > max(TOLERANCE, 2 / rows.size):
            odd.append(f"{key} {signed:.4g}, here {float(np.nanmean(rows)):.4g}")
    if n == 0:
        out.add("numbers", None, "eval.json holds none that was measured here")
        return
    out.add(
        "numbers",
        not odd,
        f"{n} means of the suite are within {TOLERANCE:g} of the signed ones" if not odd else "; ".join(odd[:3]),
    )
