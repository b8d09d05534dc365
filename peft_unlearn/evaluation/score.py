"""`score`: the numbers of several subjects on one suite, in the shape of eval.json.

A number that cannot be had is null with a reason, never 0 and never NaN. Texts stay in memory: the JSON holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..folder.versions import installed_versions
from ..registry import Method, get
from . import suites
from .measured import Array, Estimate, Unmeasured, bootstrap_ci
from .plan import Measured, Plan, SetPlan, feed, make_plan, measure
from .provider import Context, Progress, inputs_of
from .suites import Suite

FORMAT = 1
Subject = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Number:
    """One value with what stands beside it. rows: (n,) the values it is the mean of, None for a metric of a whole
    set."""

    value: float | None
    n: int
    ci95: tuple[float, float] | None = None
    reason: str | None = None
    rows: Array | None = None

    def detail(self) -> dict[str, Any]:
        return {"n": self.n, "ci95": None if self.ci95 is None else list(self.ci95), "reason": self.reason}


class Report(dict[str, Any]):
    """eval.json as a dict, and beside it, in memory only, what reports want to show.

    per_row: subject -> key -> (n,) values, for every key that is a mean over rows.   rows: set -> the rows evaluated
    (texts).   log_ratio: subject -> set -> (rows with wrong answers,) log truth ratio.
    said: subject -> set -> greedy answers, for sets that some metric generates for.
    """

    per_row: dict[str, dict[str, Array]]
    rows: dict[str, list[dict[str, Any]]]
    said: dict[str, dict[str, list[str]]]
    log_ratio: dict[str, dict[str, Array]]


def score(
    subjects: Mapping[str, Subject | None],
    suite: str | Path | Mapping[str, Any] | Suite,
    data: Any,
    tokenizer: Any,
    progress: Progress | None = None,
    n: int | None = None,
    *,
    adapter_id: str | None = None,
    base: str | None = None,
    template: str | None = None,
    token_budget: int = 4096,
) -> Report:
    """Evaluate subjects on a suite.

    Args:
        subjects: name -> a function that returns a context manager, inside which the model it yields *is* that subject
            (`on_one_model` makes them for adapters of one loaded model). None: the subject is not there; its block
            is null. They are run one after the other, in order. "base" is what gates look at, the suite's
            `reference` the gold standard.
        suite: name, YAML file, mapping or Suite.
        data: a `ForgetRetain`, or a mapping of set name to rows.
        tokenizer: of all subjects.
        progress: called as progress(what, done, total).
        n: at most so many rows of each set, evenly spaced; default all.
        adapter_id, base: written into the result as they are.
        template: wording of question/answer rows; default the data's own.
        token_budget: padded tokens in a batch.

    Returns:
        A `Report`: JSON-ready dict of design.md section 5. Keys are ``set/metric``, or the metric alone where it
        covers the suite.

    Raises:
        UserError: no subjects, a malformed suite, or a row that has no target.
    """
    suite = suites.load(suite)
    if not any(subject is not None for subject in subjects.values()):
        raise UserError("there is no model to evaluate")
    plan = make_plan(suite, data, tokenizer, n, template)
    measured: dict[str, Measured] = {}
    cache: dict[Any, Any] = {}
    for name, subject in subjects.items():
        if subject is not None:
            tell = None if progress is None else _named(progress, name)
            with subject() as model:
                own: Subject | None = partial(nullcontext, model) if name == "base" else subjects.get("base")
                context = Context(name, own, {}, suite.settings, tell, token_budget, cache)
                measured[name] = measure(model, plan, tell, token_budget, context)

    reference, own_base = measured.get(suite.reference), measured.get("base")
    numbers = {name: numbers_of(plan, m, reference, base=own_base) for name, m in measured.items()}
    _apply_gates(plan, numbers)
    for name in _reference_first(numbers, suite.reference):
        numbers[name].update(_whole(suite, numbers[name], numbers.get(suite.reference), numbers.get("base")))

    absent = [name for name, subject in subjects.items() if subject is None]
    if suite.reference not in subjects:
        absent.append(suite.reference)
    used = sorted({m for s in suite.sets.values() for m in s.metrics} | set(suite.whole))
    report = Report(
        format=FORMAT,
        suite=suite.name,
        subjects={
            **{s: {key: number.value for key, number in found.items()} for s, found in numbers.items()},
            **dict.fromkeys(absent),
        },
        details={
            **{s: {key: number.detail() for key, number in found.items()} for s, found in numbers.items()},
            **{s: {"reason": "this model was not given"} for s in absent},
        },
        metrics={m: _describe(get("metric", m)) for m in used},
        adapter_id=adapter_id,
        base=base,
        versions=installed_versions(),
    )
    report.per_row = {s: {k: v.rows for k, v in found.items() if v.rows is not None} for s, found in numbers.items()}
    report.log_ratio = {
        subject: {
            name: feed("log_ratio", s, m, s.chosen, None)
            for name, s in plan.sets.items()
            if s.right and name not in m.too_long
        }
        for subject, m in measured.items()
    }
    report.rows = {name: s.rows for name, s in plan.sets.items()}
    report.said = {
        subject: {
            name: [m.said[ask] for ask in s.asks]
            for name, s in plan.sets.items()
            if s.generates and "generation" not in s.missing and name not in m.too_long
        }
        for subject, m in measured.items()
    }
    return report


def numbers_of(
    plan: Plan, m: Measured, reference: Measured | None, ci: bool = True, base: Measured | None = None
) -> dict[str, Number]:
    """Every set/metric of one subject, before gates and before metrics over metrics."""
    return {
        f"{name}/{metric}": _number(get("metric", metric), s, m, reference, ci, base, plan.suite.settings)
        for name, s in plan.sets.items()
        for metric in s.spec.metrics
    }


def _number(
    method: Method,
    s: SetPlan,
    m: Measured,
    reference: Measured | None,
    ci: bool,
    base: Measured | None,
    settings: Mapping[str, Mapping[str, Any]],
) -> Number:
    if not s.rows:
        return Number(None, 0, reason=s.absent or f"the data has no set {s.spec.source!r}")
    select = s.rows_of(method.needs)
    n = len(select) or len(s.rows)  # without wrong answers none is selected
    try:
        inputs = (feed(name, s, m, select, reference, base) for name in inputs_of(method))
        result = method.fn(*inputs, **settings.get(method.name, {}))
    except Unmeasured as why:
        return Number(None, n, reason=str(why))
    if isinstance(result, Estimate):
        if not np.isfinite(result.value):
            return Number(None, result.n or n, reason=f"the value is {result.value}")
        return Number(float(result.value), result.n or n, result.ci95 if ci else None)
    if not isinstance(result, np.ndarray):
        return Number(float(result), n) if np.isfinite(result) else Number(None, n, reason=f"the value is {result}")
    # A model whose logits are NaN says nothing at all, which would count as having forgotten
    broken = np.isnan(m.mean_logp[[s.answer[i] for i in select]])
    rows = np.where(broken, np.nan, result)
    bad = int(np.sum(~np.isfinite(rows)))
    if bad:
        why = "the model's logits are NaN there" if broken.any() else "the metric is not defined there"
        return Number(None, n, reason=f"{bad} of {n} rows have no value: {why}", rows=rows)
    return Number(float(rows.mean()), n, bootstrap_ci(rows) if ci else None, rows=rows)


def _apply_gates(plan: Plan, numbers: dict[str, dict[str, Number]]) -> None:
    """Turn rows that cannot be measured into nulls, in place; the gate's own subject keeps its numbers as the
    evidence."""
    for name, s in plan.sets.items():
        gate = s.spec.measurable_if
        if gate is None:
            continue
        seen = numbers.get(gate.subject, {}).get(f"{name}/{gate.metric}")
        if seen is None:
            reason = (
                f"not measurable: needs {gate.subject}/{gate.metric} on this set, and {gate.subject} was not evaluated"
            )
        elif seen.value is None:
            reason = f"not measurable: {gate.subject} has no {gate.metric} here: {seen.reason}"
        elif seen.value < gate.at_least:
            reason = (
                f"not measurable: {gate.metric} of {gate.subject} is {seen.value:.3f} here, under {gate.at_least:g}"
            )
        else:
            continue
        for subject, found in numbers.items():
            if subject != gate.subject:
                found.update(
                    {
                        key: Number(None, number.n, reason=reason if s.rows else number.reason)
                        for key, number in found.items()
                        if key.startswith(f"{name}/")
                    }
                )


def _reference_first(numbers: Mapping[str, Any], reference: str) -> list[str]:
    """Metrics over metrics may compare with the base's and the reference's: these come first."""
    return sorted(numbers, key=lambda name: (name != "base") + (name not in ("base", reference)))


def _whole(
    suite: Suite,
    found: Mapping[str, Number],
    reference: Mapping[str, Number] | None = None,
    base: Mapping[str, Number] | None = None,
) -> dict[str, Number]:
    """Metrics over other metrics, such as model utility; one may be part of a later one."""
    out: dict[str, Number] = {}
    for metric, keys in suite.whole.items():
        method = get("metric", metric)
        try:
            values = []
            for name in inputs_of(method):
                if name == "parts":
                    values.append(_parts(keys, {**found, **out}))
                else:
                    whose = "the base" if name == "base_parts" else "the retain-only model"
                    their = base if name == "base_parts" else reference
                    if their is None:
                        raise Unmeasured(f"there is no {whose.removeprefix('the ')} to compare with")
                    values.append(_parts(keys, {**their, **(out if their is found else {})}, f" of {whose}"))
            out[metric] = Number(float(method.fn(*values, **suite.settings.get(metric, {}))), len(keys))
        except Unmeasured as why:
            out[metric] = Number(None, len(keys), reason=str(why))
    return out


def _parts(keys: Sequence[str], found: Mapping[str, Number], whose: str = "") -> dict[str, float]:
    parts: dict[str, float] = {}
    for key in keys:
        number = found[key]
        if number.value is None:
            raise Unmeasured(f"its part {key}{whose} has no value: {number.reason}")
        parts[key] = number.value
    return parts


def _describe(method: Method) -> dict[str, Any]:
    return {key: method.extra[key] for key in ("better", "reference", "version")}


def _named(progress: Progress, name: str) -> Progress:
    return lambda what, done, total: progress(f"{name}: {what}", done, total)


def on_one_model(model: Any, adapters: Mapping[str, str | Sequence[str] | None]) -> dict[str, Subject]:
    """Subjects that are adapters of one loaded `PeftModel`, swapped in place.

    adapters: subject -> adapter name, several names (active together), or None = the base, all adapters off. Afterwards the same adapters
    are active and the same parameters trainable as before.
    """
    return {subject: partial(_swapped, model, which) for subject, which in adapters.items()}


@contextmanager
def _swapped(model: Any, adapters: str | Sequence[str] | None) -> Iterator[Any]:
    trainable = [(p, p.requires_grad) for p in model.parameters()]  # PEFT makes trainable whatever it switches on
    prompt_learning = model.active_peft_config.is_prompt_learning
    active = model.active_adapter if prompt_learning else list(model.base_model.active_adapters)
    switch = model.set_adapter if prompt_learning else model.base_model.set_adapter
    try:
        if adapters is None:
            with model.disable_adapter():
                yield model
        else:
            switch(adapters if isinstance(adapters, str) else list(adapters))
            yield model
    finally:
        if adapters is not None:
            switch(active)
        for p, flag in trainable:
            p.requires_grad_(flag)
