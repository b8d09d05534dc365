"""The embedded models and data by name: where their files lie, and what `embedded:people?seed=0` means.

The same files lie in two places: in a clone under ``adapters/``, in an installed wheel under ``peft_unlearn/_assets/``.
`asset` is the one function that knows; nothing else in the package builds such a path.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError, nearest
from . import digits, domains, people

PREFIX = "embedded:"
OPTIONS: dict[str, dict[str, int | str]] = {
    "people": {"seed": 0}, "domains": {"forget": "chem", "seed": 0}, "digits": {"forget": "3", "seed": 0},
}  # fmt: skip
NAMES = tuple(OPTIONS)  # the data sets
RETAIN_MODELS = {"people": "people", "domains": "domains", "digits-resnet": "digits", "digits-vit": "digits"}
"""Bases that have a retain model beside them -> the data set that both were trained on."""
BASES = (
    *RETAIN_MODELS,
    "domains-natural",
)  # the last: trained like domains, its routing never seeded; a negative example
_PACKAGE = Path(__file__).resolve().parent.parent


def asset(*parts: str) -> Path:
    """The path of a shipped file or folder, e.g. ``asset("recipes", "people-npo.yaml")``; `UserError` if missing."""
    places = (_PACKAGE.parent / "adapters", _PACKAGE / "_assets")
    # A clone is recognized by its pyproject.toml: in site-packages a folder `adapters` would be someone else's.
    if not (_PACKAGE.parent / "pyproject.toml").is_file():
        places = places[1:]
    for place in places:
        path = place.joinpath(*parts)
        if path.exists():
            return path
    raise UserError(
        f"{'/'.join(parts)} is not among the files shipped with peft_unlearn. In a clone it belongs to adapters/;"
        " the embedded models are rebuilt by `make bases`."
    )


def is_embedded(reference: object) -> bool:
    """Whether a base or data reference names something embedded: ``embedded:people``."""
    return isinstance(reference, str) and reference.startswith(PREFIX)


def _known(name: str, names: tuple[str, ...] = BASES) -> str:
    if name not in names:
        what = "data set" if names is NAMES else "model or data set"
        raise UserError(f"There is no embedded {what} {name!r}.{nearest(name, names)}")
    return name


def base_path(name: str = "people") -> Path:
    """The folder of an embedded base model: bf16 files, loaded as float32 by everything here."""
    return asset("bases", _known(name))


def retain_model_path(name: str = "people") -> Path:
    """The folder of the retain model of an embedded base: trained alike, without the forget set.

    That of ``domains`` was trained without chem; for another forget domain it is no reference.
    """
    if _known(name) not in RETAIN_MODELS:
        raise UserError(f"The embedded model {name} has no retain model.")
    return asset("bases", f"{name}-retain")


def retain_model_for(base: str, data: str | None) -> Path | None:
    """The retain model for a base and a forget set, by their references; None where there is none.

    data: where the forget set came from, e.g. ``embedded:domains?forget=lang``; None or a file of the user's own leaves
        that of ``people`` in place, as the nearest there is.
    """
    if not is_embedded(base):
        return None
    name, _ = parse(base)
    if name == "people":
        return retain_model_path(name)
    if name not in RETAIN_MODELS or not is_embedded(data):
        return None
    wanted, found = RETAIN_MODELS[name], resolve(str(data).partition("#")[0])
    return retain_model_path(name) if found == (wanted, OPTIONS[wanted]) else None


def parse(reference: str) -> tuple[str, dict[str, int | str]]:
    """``embedded:people?seed=0`` -> ``("people", {"seed": 0})``; only the options that are given.

    ``embedded:domains?forget=lang&seed=1`` names the domain to be forgotten.
    """
    if not is_embedded(reference):
        raise UserError(
            f"{reference!r} is not an embedded reference: those read embedded:people or embedded:people?seed=0."
        )
    name, mark, query = reference.removeprefix(PREFIX).partition("?")
    known = OPTIONS.get(_known(name, (*NAMES, *BASES)), {})
    options: dict[str, int | str] = {}
    for part in query.split("&") if mark else ():
        key, _, value = part.partition("=")
        if key and key not in known:
            raise UserError(f"{reference!r}: unknown option {key!r}.{nearest(key, known)}")
        if key == "forget":
            options[key] = (digits if name == "digits" else domains).check_forget(value)
        elif key and value.isascii() and value.isdigit():
            options[key] = int(value)
        else:
            raise UserError(f"{reference!r}: after the ? stands seed=N, with N a whole number from 0 up.")
    return name, options


def resolve(reference: str) -> tuple[str, dict[str, int | str]]:
    """`parse` of a data set with every option filled in, sorted by name: what a manifest says and a model depends on."""
    name, options = parse(reference)
    return name, dict(sorted((OPTIONS[_known(name, NAMES)] | options).items()))


def rows(reference: str = "embedded:people") -> dict[str, list[dict]]:
    """The sets of an embedded data set by name, as `generate` of `people`, `domains` and `digits` describe them."""
    name, options = resolve(reference)
    seed = int(options["seed"])
    if name == "people":
        return people.generate(seed)
    return (digits if name == "digits" else domains).generate(seed, str(options["forget"]))
