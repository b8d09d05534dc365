"""Which attacks are wanted: from the command's flags to methods with checked settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Errors, UserError, nearest
from ..folder.yaml_io import parse_yaml
from ..registry import Method, get, methods

Requests = list[tuple[str, dict[str, Any]]]  # (attack, hyper-parameters)


@dataclass(frozen=True)
class Wanted:
    """One attack with its settings. label: its key in the result; one attack may be wanted with several settings."""

    label: str
    method: Method
    settings: dict[str, Any]


def requests_of(
    *,
    relearn: int | None = None,
    quantize: str | None = None,
    jailbreak: str | None = None,
    plain: Sequence[str] = (),
    everything: bool = False,
    sets: Sequence[str] = (),
) -> Requests:
    """The attacks that the command's flags name.

    Args:
        relearn: rows shown.
        quantize: formats, separated by commas.
        jailbreak: ``templates``, or a YAML file of them.
        plain: attacks by name with their defaults.
        everything: all there are, with all formats.
        sets: ``relearn.learning_rate=3e-4``, for every request of that attack.

    Raises:
        UserError: every ``--set`` that cannot be understood or is about an attack that was not requested.
    """
    found: Requests = [(name, {}) for name in plain]
    if relearn is not None:
        found.append(("relearn", {"rows": relearn}))
    found += [("quantize", {"format": f.strip()}) for f in (quantize or "").split(",") if f.strip()]
    if jailbreak is not None:
        found.append(("jailbreak", {} if jailbreak == "templates" else {"file": jailbreak}))
    if everything:
        named = {name for name, _ in found}
        for method in (m for m in methods("attack") if m.name not in named):
            needed = next((p for p in method.params.values() if p.required), None)
            found += [(method.name, {needed.name: c} if needed else {}) for c in (needed and needed.choices) or (None,)]
    _put_in(found, sets)
    return found


def _put_in(requests: Requests, sets: Sequence[str]) -> None:
    """Write the values of ``--set`` into the requests of their attack."""
    errors, named = Errors(), {name for name, _ in requests}
    for text in sets:
        key, sign, value = text.partition("=")
        name, dot, hyper = key.strip().replace("-", "_").partition(".")
        if not (sign and dot and name and hyper):
            errors.add(f"--set {text}: expected ATTACK.NAME=VALUE, e.g. relearn.learning_rate=3e-4")
        elif name not in named:
            errors.add(f"--set {text}: {name!r} is not among the attacks requested.{nearest(name, named)}")
        else:
            try:
                parsed = parse_yaml(value, f"--set {text}")
            except UserError as problem:
                errors.absorb(problem)
                continue
            for _, given in (r for r in requests if r[0] == name):
                given[hyper] = parsed
    errors.raise_if_any("attacks")


def wanted(requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Wanted]:
    """Attacks by name with their hyper-parameters, defaults filled in.

    A single value stands for a list of one. A label is the attack's name, the values of the settings that have no
    default (``quantize:int8``), and those in which several requests for it differ.

    Raises:
        UserError: every unknown attack, unknown or wrong hyper-parameter, and double request at once.
    """
    errors = Errors()
    found: list[tuple[Method, dict[str, Any]]] = []
    for name, given in requests:
        try:
            method = get("attack", name)
        except UserError as problem:
            errors.absorb(problem)
            continue
        lists = {k for k, p in method.params.items() if p.type == "list"}
        hyper = {k: [v] if k in lists and not isinstance(v, list | tuple) else v for k, v in given.items()}
        for complaint in method.check(hyper):
            errors.add(complaint)
        found.append((method, method.resolve(hyper)))
    out: dict[str, Wanted] = {}
    for method, settings in found:
        others = [s for m, s in found if m.name == method.name]
        differ = [k for k in settings if method.params[k].required or any(s[k] != settings[k] for s in others)]
        label = ":".join([method.name, *(str(settings[k]) for k in differ)])
        if label in out:
            errors.add(f"attack {label!r} is requested twice")
        out[label] = Wanted(label, method, settings)
    if not found and not errors.messages:
        errors.add("name at least one." + nearest("", [m.name for m in methods("attack")]))
    errors.raise_if_any("attacks")
    return list(out.values())
