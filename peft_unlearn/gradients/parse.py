"""How the names in a recipe become terms and methods. Complaints are collected, so that all of them are shown at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import registry
from ..errors import Errors, UserError
from .terms import Term

BATCH_OF = {"constraint": "retain"}  # gradient names that read another set's batch unless told otherwise
SCOPES, SPACES = ("global", "layer", "tensor"), ("adapter", "base")
Chosen = tuple[registry.Method, dict[str, Any]]  # a method with all its hyper-parameters


def parse_terms(spec: Any, errors: Errors) -> list[Term]:
    """Terms of ``{gradient: {objective: {hyper.., weight, batch}}}``; complaints go to `errors`."""
    if not isinstance(spec, Mapping) or not spec:
        errors.add("terms: give at least one, e.g. {forget: {npo: {beta: 0.1}}, retain: {nll: {}}}")
        return []
    out = []
    for gradient, objectives in spec.items():
        if isinstance(objectives, str):
            objectives = {objectives: {}}
        if not isinstance(objectives, Mapping) or not objectives:
            errors.add(f"terms.{gradient}: name an objective, e.g. {{npo: {{beta: 0.1}}}}")
            continue
        found = (_term(gradient, name, hyper, errors) for name, hyper in objectives.items())
        out += [t for t in found if t is not None]
    return out


def _term(gradient: str, name: str, hyper: Any, errors: Errors) -> Term | None:
    at = f"terms.{gradient}"
    if not isinstance(hyper, (Mapping, type(None))):
        errors.add(f"{at}.{name}: hyper-parameters are a mapping, e.g. {{weight: 1}}; got {hyper!r}")
        return None
    hyper = dict(hyper or {})
    weight, batch = hyper.pop("weight", 1.0), hyper.pop("batch", BATCH_OF.get(gradient, gradient))
    joint = hyper.pop("joint", False)
    if not isinstance(joint, bool):
        errors.add(f"{at}.{name}: joint is true (one mean over the batches of all joint terms) or false, not {joint!r}")
        return None
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
        errors.add(f"{at}.{name}: weight must be a finite number, not {weight!r}")
        return None
    if not isinstance(batch, str) or not batch:
        errors.add(f"{at}.{name}: batch names a set of the data, e.g. batch: retain, not {batch!r}")
        return None
    try:
        method = registry.get("objective", name)
    except UserError as e:
        errors.add(f"{at}: {e}")
        return None
    wrong = method.check(hyper)
    for w in wrong:
        errors.add(f"{at}: {w}")
    return None if wrong else Term(gradient, batch, method, float(weight), method.resolve(hyper), joint)


def parse_method(
    kind: str, spec: Any, errors: Errors, **options: tuple[str, ...]
) -> tuple[Chosen | None, dict[str, Any]]:
    """((method, hyper-parameters) or None, engine options) of ``name`` or ``{name: {hyper..}}``; complaints go to `errors`.

    Args:
        options: names among the hyper-parameters that are the engine's business, with their choices.
    """
    if spec is None:
        return None, {}
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        errors.add(f"{kind}: give one name, or {{name: {{hyper-parameters}}}}; got {spec!r}")
        return None, {}
    ((name, hyper),) = spec.items()
    if not isinstance(hyper, (Mapping, type(None))):
        errors.add(f"{kind} {name!r}: hyper-parameters are a mapping, e.g. {{{name}: {{key: value}}}}; got {hyper!r}")
        return None, {}
    try:
        method = registry.get(kind, name)
    except UserError as e:
        errors.add(str(e))
        return None, {}
    hyper = dict(hyper or {})
    mine = {k: hyper.pop(k) for k in options if k in hyper}
    for k, v in mine.items():
        if v not in options[k]:
            errors.add(f"{kind} {method.name!r}: {k}={v!r} is not one of {', '.join(options[k])}")
            return None, {}
    wrong = method.check(hyper)
    for w in wrong:
        errors.add(w)
    return (None if wrong else (method, method.resolve(hyper))), mine
