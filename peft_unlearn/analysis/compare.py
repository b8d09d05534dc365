"""Adapters side by side: as trained, and at equal retention, where their numbers may be compared.

An adapter that forgets more because it breaks more is no better one. Each is set to the scale that forgets most and keeps the
same share of the base's retain value (`search.search`); then all are scored on the same rows and ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from ..evaluation import suites
from ..evaluation.measured import bootstrap_ci
from ..evaluation.plan import Progress
from ..evaluation.score import Report, Subject, score
from ..evaluation.shapes import Suite
from ..evaluation.subjects import bundle_for, embedded_retain_model, named_folders, suite_of
from ..folder.read import AdapterFolder
from ..reporting import compare as shown
from ..reporting.compare import LEVEL
from ..reporting.document import Part
from ..reporting.result import Result, fields_of
from ..stack.model import ForgetModel
from .calibrate import METRIC, at_scale, check_exact, levels_of, make_read
from .search import FLOOR, Calibration, Levels, search

FORMAT = 1
HEADLINE = (
    "forget/extraction_strength", "forget/value_accuracy", "forget/probability", "forget/forget_quality",
    "forget/ks_distance", "retain/extraction_strength", "retain/value_accuracy", "model_utility",
)  # fmt: skip


@dataclass
class Comparison(Result):
    """Adapters at equal retention.

    keys: the numbers shown.   base_levels: what retention is a share of.   ranking: names by forget value at equal retention, best
    first.   behind: how much more the others leave than the best.   cannot: name -> why no scale of it will do.   report: the
    evaluation of all subjects; an adapter at its scale is called ``name at the floor``.   retain_model: its levels.
    adapter_ids: name -> id.   base, data: what was judged.
    """

    metric: str
    floor: float
    max_scale: float
    keys: list[str]
    base_levels: Levels
    calibration: dict[str, Calibration]
    ranking: list[str]
    behind: dict[str, dict[str, Any]]
    cannot: dict[str, str | None]
    retain_model: dict[str, Any] | None
    report: Report
    adapter_ids: dict[str, str]
    base: str
    data: dict[str, str | None]
    title = "Forget adapters at equal retention"

    @property
    def exit_code(self) -> int:
        return 0 if self.ranking else 1

    def to_dict(self) -> dict[str, Any]:
        n = {"forget": self.base_levels.forget.n, "retain": self.base_levels.retain.n}
        return {"format": FORMAT, **fields_of(self, retain_model="retain_only"), "n": n}

    def __str__(self) -> str:
        return shown.text(self.to_dict())

    def parts(self) -> list[Part]:
        return shown.parts(self.to_dict())


def compare(
    folders: Sequence[str | Path], *, retain_floor: float = FLOOR, max_scale: float = 1.0, metric: str = METRIC,
    suite: str | None = None, n: int | None = None, base: str | None = None, data: str | None = None, dtype: str = "auto",
    progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """All adapters on one loaded base, each at the scale that keeps `retain_floor` of the base's retain value. Writes nothing.

    dtype: what the models are computed in, see `ForgetModel`.

    Raises:
        UserError: adapters of different forget sets or bases, and those whose scale is not the exact mix of two models.
    """
    found = named_folders(folders)
    first = next(iter(found.values()))
    judged, keys = headline(suites.load(suite or suite_of(first)))
    _check_comparable(found)
    bundle = bundle_for([first], data)
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()}, dtype=dtype)
    read = make_read(bundle, stack.tokenizer, metric, n)
    levels = levels_of(stack.disabled, read)
    calibration = {
        name: search(read, at_scale(stack, name), levels, retain_floor, max_scale, _about(progress, name))
        for name in found
    }
    retain_model = embedded_retain_model(first.manifest.base.ref, bundle, stack.dtype)
    subjects = _subjects(stack, calibration, judged, retain_model)
    report = score(subjects, judged, bundle, stack.tokenizer, progress=progress, n=n, brief=True)
    report.dtype = stack.dtype
    for name, result in calibration.items():  # at scale 1 the two are one model, read once
        if result.chosen is not None and result.chosen.scale == 1.0:
            report.subjects[name + LEVEL], report.details[name + LEVEL] = report.subjects[name], report.details[name]
    held = {name: r for name, r in calibration.items() if r.chosen is not None}
    ranking = sorted(held, key=lambda name: _rank(held[name]))
    return Comparison(
        metric=metric, floor=retain_floor, max_scale=max_scale, keys=keys, base_levels=levels, calibration=calibration,
        ranking=ranking, behind={name: _behind(held[ranking[0]], held[name]) for name in ranking[1:]},
        cannot={name: r.reason for name, r in calibration.items() if r.chosen is None},
        retain_model=None if retain_model is None else _levels(report, judged.reference, metric), report=report,
        adapter_ids={name: f.adapter_id for name, f in found.items()}, base=first.manifest.base.ref,
        data={"forget": bundle.sha256["forget"], "ref": bundle.refs.get("forget")},
    )  # fmt: skip


def headline(suite: Suite) -> tuple[Suite, list[str]]:
    """The suite cut to what a comparison shows (`HEADLINE`, or all of a suite that has none of it), and those keys."""
    wanted = {f"{s.name}/{m}" for s in suite.sets.values() for m in s.metrics} | set(suite.whole)
    keys = [k for k in HEADLINE if k in wanted]
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


def _check_comparable(found: Mapping[str, AdapterFolder]) -> None:
    errors = Errors()
    for folder in found.values():
        try:
            check_exact(folder)
        except UserError as problem:
            errors.absorb(problem)
    errors.raise_if_any("compare")
    check_same_sets(
        {name: str(f.manifest.data.get("forget", {}).get("sha256", "not stated")) for name, f in found.items()}
    )


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


def _subjects(
    stack: ForgetModel, calibration: Mapping[str, Calibration], suite: Suite, retain_model: Subject | None
) -> dict[str, Subject | None]:
    """Base, every adapter as trained and at its scale, and the retain model."""
    out: dict[str, Subject | None] = {"base": stack.disabled}
    for name, result in calibration.items():
        out[name] = partial(at_scale(stack, name), 1.0)
        if result.chosen is not None and result.chosen.scale != 1.0:
            out[name + LEVEL] = partial(at_scale(stack, name), result.chosen.scale)
    return {**out, suite.reference: retain_model}


def _rank(result: Calibration) -> tuple[float, float]:
    """Lowest forget value first; of equals, the one that keeps more."""
    levels = result.chosen.levels if result.chosen is not None else result.curve[0].levels
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
    values, details = report.subjects.get(subject) or {}, report.details.get(subject) or {}
    keys = {side: f"{side}/{metric}" for side in ("forget", "retain")}
    if any(values.get(k) is None for k in keys.values()):
        return None
    return {side: {"value": values[k], **details[k]} for side, k in keys.items()}


def _about(progress: Progress | None, name: str) -> Progress | None:
    return None if progress is None else lambda what, done, total: progress(f"{name}: {what}", done, total)
