"""Hyper-parameters as a signature declares them: type, range and default of every keyword-only argument."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ..errors import nearest

_KINDS: dict[str, Any] = {"bool": bool, "str": str, "list": (list, tuple), "int or str": (int, str)}
_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}


@dataclass(frozen=True)
class Range:
    """Closed range of a hyper-parameter; None = unbounded. `open_low` excludes the lower end itself."""

    min: float | None = None
    max: float | None = None
    open_low: bool = False

    def holds(self, x: float) -> bool:
        low = self.min is None or (x > self.min if self.open_low else x >= self.min)
        return low and (self.max is None or x <= self.max)

    def __str__(self) -> str:
        low = "(-inf" if self.min is None else f"{'(' if self.open_low else '['}{self.min:g}"
        return f"{low}, {'inf)' if self.max is None else f'{self.max:g}]'}"


@dataclass(frozen=True)
class Param:
    """One hyper-parameter as the signature declares it."""

    name: str
    type: str
    default: Any
    range: Range | None = None
    choices: tuple[Any, ...] | None = None
    nullable: bool = False
    required: bool = False

    def check(self, value: Any) -> str | None:
        """The complaint about `value`, or None when it is fine."""
        if value is None:
            return None if self.nullable else f"{self.name} must be {self._wanted()}, not null"
        if self.choices is not None:
            return None if value in self.choices else f"{self.name}={value!r} is not one of {list(self.choices)}"
        number = self.type in ("float", "int")
        kinds = (int, float) if number else _KINDS.get(self.type, object)
        if not isinstance(value, kinds) or (number and isinstance(value, bool)):
            return f"{self.name} must be {self._wanted()}, not {value!r}"
        if number and (not math.isfinite(value) if isinstance(value, float) else abs(value) > 2**63):
            return f"{self.name} must be finite, not {value!r}"
        if self.type == "int" and value != int(value):
            return f"{self.name} must be {self._wanted()}, not {value!r}"
        if number and self.range is not None and not self.range.holds(value):
            return f"{self.name}={value!r} is outside {self.range}"
        return None

    def _wanted(self) -> str:
        return _WORDS.get(self.type, f"a {self.type}")

    def to_dict(self) -> dict[str, Any]:
        ends = {"min": self.range.min if self.range else None, "max": self.range.max if self.range else None}
        choices = {} if self.choices is None else {"choices": list(self.choices)}
        return {"type": self.type, "default": self.default, **ends, **choices}


def param_of(name: str, annotation: Any, default: Any) -> Param:
    """Read one hyper-parameter from its annotation."""
    rng, choices, nullable = None, None, False
    if typing.get_origin(annotation) is Annotated:
        rng = next((a for a in annotation.__metadata__ if isinstance(a, Range)), None)
        annotation = annotation.__origin__
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        nullable = len(inner) < len(typing.get_args(annotation))
        if len(inner) != 1 and set(inner) != {int, str}:
            raise TypeError(f"hyper-parameter {name}: a union of several types has no schema")
        found = param_of(name, inner[0], default)
        rng, choices, type_name = rng or found.range, found.choices, found.type
        if len(inner) == 2:  # a layer: its number or its module's name
            type_name = "int or str"
    elif typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        type_name = type(choices[0]).__name__
    else:
        base = typing.get_origin(annotation) or annotation
        type_name = {tuple: "list"}.get(base, base.__name__ if base in (float, int, bool, str, list, dict) else "")
        if not type_name:
            raise TypeError(f"hyper-parameter {name}: annotation {annotation!r} has no schema")
    required = default is inspect.Parameter.empty
    return Param(name, type_name, None if required else default, rng, choices, nullable, required)


def complaints(values: Mapping[str, Any], params: Mapping[str, Param], who: str, noun: str) -> list[str]:
    """What is wrong with values of `who`: names that are no `noun` of it, with the nearest spelling; types and ranges."""
    out = []
    for key, value in values.items():
        if key not in params:
            out.append(f"{who} has no {noun} {key!r}.{nearest(str(key), params)}")
        elif wrong := params[key].check(value):
            out.append(f"{who}: {wrong}")
    return out


def params_of(fn: Callable[..., Any]) -> dict[str, Param]:
    """The hyper-parameters of a function: its keyword-only arguments."""
    hints = typing.get_type_hints(fn, include_extras=True)
    found = inspect.signature(fn).parameters.values()
    return {p.name: param_of(p.name, hints[p.name], p.default) for p in found if p.kind is p.KEYWORD_ONLY}
