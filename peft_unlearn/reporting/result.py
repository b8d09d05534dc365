"""What every command gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from .document import Part


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
