"""The embedded models and data by name: where their files lie, and what `embedded:people?seed=0` means.

The same files lie in two places: in a clone under ``adapters/``, in an installed wheel under ``peft_unlearn/_assets/``.
`asset` is the one function that knows; nothing else in the package builds such a path.
"""

from __future__ import annotations

from pathlib import Path

from peft_unlearn.errors import UserError, nearest

PREFIX = "embedded:"
NAMES = ("people",)
_PACKAGE = Path(__file__).resolve().parent.parent


def asset(*parts: str) -> Path:
    """The path of a shipped file or folder, e.g. ``asset("recipes", "people-npo.yaml")``; `UserError` if missing."""
    places = (_PACKAGE.parent / "adapters", _PACKAGE / "_assets")
    # A clone is told by its pyproject.toml: in site-packages a folder `adapters` would be someone else's.
    if not (_PACKAGE.parent / "pyproject.toml").is_file():
        places = places[1:]
    for place in places:
        path = place.joinpath(*parts)
        if path.exists():
            return path
    raise UserError(
        f"{'/'.join(parts)} is not among the files shipped with peft_unlearn. In a clone it belongs to adapters/;"
        " the embedded models are rebuilt by `peft-unlearn base build`."
    )


def is_embedded(reference: object) -> bool:
    """Whether a base or data reference names something embedded: ``embedded:people``."""
    return isinstance(reference, str) and reference.startswith(PREFIX)


def _known(name: str) -> str:
    if name not in NAMES:
        raise UserError(f"There is no embedded model or data set {name!r}.{nearest(name, NAMES)}")
    return name


def base_path(name: str = "people") -> Path:
    """The folder of an embedded base model: bf16 files, loaded as float32 by everything here."""
    return asset("bases", _known(name))


def twin_path(name: str = "people") -> Path:
    """The folder of the retain-only twin of an embedded base: trained alike, but never on the forget set."""
    return asset("bases", f"{_known(name)}-retain")


def parse(reference: str) -> tuple[str, dict[str, int]]:
    """``embedded:people?seed=0`` -> ``("people", {"seed": 0})``; without a seed the options are empty."""
    if not is_embedded(reference):
        raise UserError(
            f"{reference!r} is not an embedded reference: those read embedded:people or embedded:people?seed=0."
        )
    name, mark, query = reference.removeprefix(PREFIX).partition("?")
    options: dict[str, int] = {}
    for part in query.split("&") if mark else ():
        key, _, value = part.partition("=")
        if key not in ("", "seed"):
            raise UserError(f"{reference!r}: unknown option {key!r}.{nearest(key, ['seed'])}")
        if not (key and value.isascii() and value.isdigit()):
            raise UserError(f"{reference!r}: after the ? stands seed=N, with N a whole number from 0 up.")
        options[key] = int(value)
    return _known(name), options


def rows(reference: str = "embedded:people") -> dict[str, list[dict]]:
    """The sets of an embedded data set by name, as `people.generate` describes them."""
    from peft_unlearn.data import people

    _, options = parse(reference)
    return people.generate(options.get("seed", 0))
