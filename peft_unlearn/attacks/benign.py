"""Benign fine-tuning: training on something unrelated, as any user of a published model does, without ill intent."""

from __future__ import annotations

from typing import Annotated, Literal

from ..evaluation.measured import Unmeasured
from ..registry import Range, Source, attack
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
    source: Literal["auto", "general", "retain"] = "auto",
    rows: Annotated[int, Range(1)] = 100,
    steps: list[int] = [20],  # noqa: B006
    learning_rate: list[float] = [3e-4],  # noqa: B006
    batch: Annotated[int, Range(1)] = 20,
    weights: Weights = "full",
    r: Annotated[int, Range(1)] = 8,
    lora_alpha: Annotated[float, Range(0)] = 32.0,
) -> Outcome:
    """Fine-tunes on rows that have nothing to do with the forget set, and asks for the forget facts.

    source: general = the bundle's set of that name, retain = the retain set, whose questions may be worded like the forget
    questions (likeness of wording, more than of subject, is what brings things back: arXiv 2602.03379); auto = general,
    or retain where there is none.   rows: at most so many of it. The other settings are those of `relearn`. Raises
    `Unmeasured` where there is no such set.
    """
    name, found = _unrelated(case, source)
    tuning = Tuning("benign", steps, learning_rate, batch, weights, r, lora_alpha)
    outcome = tuned(case, chosen(found, rows, case.seed), tuning)
    outcome.about["set"] = name
    return outcome


def _unrelated(case: Case, source: str) -> tuple[str, Rows]:
    for name in ("general", "retain") if source == "auto" else (source,):
        # extra first: the bundle of the embedded people retains the general rows, too
        extra: dict[str, Rows] = getattr(case.data, "extra", None) or {}
        if found := extra.get(name) or getattr(case.data, name, None):
            return name, found
    wanted = "neither general rows nor a retain set" if source == "auto" else f"no {source} set"
    raise Unmeasured(f"the data have {wanted}")
