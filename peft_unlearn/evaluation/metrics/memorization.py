"""How much of the answer the model has by heart, teacher-forced: no generation, one forward for each answer."""

from __future__ import annotations

import numpy as np

from ...registry import Source, metric
from ..measured import KNOWLEDGE, Array, Ragged

UWC = Source(
    paper="Towards Effective Evaluations and Comparisons for LLM Unlearning Methods",
    url="https://arxiv.org/abs/2406.09179",
    year=2025,
)
MEMORIZATION = Source(
    paper="Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models",
    url="https://arxiv.org/abs/2205.10770",
    year=2022,
)


@metric("extraction_strength", source=UWC, better=KNOWLEDGE)
def extraction_strength(correct: Ragged) -> Array:
    """1 - k/n, k = the fewest leading answer tokens that must be given until all the rest are arg-max right.

    correct: 1.0 where the teacher-forced arg-max is the token, else 0.0, EOS left out. Returns (rows,) in [0, 1]; 1
    = the question alone yields the whole answer, 0 = not even the last token comes. NaN for an answer without tokens
    or with a NaN among them. Deviation from open-unlearning: there an answer whose last token is wrong scores 1/n,
    as if it were right; here it is 0. The paper counts words and generates; this is the token-level, teacher-forced
    form of open-unlearning.
    """
    position = np.arange(len(correct.flat)) - correct.offsets[correct.row_of] + 1
    needed = np.zeros(len(correct))
    np.maximum.at(needed, correct.row_of, np.where(correct.flat == 1.0, 0, position))
    with np.errstate(invalid="ignore", divide="ignore"):
        strength = 1.0 - needed / correct.lengths
    return np.where(np.isnan(correct.mean()), np.nan, strength)


@metric("exact_memorization", source=MEMORIZATION, better=KNOWLEDGE)
def exact_memorization(correct: Ragged) -> Array:
    """Share of the answer's tokens that are arg-max right, teacher-forced, EOS left out.

    correct: as in `extraction_strength`, which is never larger than this. Returns (rows,) in [0, 1].
    """
    return correct.mean()
