"""Suites are data: which rows, which metrics on them, which way is better. One YAML a suite, beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...errors import Errors, UserError, nearest
from ...folder.schema import ANY, COUNT, MAPPING, NUMBER, TEXT, Shape, list_of, mapping_of, maybe, one_of, record, shape
from ...folder.yaml_io import read_yaml
from ...registry import methods
from ..provider import providers
from ..shapes import EvalSet, Gate, Suite

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


_FILLED = shape("text that is not empty", lambda v: isinstance(v, str) and bool(v))


def _stop(value: Any, place: str, errors: Errors) -> None:
    (_FILLED if isinstance(value, str) else list_of(_FILLED))(value, place, errors)


def _settings_of(owner: Any) -> Shape:
    """Settings of one metric or provider, checked by itself."""

    def check(value: Any, place: str, errors: Errors) -> None:
        MAPPING(value, place, errors)
        for wrong in owner.check(value) if isinstance(value, Mapping) else ():
            errors.add(f"settings: {wrong}")

    return check


def _shape(data: Mapping[str, Any]) -> Shape:
    """What this suite may hold: its metrics must be registered, its sets and parts its own."""
    known = {m.name: m for m in methods("metric")}
    sets = data["sets"] if isinstance(data.get("sets"), Mapping) else {}
    whole = list(data["whole"]) if isinstance(data.get("whole"), Mapping) else []
    lists = {k: s.get("metrics") for k, s in sets.items() if isinstance(s, Mapping)}
    keys = [f"{k}/{m}" for k, found in lists.items() if isinstance(found, list) for m in found]
    metrics, set_name = list_of(one_of(*known, what="a metric")), one_of(*sets, what="a set of this suite")
    gate = {"subject": TEXT, "metric": TEXT, "at_least": NUMBER}
    one = {
        "source": TEXT, "role": one_of("forget", "retain", "holdout"), "metrics": metrics, "perturbed_rows": maybe(COUNT),
        "measurable_if": maybe(record(gate, required=gate)), "template": maybe(one_of("qa", "chat")),
        "max_new_tokens": maybe(COUNT), "shots": maybe(TEXT), "stop": maybe(_stop), "against": maybe(set_name),
    }  # fmt: skip
    parts = {
        m: list_of(one_of(*keys, *whole[:i], what="what a set measures")) for i, m in enumerate(whole) if m in known
    }
    fields = {
        "format": shape(f"{FORMAT}, which this version reads", lambda v: v == FORMAT),
        "name": TEXT, "summary": TEXT, "reference": TEXT, "sets": mapping_of(record(one, required=("role",))),
        "whole": maybe(record({**dict.fromkeys(known, ANY), **parts})),
        "generation": maybe(record({"max_new_tokens": COUNT})),
        "quick": maybe(record({"sets": list_of(set_name), "metrics": metrics, "rows": COUNT})),
        "settings": maybe(record({k: _settings_of(owner) for k, owner in {**known, **providers()}.items()})),
    }  # fmt: skip
    return record(fields, required=("format", "sets"))


def _read(data: Mapping[str, Any], name: str) -> Suite:
    errors = Errors()
    _shape(data)(data, "", errors)
    if data.get("sets") == {}:
        errors.add("names no sets")
    errors.raise_if_any(f"suite {name}")
    quick = data.get("quick") or {}
    return Suite(
        name=data.get("name", name),
        summary=data.get("summary", ""),
        reference=data.get("reference", "retain_only"),
        sets={key: _set(key, spec) for key, spec in data["sets"].items()},
        whole={k: tuple(v) for k, v in (data.get("whole") or {}).items()},
        max_new_tokens=(data.get("generation") or {}).get("max_new_tokens", 32),
        quick_sets=tuple(quick.get("sets", ())),
        quick_metrics=tuple(quick.get("metrics", ())),
        quick_rows=quick.get("rows", 50),
        settings={k: dict(v) for k, v in (data.get("settings") or {}).items()},
    )


def _set(key: str, spec: Mapping[str, Any]) -> EvalSet:
    stop, gate = spec.get("stop") or (), spec.get("measurable_if")
    own = {
        "source": key,
        **spec,
        "metrics": tuple(spec.get("metrics", ())),
        "measurable_if": Gate(**gate) if gate else None,
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
    }
    return EvalSet(name=key, **own)
