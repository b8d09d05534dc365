"""Suites are data: which rows, which metrics on them, which way is better. One YAML a suite, beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast

from ...errors import Errors, UserError, nearest

Role = Literal["forget", "retain", "holdout"]
FORMAT = 1


@dataclass(frozen=True)
class Gate:
    """A set counts only if `subject` reaches `at_least` in `metric` on it; else it is not measurable for the others."""

    subject: str
    metric: str
    at_least: float


@dataclass(frozen=True)
class EvalSet:
    """One set of rows: its name in the data, its role, the metrics, and how many rows have their wrong answers read."""

    name: str
    source: str
    role: Role
    metrics: tuple[str, ...]
    perturbed_rows: int | None = None
    measurable_if: Gate | None = None


@dataclass(frozen=True)
class Suite:
    """A suite as its YAML says it. `whole` maps a metric over metrics to its parts, keys like
    ``retain/probability``."""

    name: str
    summary: str
    reference: str
    sets: Mapping[str, EvalSet]
    whole: Mapping[str, tuple[str, ...]]
    max_new_tokens: int
    quick_sets: tuple[str, ...]
    quick_metrics: tuple[str, ...]
    quick_rows: int

    def quick(self) -> Suite:
        """The small suite that is run while training."""
        sets = {
            name: replace(s, metrics=tuple(m for m in self.quick_metrics if m in s.metrics), measurable_if=None)
            for name, s in self.sets.items()
            if name in self.quick_sets
        }
        return replace(self, sets=sets, whole={})


def names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml"))


def load(suite: str | Path | Mapping[str, Any] | Suite) -> Suite:
    """A suite by name, from a YAML file, or from a mapping.

    Raises:
        UserError: no such suite, or everything that is wrong with it at once.
    """
    if isinstance(suite, Suite):
        return suite
    if isinstance(suite, Mapping):
        return _read(suite, str(suite.get("name", "suite")))
    import yaml

    if str(suite).endswith((".yaml", ".yml")):
        if not Path(suite).is_file():
            raise UserError(f"there is no suite file {suite}")
        text = Path(suite).read_text(encoding="utf-8")
    elif suite in names():
        text = (files(__name__) / f"{suite}.yaml").read_text(encoding="utf-8")
    else:
        raise UserError(f"there is no suite {str(suite)!r}.{nearest(str(suite), names())}")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        raise UserError(f"suite {suite}: not valid YAML: {problem}") from None
    if not isinstance(data, Mapping):
        raise UserError(f"suite {suite}: holds no mapping")
    return _read(data, str(suite))


_KEYS = ("format", "name", "summary", "reference", "generation", "sets", "whole", "quick")
_SET_KEYS = ("source", "role", "metrics", "perturbed_rows", "measurable_if")


def _read(data: Mapping[str, Any], name: str) -> Suite:
    from ...registry import methods

    known = {m.name for m in methods("metric")}
    errors = Errors()
    for key in data:
        if key not in _KEYS:
            errors.add(f"unknown key {key!r}.{nearest(str(key), _KEYS)}")
    if data.get("format") != FORMAT:
        errors.add(f"format is {data.get('format')!r}, this version reads {FORMAT}")
    sets: dict[str, EvalSet] = {}
    for key, spec in (data.get("sets") or {}).items():
        unknown = [k for k in spec if k not in _SET_KEYS]
        for k in unknown:
            errors.add(f"set {key!r}: unknown key {k!r}.{nearest(str(k), _SET_KEYS)}")
        if spec.get("role") not in ("forget", "retain", "holdout"):
            errors.add(f"set {key!r}: role is {spec.get('role')!r}, not forget, retain or holdout")
        for m in spec.get("metrics", ()):
            if m not in known:
                errors.add(f"set {key!r}: there is no metric {m!r}.{nearest(str(m), known)}")
        gate = spec.get("measurable_if")
        sets[key] = EvalSet(
            name=key,
            source=str(spec.get("source", key)),
            role=cast(Role, spec.get("role")),
            metrics=tuple(spec.get("metrics", ())),
            perturbed_rows=spec.get("perturbed_rows"),
            measurable_if=Gate(**gate) if gate else None,
        )
    if not sets:
        errors.add("names no sets")
    keys = {f"{s.name}/{m}" for s in sets.values() for m in s.metrics}
    whole = {k: tuple(v) for k, v in (data.get("whole") or {}).items()}
    for metric_name, parts in whole.items():
        if metric_name not in known:
            errors.add(f"whole: there is no metric {metric_name!r}.{nearest(metric_name, known)}")
        for part in parts:
            if part not in keys:
                errors.add(f"whole: {metric_name} names {part!r}, which no set measures.{nearest(part, keys)}")
    quick = data.get("quick") or {}
    for s in quick.get("sets", ()):
        if s not in sets:
            errors.add(f"quick: there is no set {s!r}.{nearest(s, sets)}")
    errors.raise_if_any(f"suite {name}")
    return Suite(
        name=str(data.get("name", name)),
        summary=str(data.get("summary", "")),
        reference=str(data.get("reference", "retain_only")),
        sets=sets,
        whole=whole,
        max_new_tokens=int((data.get("generation") or {}).get("max_new_tokens", 32)),
        quick_sets=tuple(quick.get("sets", ())),
        quick_metrics=tuple(quick.get("metrics", ())),
        quick_rows=int(quick.get("rows", 50)),
    )
