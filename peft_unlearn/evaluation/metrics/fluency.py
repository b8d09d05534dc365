"""What kind of text the model says in place of the answer: how much of it repeats, and how natural the base finds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...registry import Source, metric
from ..measured import Array, Estimate
from .extraction import mean_of_defined
from .generation import words

REPETITION = Source(
    paper="Neural Text Generation with Unlikelihood Training", url="https://arxiv.org/abs/1908.04319", year=2020
)
DISTINCT = Source(
    paper="A Diversity-Promoting Objective Function for Neural Conversation Models",
    url="https://arxiv.org/abs/1510.03055",
    year=2016,
)
OPEN_UNLEARNING = Source(
    paper="OpenUnlearning: Accelerating LLM Unlearning via Unified Benchmarking of Methods and Metrics",
    url="https://arxiv.org/abs/2506.12618",
    year=2025,
)
LOWER = {"forget": "lower", "retain": "lower", "holdout": "lower"}
EMPTY = "every generated answer is empty; empty_answer counts them"
HIGHER = {"forget": "higher", "retain": "higher", "holdout": "higher"}


def distinct_share(text: str, n: int) -> float:
    """Different n-grams of words / all n-grams of words. NaN for a text without words; 1.0 for one of 1 to n - 1 words,
    which cannot repeat an n-gram."""
    found = words(text).split()
    if not found:
        return float("nan")
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


@metric("repetition", source=REPETITION, needs=("generation",), better=LOWER, reference=None, version=1)
def repetition(generation: Sequence[str]) -> Array | Estimate:
    """1 - (different word 2-grams / all word 2-grams) of the generated answer: 0 = nothing comes twice, towards 1 = a loop.

    generation: one string per row; each value lies in [0, 1). Empty answers have none and are left out: n in the details
    counts the others, `empty_answer` counts them. Unmeasured where all are empty.
    Word 2-grams where the paper takes token 4-grams: the answers here are sentences, too short for 4-grams to repeat.
    """
    return _of_said(generation, lambda text: 1.0 - distinct_share(text, 2))


@metric("distinct_words", source=DISTINCT, needs=("generation",), better=HIGHER, reference=None, version=1)
def distinct_words(generation: Sequence[str]) -> Array | Estimate:
    """Different words / words of the generated answer (distinct-1, per answer): 1 = no word comes twice.

    generation: one string per row; each value lies in (0, 1]; empty answers as in `repetition`. Deviation: the paper pools
    all answers of a model, which falls with the number of rows.
    """
    return _of_said(generation, lambda text: distinct_share(text, 1))


@metric("empty_answer", source=OPEN_UNLEARNING, needs=("generation",), better=LOWER, reference=None, version=1)
def empty_answer(generation: Sequence[str]) -> Array:
    """1.0 where the model says nothing at all (no word, only end-of-sequence or punctuation), else 0.0.

    generation: one string per row. Returns (rows,). Ours: open-unlearning scores an empty answer as any other text.
    """
    return np.array([float(not words(text)) for text in generation], dtype=np.float64)


@metric(
    "answer_nll_under_base",
    source=OPEN_UNLEARNING,
    needs=("generation", "base"),
    better=LOWER,
    reference="base",
    version=1,
)
def answer_nll_under_base(said_nll: Array) -> Array | Estimate:
    """Answer quality: mean token NLL, in nats, that the base gives to this model's own greedy answer, the question before it.

    said_nll: (rows,), NaN where the answer is empty; those are left out, as in `repetition`. Lower = text the base would
    write; the base's own greedy answers are the floor. It stands where open-unlearning asks a classifier from the Hub
    whether the answer is clean; there is none here, and this is not one. On forget rows some of the rise is wanted: the
    base knows the right value, so that any other value costs. Compare with the retain-only model, whose answers are
    fluent and wrong.
    """
    return mean_of_defined(said_nll, ~np.isnan(said_nll), EMPTY)


def _of_said(generation: Sequence[str], value: Callable[[str], float]) -> Array | Estimate:
    out = np.array([value(text) for text in generation], dtype=np.float64)
    return mean_of_defined(out, ~np.isnan(out), EMPTY)
