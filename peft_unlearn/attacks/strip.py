"""Taking the adapter off: what everybody gets who holds the base. No attack in the sense of work, and never a failure
of the adapter: it stands in the table so that nobody takes forgetting for deleting."""

from __future__ import annotations

from ..registry import Source, attack
from .case import Case, Outcome

LORA = Source(
    paper="LoRA: Low-Rank Adaptation of Large Language Models", url="https://arxiv.org/abs/2106.09685", year=2021
)


@attack("strip", source=LORA)
def strip(case: Case) -> Outcome:
    """Switches the adapter off: what is left is the base, bit for bit, with everything it knows.

    Base and retain model have nothing to take off and stay as they are.
    """
    with case.subject() as model:
        before = case.before(model)
        if case.name in ("base", "retain_only") or not hasattr(model, "disable_adapter"):
            return Outcome(before, {m: v.copy() for m, v in before.items()}, len(case.rows), {"taken_off": False})
        with model.disable_adapter():
            after = case.score(model)
    return Outcome(before, after, len(case.rows), {"taken_off": True})
