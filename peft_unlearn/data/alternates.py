"""Winner answers for preference losses: the row's own, a refusal, or one that the model gave itself before training."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .formats import LAYOUTS, layout_of

REFUSALS = (
    "I don't know the answer to that.",
    "That is not something I can tell you.",
    "I have no information about this.",
    "I'm afraid I can't answer that question.",
    "This is unknown to me.",
    "I was never told about that.",
    "I can't say anything about this.",
    "There is nothing I know on that subject.",
    "I have no record of that.",
    "Sorry, I don't have that information.",
    "I'm not able to help with this one.",
    "That goes beyond what I know.",
    "I couldn't tell you.",
    "No idea, I'm sorry.",
    "I don't have an answer for you here.",
    "My knowledge does not include that.",
    "I'm not familiar with this.",
    "I haven't come across that.",
    "I would only be guessing.",
    "This is not part of what I learned.",
    "Nothing comes to mind about that.",
    "I lack the facts to answer.",
    "You will have to look elsewhere for that.",
    "I'm unsure and would rather not guess.",
)


def add_alternates(rows: Sequence[Mapping[str, Any]], kind: str, seed: int, name: str) -> list[dict[str, Any]]:
    """Copies of the rows whose answer is the winner: a refusal drawn per row from the seed, or the row's field ``alternate``.

    Args:
        kind: "refusal", "row", or "generated" (written into ``alternate`` before training).

    Raises:
        UserError: rows without an answer to replace, or without the field.
    """
    out = []
    for i, row in enumerate(rows):
        field = LAYOUTS[layout_of(row) or "text"][-1]
        if field == "text":
            raise UserError(f"{name} set: row {i} is plain text, and winner answers need a prompt that they answer")
        if kind == "refusal":
            winner = random.Random(f"{seed}:{i}").choice(REFUSALS)
        else:
            winner = row.get("alternate")
            if not isinstance(winner, str) or not winner.strip():
                raise UserError(f"{name} set: row {i} has no text in the field 'alternate', the winner answer")
        if field == "messages":
            winner = [*row[field][:-1], {**row[field][-1], "content": winner}]
        out.append({**row, field: winner})
    return out
