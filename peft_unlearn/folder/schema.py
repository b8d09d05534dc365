"""What a file from outside may hold, declared: one shape per field, and every complaint at once, each with its place.

A shape is a function (value, place, errors) that adds complaints. Shapes are put together like the file is::

    ROW = record({"name": TEXT, "scale": maybe(NUMBER), "status": one_of("active", "revoked")}, required=("name",))
    list_of(ROW)(rows, "adapters", errors)      # adapters[0].scale must be a number, not 'much'
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..errors import Errors, nearest

Shape = Callable[[Any, str, Errors], None]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Also not a whole number that no float can hold."""
    return isinstance(value, float) or (is_whole(value) and abs(value) < 2**1000)


def shown(value: Any) -> str:
    """A value in a message: as JSON spells null, true and false, containers by their kind alone."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = ((Mapping, "a mapping"), (list | tuple, "a list"), (str | int | float, repr(value)))
    return next((text for kind, text in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def shape(what: str, fits: Callable[[Any], bool]) -> Shape:
    """The shape of values that `fits` accepts; `what` completes "must be .."."""

    def check(value: Any, place: str, errors: Errors) -> None:
        if not fits(value):
            errors.add(f"{place or 'it'} must be {what}, not {shown(value)}")

    return check


ANY = shape("anything", lambda v: True)
TEXT = shape("text", lambda v: isinstance(v, str))
MAPPING = shape("a mapping", lambda v: isinstance(v, Mapping))
LIST = shape("a list", lambda v: isinstance(v, list))
NUMBER = shape("a number", is_number)
FINITE = shape("a finite number", lambda v: is_number(v) and math.isfinite(v))
POSITIVE = shape("a number above 0", lambda v: is_number(v) and v > 0)
WHOLE = shape("a whole number", is_whole)
COUNT = shape("a whole number from 1 on", lambda v: is_whole(v) and v >= 1)


def matching(pattern: str, what: str) -> Shape:
    """Text that `pattern` matches as a whole."""
    return shape(what, lambda v: isinstance(v, str) and re.fullmatch(pattern, v) is not None)


def one_of(*names: str, what: str = "") -> Shape:
    """One of `names`, which a complaint lists; with `what` ("a metric") it names that and the nearest spelling instead."""
    listed = " or ".join(", ".join(names).rsplit(", ", 1))

    def check(value: Any, place: str, errors: Errors) -> None:
        if not (isinstance(value, str) and value in names):
            hint = nearest(str(value), names)
            hint = hint if what or hint.startswith(" Did") else ""
            errors.add(f"{place} must be {what or listed}, not {shown(value)}{hint and '.' + hint}")

    return check


def maybe(inner: Shape) -> Shape:
    """`inner`, or null."""
    return lambda value, place, errors: None if value is None else inner(value, place, errors)


def list_of(inner: Shape) -> Shape:
    def check(value: Any, place: str, errors: Errors) -> None:
        LIST(value, place, errors)
        for i, item in enumerate(value if isinstance(value, list) else ()):
            inner(item, f"{place}[{i}]", errors)

    return check


def few(inner: Shape, most: int) -> Shape:
    """A list of at most `most`; of a longer one nothing else is looked at."""
    whole, short = list_of(inner), shape(f"a list of at most {most:,}", lambda v: len(v) <= most)
    return lambda value, place, errors: (short if isinstance(value, list) and len(value) > most else whole)(
        value, place, errors
    )


def mapping_of(inner: Shape) -> Shape:
    """Any keys, each with a value of one shape."""

    def check(value: Any, place: str, errors: Errors) -> None:
        MAPPING(value, place, errors)
        for key, item in value.items() if isinstance(value, Mapping) else ():
            inner(item, f"{place}.{key}" if place else str(key), errors)

    return check


def record(
    fields: Mapping[str, Shape], required: Collection[str] = (), unknown: str = "", more: bool = False, rest: Shape | None = None
) -> Shape:  # fmt: skip
    """A mapping with known keys; an unknown one is answered with the nearest spelling, or with `unknown`, unless there may be `more`
    of any kind, or all the `rest` are of one."""

    def check(value: Any, place: str, errors: Errors) -> None:
        MAPPING(value, place, errors)
        if not isinstance(value, Mapping):
            return
        lead = f"{place}." if place else ""
        for key in value:
            if key not in fields and rest is not None:
                rest(value[key], f"{lead}{key}", errors)
            elif key not in fields and not more:
                where = f" in {place}" if place else ""
                errors.add(f"unknown key {key!r}{where}{unknown or '.' + nearest(str(key), fields)}")
        for key, inner in fields.items():
            if key in value:
                inner(value[key], f"{lead}{key}", errors)
            elif key in required:
                errors.add(f"{lead}{key} is missing")

    return check


def require(value: Any, inner: Shape, where: str) -> None:
    """Raise one `UserError` with everything about `value` that does not fit; `where` names the input."""
    errors = Errors()
    inner(value, "", errors)
    errors.raise_if_any(where)
