"""From what models answered to numbers: a metric's value with its interval, or null with the reason; never 0 or NaN for what has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..registry import Method, get
from .feed import Reading, feed
from .measured import Array, Estimate, Unmeasured, bootstrap_ci
from .shapes import Gate, Measured, Plan, Suite


@dataclass(frozen=True)
class Number:
    """One value with what stands beside it. rows: (n,) the values it is the mean of, None for a metric of a whole
    set."""

    value: float | None
    n: int
    ci95: tuple[float, float] | None = None
    reason: str | None = None
    rows: Array | None = None

    def to_dict(self) -> dict[str, Any]:
        """What stands beside the value in eval.json."""
        return {"n": self.n, "ci95": None if self.ci95 is None else list(self.ci95), "reason": self.reason}


Numbers = dict[str, Number]  # by key: ``set/metric``, or the metric alone where it covers the suite


def numbers_of(
    plan: Plan, m: Measured, reference: Measured | None, ci: bool = True, base: Measured | None = None
) -> Numbers:
    """Every set/metric of one subject, before gates and before metrics over metrics."""
    out: Numbers = {}
    for name, s in plan.sets.items():
        for method in (get("metric", metric) for metric in s.spec.metrics):
            reading = Reading(s, m, s.rows_of(method.needs), reference, base)
            out[f"{name}/{method.name}"] = _number(method, reading, plan.suite.settings.get(method.name, {}), ci)
    return out


def _number(method: Method, reading: Reading, settings: Mapping[str, Any], ci: bool) -> Number:
    s, m, select = reading.s, reading.m, reading.select
    if not s.rows:
        return Number(None, 0, reason=s.absent or f"the data has no set {s.spec.source!r}")
    n = len(select) or len(s.rows)  # without wrong answers none is selected
    try:
        result = method.fn(*(feed(name, reading) for name in method.inputs), **settings)
    except Unmeasured as why:
        return Number(None, n, reason=str(why))
    if not isinstance(result, np.ndarray):
        found = result if isinstance(result, Estimate) else Estimate(float(result))
        if not np.isfinite(found.value):
            return Number(None, found.n or n, reason=f"the value is {found.value}")
        return Number(float(found.value), found.n or n, found.ci95 if ci else None)
    # A model whose logits are NaN gives nothing away, which would count as having forgotten
    broken = np.isnan(m.mean_logp[[s.answer[i] for i in select]])
    rows = np.where(broken, np.nan, result)
    if bad := int(np.sum(~np.isfinite(rows))):
        why = "the model's logits are NaN there" if broken.any() else "the metric is not defined there"
        return Number(None, n, reason=f"{bad} of {n} rows have no value: {why}", rows=rows)
    facts = [s.rows[i].get("fact") for i in select]
    groups = None if None in facts else facts
    return Number(float(rows.mean()), n, bootstrap_ci(rows, groups=groups) if ci else None, rows=rows)


def numbers_of_all(plan: Plan, measured: Mapping[str, Measured], ci: bool = True) -> dict[str, Numbers]:
    """All numbers of every subject: gates applied, metrics over metrics added."""
    reference, base = measured.get(plan.suite.reference), measured.get("base")
    numbers = {name: numbers_of(plan, m, reference, ci, base) for name, m in measured.items()}
    for name, s in plan.sets.items():
        if s.spec.measurable_if is not None:
            _apply_gate(s.spec.measurable_if, name, numbers, has_rows=bool(s.rows))
    # metrics over metrics may compare with the base's and the reference's: these come first
    for name in sorted(numbers, key=lambda name: (name != "base") + (name not in ("base", plan.suite.reference))):
        numbers[name].update(
            whole_of(plan.suite, numbers[name], numbers.get(plan.suite.reference), numbers.get("base"))
        )
    return numbers


def _apply_gate(gate: Gate, name: str, numbers: dict[str, Numbers], has_rows: bool) -> None:
    """Turn a set that cannot be measured into nulls, in place; the gate's own subject keeps its numbers as the evidence."""
    seen = numbers.get(gate.subject, {}).get(f"{name}/{gate.metric}")
    if seen is None:
        why = f"needs {gate.subject}/{gate.metric} on this set, and {gate.subject} was not evaluated"
    elif seen.value is None:
        why = f"{gate.subject} has no {gate.metric} here: {seen.reason}"
    elif seen.value < gate.at_least:
        why = f"{gate.metric} of {gate.subject} is {seen.value:.3f} here, under {gate.at_least:g}"
    else:
        return
    for subject, found in numbers.items():
        for key, number in found.items():
            if subject != gate.subject and key.startswith(f"{name}/"):
                found[key] = Number(None, number.n, reason=f"not measurable: {why}" if has_rows else number.reason)


def whole_of(
    suite: Suite,
    found: Mapping[str, Number],
    reference: Mapping[str, Number] | None = None,
    base: Mapping[str, Number] | None = None,
) -> Numbers:
    """Metrics over other metrics, such as model utility; one may be part of a later one."""
    out: Numbers = {}
    others = {"base_parts": (base, "base"), "reference_parts": (reference, "retain model")}
    for metric, keys in suite.whole.items():
        method, values = get("metric", metric), []
        try:
            for name in method.inputs:
                their, whose = others.get(name, (found, ""))
                if their is None:
                    raise Unmeasured(f"there is no {whose} to compare with")
                own = out if name == "parts" or their is found else {}
                values.append(_parts(keys, {**their, **own}, whose))
            out[metric] = Number(float(method.fn(*values, **suite.settings.get(metric, {}))), len(keys))
        except Unmeasured as why:
            out[metric] = Number(None, len(keys), reason=str(why))
    return out


def _parts(keys: Sequence[str], found: Mapping[str, Number], whose: str = "") -> dict[str, float]:
    parts: dict[str, float] = {}
    for key in keys:
        number = found[key]
        if number.value is None:
            of = f" of the {whose}" if whose else ""
            raise Unmeasured(f"its part {key}{of} has no value: {number.reason}")
        parts[key] = number.value
    return parts
