"""The data of a recipe, or of --data, as a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .bundle import ForgetRetain, check_target, digest
from .chat import Template
from .formats import DATA_OPTIONS as DATA_OPTIONS


def template_of(spec: Any) -> Template:
    """The wording that a recipe's ``data`` part asks for: its ``template`` with its ``template_args``."""
    name = spec.get("template", "qa") if isinstance(spec, Mapping) else "qa"
    args = spec.get("template_args") if isinstance(spec, Mapping) else None
    return {name: args} if args and isinstance(name, str) else name


def load_data(spec: Any, override: str | None = None) -> ForgetRetain:
    """The bundle of a recipe's ``data`` part, or of `override` (--data).

    A published recipe knows its files by their hashes alone, with which what is given is compared.

    Raises:
        UserError: nothing is named, a set is known by its hash alone, or the data given are others.
    """
    template, sets = template_of(spec), spec
    if isinstance(spec, Mapping):
        sets = {k: v for k, v in spec.items() if k not in DATA_OPTIONS}
        if "bundle" in sets:  # {bundle: embedded:people, per_anchor: 2}: all sets by one name
            if others := ", ".join(k for k in sets if k != "bundle"):
                raise UserError(f"data: bundle names all sets at once; {others} beside it is one too many")
            sets = sets["bundle"]
    hashed = {k: v for k, v in sets.items() if str(v).startswith("sha256:")} if isinstance(sets, Mapping) else {}
    if override is None and hashed:
        raise UserError(
            f"the recipe knows its {', '.join(hashed)} set by hash alone; say where the files are with --data FOLDER"
        )
    if override is None and not sets:
        raise UserError("no data are named; give data in the recipe or --data (a folder, or embedded:people)")
    names = spec.get("fields") if isinstance(spec, Mapping) else None
    if names is not None and not (isinstance(names, Mapping) and all(isinstance(v, str) for v in names.values())):
        raise UserError(f"data.fields: names of columns, e.g. {{question: instruction, answer: output}}, not {names!r}")
    bundle = ForgetRetain.load(sets if override is None else override, template, names)
    bundle.target = check_target(spec.get("target", bundle.target)) if isinstance(spec, Mapping) else bundle.target
    for name, wanted in hashed.items():
        rows = bundle.rows(name)
        if rows is None or digest(rows) != str(wanted).removeprefix("sha256:"):
            raise UserError(f"--data {override}: its {name} set is not the one this recipe was run on (other sha256)")
    return bundle
