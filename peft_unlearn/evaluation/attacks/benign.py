"""Benign fine-tuning: training on something unrelated, as any user of a published model does, without ill intent."""

from __future__ import annotations

from typing import Annotated

from ...registry import Range, Source, attack
from ..measured import Unmeasured
from .case import Case, Outcome, Rows, chosen
from .relearn import Tuning, Weights, tuned

BENIGN = Source(
    paper="Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via Benign Relearning",
    url="https://arxiv.org/abs/2406.13356",
    year=2025,
)


@attack("benign", source=BENIGN, faithful="reconstructed")
def benign(
    case: Case,
    *,
    rows: Annotated[int, Range(1)] = 100,
    steps: list[int] = [20],  # noqa: B006
    learning_rate: list[float] = [3e-4],  # noqa: B006
    batch: Annotated[int, Range(1)] = 20,
    weights: Weights = "full",
    r: Annotated[int, Range(1)] = 8,
    lora_alpha: Annotated[float, Range(0)] = 32.0,
) -> Outcome:
    """Fine-tunes on rows that have nothing to do with the forget set, and asks for the forget facts.

    Rows: at most `rows` of the bundle's ``general`` set, or of the retain set where it has none. The other settings are
    those of `relearn`. Raises `Unmeasured` where there is neither.
    """
    name, found = _unrelated(case)
    tuning = Tuning("benign", steps, learning_rate, batch, weights, r, lora_alpha)
    outcome = tuned(case, chosen(found, rows, case.seed), tuning)
    outcome.about["set"] = name
    return outcome


def _unrelated(case: Case) -> tuple[str, Rows]:
    general = (getattr(case.data, "extra", None) or {}).get("general")
    if general:
        return "general", general
    if retain := getattr(case.data, "retain", None):
        return "retain", retain
    raise Unmeasured("the data have neither general rows nor a retain set")
