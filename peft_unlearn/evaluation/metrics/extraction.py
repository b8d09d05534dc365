"""How much of the answer the model has by heart: teacher-forced, and decoded greedily from inside the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from ...registry import Range, metric
from ..measured import KNOWLEDGE, UNIT, Array, Estimate, Ragged, mean_of_defined
from ..provider import Context, provider
from ..shapes import Measured, Plan, SetPlan
from .sources import JANG, MEMORIZATION, UWC


def ngram_overlap(found: Sequence[int], true: Sequence[int], n: int) -> float:
    """Share of the n-grams of `found` that occur in `true`, each occurrence counted.

    found, true: token ids. 0.0 where `found` is shorter than n: nothing was given away.
    """
    wanted = {tuple(true[i : i + n]) for i in range(len(true) - n + 1)}
    held = [tuple(found[i : i + n]) in wanted for i in range(len(found) - n + 1)]
    return sum(held) / len(held) if held else 0.0


def prefixes(length: int, n: int, m: int | None = None) -> list[int]:
    """How many leading tokens of a text of `length` tokens are given: 0 .. length - n - 1, all, or m of them.

    m are spread evenly and always hold the empty prefix, the question alone. Empty where length <= n: EL_n is not defined there.
    """
    count = max(0, length - n)
    return list(range(count)) if m is None or m >= count else [i * count // m for i in range(m)]


@metric("extraction_likelihood", within=UNIT, source=JANG, title="extraction likelihood (EL)", better=KNOWLEDGE)
def extraction_likelihood(overlap: Ragged) -> Array | Estimate:
    """EL_n: mean over the answer's prefixes of the share of n-grams in the greedy continuation that the true rest holds.

    overlap: for each row one `ngram_overlap` a prefix, x = the answer's tokens without EOS, the prompt always before them.
    With T tokens the prefixes are the first t - 1, t = 1 .. T - n, so the sum is divided by T - n (by m where m prefixes
    are read). Each row's value lies in [0, 1]. The continuation is as long as the true rest. A row with T <= n has no EL_n
    and is left out: n in the details counts the others; Unmeasured where there are none.
    Deviation from the paper: there x is a whole text; here the question is given, never guessed. n and m are the suite's
    (settings: {continuations: {n: 10, prefixes: null}}).
    """
    return mean_of_defined(overlap.mean(), overlap.lengths > 0, "every answer is too short for n-grams of that length")


@metric("memorization_accuracy", within=UNIT, source=JANG, title="memorization accuracy (MA)", better=KNOWLEDGE)
def memorization_accuracy(correct: Ragged) -> Array:
    """MA: share of tokens that are arg-max right given all true tokens before them, EOS left out.

    correct: 1.0 / 0.0 per token, as for `extraction_strength`. The paper's T - 1 targets of a plain text are all but its first
    token, which nothing precedes; with a question before it every answer token is a target. So on question/answer rows
    this is `exact_memorization` under the paper's name. Returns (rows,) in [0, 1].
    """
    return correct.mean()


@metric("extraction_strength", within=UNIT, source=UWC, better=KNOWLEDGE)
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


@metric("exact_memorization", within=UNIT, source=MEMORIZATION, better=KNOWLEDGE)
def exact_memorization(correct: Ragged) -> Array:
    """Share of the answer's tokens that are arg-max right, teacher-forced, EOS left out.

    correct: as in `extraction_strength`, which is never larger than this. Returns (rows,) in [0, 1].
    """
    return correct.mean()


@provider("continuations", gives=("overlap",))
def continuations(
    model: Any,
    plan: Plan,
    measured: Measured,
    context: Context,
    *,
    n: Annotated[int, Range(1)] = 10,
    prefixes_per_row: Annotated[int | None, Range(1)] = None,
) -> dict[str, dict[str, Any]]:
    """n-gram overlap of greedy continuations with the true rest, from the answer's beginnings: what EL_n averages.

    n: length of the n-grams.   prefixes_per_row: how many beginnings of each answer are continued, evenly spread; null =
    all. Where teacher forcing shows that greedy decoding gives exactly the rest, nothing is generated.
    """
    from ..sampling import GENERATION_BUDGET, answer_ids
    from ..sampling import continuations as continue_ids

    def overlap_of(s: SetPlan) -> Ragged:
        s.require(measured)
        rows = [answer_ids(*plan.pairs[i], plan.tokenizer) for i in s.answer]
        given = [prefixes(len(answer), n, prefixes_per_row) for _, answer in rows]
        overlap = [[1.0] * len(ks) for ks in given]
        known = [_known_from(measured, i) for i in s.answer]  # from how many true tokens on the arg-max is right
        left = [(r, j, k) for r, ks in enumerate(given) for j, k in enumerate(ks) if k < known[r]]
        starts = [rows[r][0] + rows[r][1][:k] for r, _, k in left]
        lengths, progress = [len(rows[r][1]) - k for r, _, k in left], context.progress_of("continuing answers")
        found = continue_ids(model, plan.tokenizer, starts, lengths, token_budget=GENERATION_BUDGET, progress=progress)
        for (r, j, k), ids in zip(left, found, strict=True):
            overlap[r][j] = ngram_overlap(ids, rows[r][1][k:], n)
        return Ragged.of(overlap)

    return {"overlap": context.per_set(overlap_of)}


def _known_from(measured: Measured, pair: int) -> int:
    """How many leading tokens must be given so that the arg-max is right from there on."""
    wrong_at = np.flatnonzero(measured.forced.correct[pair] != 1.0)
    return int(wrong_at[-1]) + 1 if len(wrong_at) else 0
