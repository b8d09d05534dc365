"""The card of a folder, written or shown. Its text is made in `folder.card`, for new adapters and for this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.atomic import write_text
from ..folder.card import ForgetCard, card_of, render
from ..folder.read import CARD, read_adapter
from ..folder.yaml_io import MAX_CHARACTERS, read_text
from ..reporting.result import Result
from .outgoing import leaks

__all__ = ["CardText", "ForgetCard", "card"]


@dataclass(frozen=True)
class CardText(Result):
    """A card. written: whether it lies at `path` now."""

    path: str
    text: str
    written: bool

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self)}

    def __str__(self) -> str:
        return self.path if self.written else self.text.removesuffix("\n")


def card(folder: str | Path, write: bool = False, description: str = "", license: str | None = None) -> CardText:
    """README.md of a forget adapter as its files say it now; what is written by hand outside the generated block stays.

    Args:
        write: replace the one there.
        description: the author's words (plain text; a blank line ends a paragraph), in place of those there.
        license: an id as the Hub knows them; default the one there.

    Raises:
        UserError: no complete adapter, a front matter or marks that cannot be read, or a text that names a machine.
    """
    found = read_adapter(folder)
    path = found.path / CARD
    existing = read_text(path, limit=MAX_CHARACTERS + 1) if path.is_file() else None
    text = render(card_of(found, description, license), existing)
    if problems := leaks(text, found.path.resolve()):
        raise UserError(f"{path}: {'; '.join(problems)}; nothing was written.")
    if write:
        write_text(path, text)
    return CardText(f"{folder}/{CARD}", text, write)
