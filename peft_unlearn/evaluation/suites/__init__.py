"""Suites are data: which rows, which metrics on them, which way is better. One YAML a suite, beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from ...errors import Errors, UserError, nearest
from ...folder.yaml_io import read_yaml
from ..shapes import EvalSet as EvalSet
from ..shapes import Gate as Gate
from ..shapes import Role as Role
from ..shapes import Suite as Suite

FORMAT = 1


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
    if str(suite).endswith((".yaml", ".yml")):
        if not Path(suite).is_file():
            raise UserError(f"there is no suite file {suite}")
        path = Path(suite)
    elif suite in names():
        path = Path(__file__).with_name(f"{suite}.yaml")
    else:
        raise UserError(f"there is no suite {str(suite)!r}.{nearest(str(suite), names())}")
    data = read_yaml(path, f"suite {suite}", aliases=True)
    if not isinstance(data, Mapping):
        raise UserError(f"suite {suite}: holds no mapping")
    return _read(data, str(suite))


_KEYS = ("format", "name", "summary", "reference", "generation", "sets", "whole", "quick", "settings")
_SET_KEYS = tuple(f.name for f in fields(EvalSet) if f.name != "name")


def _unknown(found: Any, known: tuple[str, ...], where: str, errors: Errors) -> dict[str, Any]:
    """The known part of a mapping; whatever else is in it is an error with the nearest spelling."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        errors.add(f"{where}is {found!r}, not a mapping")
        return {}
    for key in found:
        if key not in known:
            errors.add(f"{where}unknown key {key!r}.{nearest(str(key), known)}")
    return {k: v for k, v in found.items() if k in known}


def _read(data: Mapping[str, Any], name: str) -> Suite:
    from ...registry import methods

    known = {m.name: m for m in methods("metric")}
    errors = Errors()
    data = _unknown(data, _KEYS, "", errors)
    if data.get("format") != FORMAT:
        errors.add(f"format is {data.get('format')!r}, this version reads {FORMAT}")
    raw = data.get("sets") or {}
    sets = (
        {key: _read_set(key, spec, raw, known, errors) for key, spec in raw.items()} if isinstance(raw, Mapping) else {}
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
        keys.add(metric_name)
    quick = _unknown(data.get("quick"), ("sets", "metrics", "rows"), "quick: ", errors)
    for s in quick.get("sets", ()):
        if s not in sets:
            errors.add(f"quick: there is no set {s!r}.{nearest(s, sets)}")
    for m in quick.get("metrics", ()):
        if m not in known:
            errors.add(f"quick: there is no metric {m!r}.{nearest(m, known)}")
    generation = _unknown(data.get("generation"), ("max_new_tokens",), "generation: ", errors)
    length = _count(generation.get("max_new_tokens", 32), "generation: max_new_tokens", errors)
    settings = _read_settings(data.get("settings"), known, errors)
    errors.raise_if_any(f"suite {name}")
    return Suite(
        name=str(data.get("name", name)),
        summary=str(data.get("summary", "")),
        reference=str(data.get("reference", "retain_only")),
        sets=sets,
        whole=whole,
        max_new_tokens=length or 32,
        quick_sets=tuple(quick.get("sets", ())),
        quick_metrics=tuple(quick.get("metrics", ())),
        quick_rows=int(quick.get("rows", 50)),
        settings=settings,
    )


def _read_set(key: str, given: Any, sets: Mapping[str, Any], known: Mapping[str, Any], errors: Errors) -> EvalSet:
    where = f"set {key!r}: "
    spec = _unknown(given, _SET_KEYS, where, errors)
    if spec.get("role") not in ("forget", "retain", "holdout"):
        errors.add(f"{where}role is {spec.get('role')!r}, not forget, retain or holdout")
    for m in spec.get("metrics", ()):
        if m not in known:
            errors.add(f"{where}there is no metric {m!r}.{nearest(m, known)}")
    gate = _unknown(spec.get("measurable_if"), ("subject", "metric", "at_least"), f"{where}measurable_if: ", errors)
    if gate and len(gate) < 3:
        errors.add(f"{where}measurable_if needs subject, metric and at_least")
    stop = spec.get("stop") or ()
    if not all(isinstance(text, str) and text for text in ([stop] if isinstance(stop, str) else stop)):
        errors.add(f"{where}stop is {stop!r}, not a list of texts")
    against = spec.get("against")
    if against is not None and against not in sets:
        errors.add(f"{where}against names {against!r}, which is no set of this suite.{nearest(str(against), sets)}")
    template = spec.get("template")
    if template not in (None, "qa", "chat"):
        errors.add(f"{where}template is {template!r}, not qa or chat.{nearest(str(template), ('qa', 'chat'))}")
    return EvalSet(
        name=key,
        source=str(spec.get("source", key)),
        role=cast(Role, spec.get("role")),
        metrics=tuple(spec.get("metrics", ())),
        perturbed_rows=_count(spec.get("perturbed_rows"), f"{where}perturbed_rows", errors),
        measurable_if=Gate(**gate) if len(gate) == 3 else None,
        template=template,
        max_new_tokens=_count(spec.get("max_new_tokens"), f"{where}max_new_tokens", errors),
        shots=spec.get("shots"),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        against=against,
    )


def _count(value: Any, what: str, errors: Errors) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        errors.add(f"{what} is {value!r}, not a whole number from 1 up")
        return None
    return value


def _read_settings(given: Any, known: Mapping[str, Any], errors: Errors) -> dict[str, dict[str, Any]]:
    from ..provider import providers

    owners = {**known, **providers()}
    out: dict[str, dict[str, Any]] = {}
    for name, values in _unknown(given, tuple(owners), "settings: ", errors).items():
        if not isinstance(values, Mapping):
            errors.add(f"settings: {name} is {values!r}, not a mapping")
            continue
        for wrong in owners[name].check(values):
            errors.add(f"settings: {wrong}")
        out[name] = dict(values)
    return out
