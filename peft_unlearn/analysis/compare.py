"""Adapters side by side: as trained, and at equal retention, where their numbers may be compared.

An adapter that forgets more because it breaks more is no better one. Each is dialed to the scale that forgets most and keeps the
same share of the base's retain value (`calibrate.search`); then all are scored on the same rows and ranked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation import suites
from ..evaluation.measured import bootstrap_ci
from ..evaluation.plan import Progress
from ..evaluation.score import Report, Subject, score
from ..evaluation.suites import Suite
from .calibrate import FLOOR, METRIC, Calibration, Levels, dialed, make_read, search

if TYPE_CHECKING:
    from ..stack.model import ForgetModel

FORMAT = 1
HEADLINE = (
    "forget/extraction_strength", "forget/value_accuracy", "forget/probability", "forget/forget_quality",
    "forget/ks_distance", "retain/extraction_strength", "retain/value_accuracy", "model_utility",
)  # fmt: skip
LEVEL = " at the floor"  # a subject's name once it is dialed


def headline(suite: Suite) -> tuple[Suite, list[str]]:
    """The suite cut to what a comparison shows (`HEADLINE`, or all of a suite that has none of it), and those keys."""
    keys = [k for k in HEADLINE if k in suite.whole or _asked(suite, k)]
    if not any("/" in k for k in keys):
        return suite, [f"{s.name}/{m}" for s in suite.sets.values() for m in s.metrics] + list(suite.whole)
    needed = {*keys, *(part for k in keys for part in suite.whole.get(k, ()))}
    sets = {
        name: replace(s, metrics=kept)
        for name, s in suite.sets.items()
        if (kept := tuple(m for m in s.metrics if f"{name}/{m}" in needed))
    }
    whole = {k: v for k, v in suite.whole.items() if k in keys}
    return replace(suite, sets=sets, whole=whole), keys


def _asked(suite: Suite, key: str) -> bool:
    name, _, metric = key.partition("/")
    return name in suite.sets and metric in suite.sets[name].metrics


def compare(
    stack: ForgetModel,
    data: Any,
    suite: str | Suite = "people",
    *,
    retain_model: Subject | None = None,
    floor: float = FLOOR,
    max_scale: float = 1.0,
    metric: str = METRIC,
    n: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Report]:
    """Calibrate every adapter of `stack`, then score base, adapters as trained, adapters at the floor and the retain-only model.

    twin: the retain-only model as a subject, None where there is none.   n: at most so many rows of each set.
    Returns the comparison, JSON-ready (``ranking``: names by forget value at equal retention, best first; ``behind``: how much
    more the others leave than the best; ``cannot``: name ->
    why no scale of it will do; ``calibration``: name -> `Calibration` as JSON; ``report``: eval.json of all subjects), and the
    `Report` itself.
    """
    read = make_read(data, stack.tokenizer, metric, n)
    with stack.disabled() as model:
        base = read(model)
    found: dict[str, Calibration] = {}
    for name in stack.adapters:
        tell = None if progress is None else partial(_about, progress, name)
        found[name] = search(read, dialed(stack, name), base, floor, max_scale, tell)
    cut, keys = headline(suites.load(suite))
    subjects: dict[str, Subject | None] = {"base": stack.disabled}
    for name, result in found.items():
        subjects[name] = partial(dialed(stack, name), 1.0)
        if result.chosen is not None and result.chosen.scale != 1.0:
            subjects[name + LEVEL] = partial(dialed(stack, name), result.chosen.scale)
    subjects[cut.reference] = retain_model
    report = score(subjects, cut, data, stack.tokenizer, progress=progress, n=n)
    for name, result in found.items():  # at scale 1 the two are one model, read once
        if result.chosen is not None and result.chosen.scale == 1.0:
            for part in ("subjects", "details"):
                report[part][name + LEVEL] = report[part][name]
            report.per_row[name + LEVEL] = report.per_row[name]
            report.said[name + LEVEL] = report.said[name]
    held = {name: r for name, r in found.items() if r.chosen is not None}
    ranking = sorted(held, key=lambda name: _rank(held[name]))
    return {
        "format": FORMAT,
        "metric": metric,
        "floor": floor,
        "max_scale": max_scale,
        "keys": keys,
        "base_levels": base.as_json(),
        "ranking": ranking,
        "behind": {name: _behind(held[ranking[0]], held[name]) for name in ranking[1:]},
        "cannot": {name: r.reason for name, r in found.items() if r.chosen is None},
        "calibration": {name: r.as_json() for name, r in found.items()},
        "retain_only": None if retain_model is None else _levels(report, cut.reference, metric),
        "report": dict(report),
        "n": {"forget": base.forget.n, "retain": base.retain.n},
    }, report


def _rank(result: Calibration) -> tuple[float, float]:
    """Lowest forget value first; of equals, the one that keeps more."""
    levels: Levels = result.chosen.levels if result.chosen is not None else result.curve[0].levels
    return levels.forget.value or 0.0, -(levels.retain.value or 0.0)


def _behind(best: Calibration, other: Calibration) -> dict[str, Any]:
    """How much more the other leaves of the forget set than the best; the interval is over the differences row by row."""
    a, b = (r.chosen.levels.forget.rows if r.chosen is not None else None for r in (best, other))
    if a is None or b is None:
        return {"value": None, "ci95": None, "n": 0, "reason": "there are no values row by row"}
    ci = bootstrap_ci(b - a)
    return {"value": float((b - a).mean()), "ci95": None if ci is None else list(ci), "n": len(a), "reason": None}


def _levels(report: Report, subject: str, metric: str) -> dict[str, Any] | None:
    """The metric on both sets as the suite measured it, for the picture."""
    values, details = report["subjects"].get(subject) or {}, report["details"].get(subject) or {}
    keys = {side: f"{side}/{metric}" for side in ("forget", "retain")}
    if any(values.get(k) is None for k in keys.values()):
        return None
    return {side: {"value": values[k], **details[k]} for side, k in keys.items()}


def _about(progress: Progress, name: str, what: str, done: int, total: int) -> None:
    progress(f"{name}: {what}", done, total)


def check_same_sets(sets: Mapping[str, str]) -> None:
    """Refuse adapters with different forget sets. sets: name -> sha256 of the forget set it was trained on."""
    kinds: dict[str, list[str]] = {}
    for name, sha in sets.items():
        kinds.setdefault(sha, []).append(name)
    if len(kinds) > 1:
        listed = "; ".join(f"{', '.join(names)}: {sha[:12]}" for sha, names in kinds.items())
        raise UserError(
            f"these adapters forget different sets (sha256 {listed}), so there is no common number to rank them by. "
            "Compare those of one set; `peft-unlearn interference` judges several sets together."
        )
