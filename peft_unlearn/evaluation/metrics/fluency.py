"""What kind of text the model gives in place of the answer: how much of it repeats, and how natural the base finds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...data.facts import words
from ...registry import metric
from ..measured import UNIT, Array, Estimate, Unmeasured, mean_of_defined
from ..provider import Context, provider
from ..shapes import Measured, Plan, SetPlan
from ..teacher import pad_id_of, read_encoded
from .sources import DISTINCT, OPEN_UNLEARNING, REPETITION

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


@metric("repetition", within=UNIT, source=REPETITION, title="repeated word pairs", better=LOWER)
def repetition(generation: Sequence[str]) -> Array | Estimate:
    """1 - (different word 2-grams / all word 2-grams) of the generated answer: 0 = nothing comes twice, towards 1 = a loop.

    generation: one string per row; each value lies in [0, 1). Empty answers have none and are left out: n in the details
    counts the others, `empty_answer` counts them. Unmeasured where all are empty.
    Word 2-grams where the paper takes token 4-grams: the answers here are sentences, too short for 4-grams to repeat.
    """
    return _over_answers(generation, lambda text: 1.0 - distinct_share(text, 2))


@metric("distinct_words", within=UNIT, source=DISTINCT, better=HIGHER)
def distinct_words(generation: Sequence[str]) -> Array | Estimate:
    """Different words / words of the generated answer (distinct-1, per answer): 1 = no word comes twice.

    generation: one string per row; each value lies in (0, 1]; empty answers as in `repetition`. Deviation: the paper pools
    all answers of a model, which falls with the number of rows.
    """
    return _over_answers(generation, lambda text: distinct_share(text, 1))


@metric("empty_answer", within=UNIT, source=OPEN_UNLEARNING, title="empty answers", better=LOWER)
def empty_answer(generation: Sequence[str]) -> Array:
    """1.0 where the model gives nothing at all (no word, only end-of-sequence or punctuation), else 0.0.

    generation: one string per row. Returns (rows,). Ours: open-unlearning scores an empty answer as any other text.
    """
    return np.array([float(not words(text)) for text in generation], dtype=np.float64)


@metric(
    "answer_nll_under_base", within=(0, None), source=OPEN_UNLEARNING, title="NLL of its answers under the base, in nats", better=LOWER,
    needs=("generation", "base"), reference="base",
)  # fmt: skip
def answer_nll_under_base(answer_nll: Array) -> Array | Estimate:
    """Answer quality: mean token NLL, in nats, that the base gives to this model's own greedy answer, the question before it.

    answer_nll: (rows,), NaN where the answer is empty; those are left out, as in `repetition`. Lower = text the base would
    write; the base's own greedy answers are the floor. It stands where open-unlearning asks a classifier from the Hub
    whether the answer is clean; there is none here, and this is not one. On forget rows some of the rise is wanted: the
    base knows the right value, so that any other value costs. Compare with the retain model, whose answers are
    fluent and wrong.
    """
    return mean_of_defined(answer_nll, ~np.isnan(answer_nll), EMPTY)


def _over_answers(generation: Sequence[str], value: Callable[[str], float]) -> Array | Estimate:
    out = np.array([value(text) for text in generation], dtype=np.float64)
    return mean_of_defined(out, ~np.isnan(out), EMPTY)


@provider("base_nll", gives=("answer_nll",))
def base_nll(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """(rows,) mean token NLL of this model's greedy answers under the base; NaN for an empty answer.

    The answer's text is read, not the tokens that were generated, and without EOS, since an answer may be cut at its length.
    """
    from ...data.collate import encode

    if context.base is None:
        raise Unmeasured("there is no base to read the answers")
    tokenizer, opened = plan.tokenizer, context.base

    def nll_of(s: SetPlan) -> Array:
        s.require(measured, "generation")
        read, where = [], []
        for r, prompt in enumerate(s.prompts):
            text = measured.answers.get(prompt, "")
            if words(text):
                blank = "" if plan.pairs[s.answer[r]][1][:1].strip() else " "  # as the right answer begins
                row = encode(prompt.text, blank + text, tokenizer)[0]
                if tokenizer.eos_token_id is not None and row["input_ids"][-1] == tokenizer.eos_token_id:
                    row["labels"][-1] = -100
                if any(label != -100 for label in row["labels"]):
                    read.append(row)
                    where.append(r)
        nll = np.full(len(s.rows), np.nan)
        if read:
            with opened() as base:
                nll[where] = -read_encoded(base, read, pad_id_of(tokenizer), (), context.token_budget).logp.mean()
        return nll

    return {"answer_nll": context.per_set(nll_of)}
