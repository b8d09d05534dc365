"""What greedy decoding gives away when it is started inside the answer, not only at its beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from ...registry import Range, Source, metric
from ..measured import KNOWLEDGE, Array, Estimate, Ragged, mean_of_defined
from ..provider import Context, provider
from ..shapes import Measured, Plan

JANG = Source(
    paper="Knowledge Unlearning for Mitigating Privacy Risks in Language Models",
    url="https://arxiv.org/abs/2210.01504",
    year=2023,
)


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


@metric("extraction_likelihood", source=JANG, title="extraction likelihood (EL)", better=KNOWLEDGE)
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


@metric("memorization_accuracy", source=JANG, title="memorization accuracy (MA)", better=KNOWLEDGE)
def memorization_accuracy(correct: Ragged) -> Array:
    """MA: share of tokens that are arg-max right given all true tokens before them, EOS left out.

    correct: 1.0 / 0.0 per token, as for `extraction_strength`. The paper's T - 1 targets of a plain text are all but its first
    token, which nothing precedes; with a question before it every answer token is a target. So on question/answer rows
    this is `exact_memorization` under the paper's name. Returns (rows,) in [0, 1].
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
    from ..generate import arg_max_is_greedy
    from ..sampling import GENERATION_BUDGET, answer_ids
    from ..sampling import continuations as continue_ids

    out: dict[str, Any] = {}
    greedy = arg_max_is_greedy(model)
    for name, s in context.sets.items():
        if wrong := s.unreadable(measured):
            out[name] = wrong
            continue
        rows = [answer_ids(*plan.pairs[i], plan.tokenizer) for i in s.answer]
        given = [prefixes(len(answer), n, prefixes_per_row) for _, answer in rows]
        overlap = [[1.0] * len(lengths) for lengths in given]
        known = [_known_from(measured, i) if greedy else None for i in s.answer]
        open_ = [(r, j, k) for r, ks in enumerate(given) for j, k in enumerate(ks) if known[r] is None or k < known[r]]
        found = continue_ids(
            model,
            plan.tokenizer,
            [rows[r][0] + rows[r][1][:k] for r, _, k in open_],
            [len(rows[r][1]) - k for r, _, k in open_],
            token_budget=GENERATION_BUDGET,
            progress=context.progress_of("continuing answers"),
        )
        for (r, j, k), ids in zip(open_, found, strict=True):
            overlap[r][j] = ngram_overlap(ids, rows[r][1][k:], n)
        out[name] = Ragged.of(overlap)
    return {"overlap": out}


def _known_from(measured: Measured, pair: int) -> int:
    """How many leading tokens must be given so that the arg-max is right from there on."""
    wrong_at = np.flatnonzero(measured.forced.correct[pair] != 1.0)
    return int(wrong_at[-1]) + 1 if len(wrong_at) else 0
