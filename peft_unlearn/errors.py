"""What a user did wrong, said so that they can mend it.

`UserError` is what is raised for a user's mistake (exit code 2 of the command line). A defect of this package keeps its own
class, its traceback and another exit code, so that nobody mistakes one for the other.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The input is refused. The message says what happened, which names, why, and what to do.

    problems: the single complaints, where several were collected into one message.
    """

    problems: tuple[str, ...] = ()


class Diverged(UserError):
    """A run that left what can be trained: losses that are not finite, or a kept set that is being lost."""


class Interrupted(Exception):
    """A run ended early for a reason outside the input: a lost resource, or the user's own stop (exit code 3)."""


class Errors:
    """Collects every mistake of one input, so that a user mends them in one go instead of one at a time."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)

    def absorb(self, error: UserError) -> None:
        """Take over the complaints of an error that was collected elsewhere, without its heading."""
        self.messages.extend(error.problems or (str(error),))

    def raise_if_any(self, what: str) -> None:
        """Raise one `UserError` with every message collected; `what` names the input, e.g. ``recipe people.yaml``."""
        if not self.messages:
            return
        if len(self.messages) == 1:
            error = UserError(f"{what}: {self.messages[0]}")
        else:
            lines = "\n".join(f"  {i}. {m}" for i, m in enumerate(self.messages, 1))
            error = UserError(f"{what}: {len(self.messages)} problems\n{lines}")
        error.problems = tuple(self.messages)
        raise error


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for a misspelt name, or the list of known ones when nothing is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name.replace("-", "_"), options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(options)}." if options else ""
