"""What every command gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .document import Part


def json_ready(value: Any) -> Any:
    """Dataclasses by their own `to_dict`, or field by field; mappings and sequences of them."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {k: json_ready(v) for k, v in value.items()}
    return [json_ready(v) for v in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def fields_of(value: Any, **renamed: str) -> dict[str, Any]:
    """A dataclass's fields, JSON-ready. renamed: field -> its key in the JSON."""
    return {renamed.get(f.name, f.name): json_ready(getattr(value, f.name)) for f in fields(value)}


class Result(ABC):
    """The result of a command: a dataclass that can be read by a program (`to_dict`), by a person (`str`) and by a shell (`exit_code`).

    Subclasses are dataclasses whose fields are what a Python user works with. ``title`` heads the document made of `parts`.
    """

    title = ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in the documented shape; the only place where a result becomes a plain mapping."""

    @abstractmethod
    def __str__(self) -> str:
        """What the command prints on a terminal."""

    @property
    def exit_code(self) -> int:
        """0 done, 1 a check answered no."""
        return 0

    def parts(self) -> list[Part]:
        """The result as a document; empty where there is none."""
        return []

    def remarks(self) -> list[str]:
        """What a user should know beside the result; a command prints it to standard error."""
        return []
