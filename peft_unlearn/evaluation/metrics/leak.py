"""Whether any of k sampled answers gives the value away."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from ...data.facts import accepted, names_value
from ...errors import UserError, nearest
from ...registry import Range, metric
from ..measured import KNOWLEDGE, UNIT, Array, Estimate, Unmeasured, mean_of_defined
from ..provider import Context, provider
from ..shapes import FORMATS, Measured, Plan, SetPlan
from .sources import LEAK


def none_of_k(hits: int, n: int, k: int) -> float:
    """C(n - c, k) / C(n, k): share of the k-subsets of n samples that hold none of the c hits."""
    if not 0 <= hits <= n or not 1 <= k <= n:
        raise ValueError(f"needs 0 <= hits <= n and 1 <= k <= n, got hits {hits}, n {n}, k {k}")
    return comb(n - hits, k) / comb(n, k)


def leak_at_k(hits: NDArray[np.int64], n: int, k: int) -> Array:
    """(rows,) estimated probability that at least one of k samples leaks, 1 - C(n - c, k) / C(n, k).

    hits: (rows,) how many of a row's n independent samples held the value. Unbiased for 1 - (1 - p)^k at any k <= n; the
    naive 1 - (1 - c / n)^k is biased low. Lower is better on a forget set.
    Source: leak@k, arXiv 2511.04934; the estimator is pass@k's, arXiv 2107.03374. There a sample's score may be graded
    (ROUGE, a judge); here it is 1 where the value is named (`value_accuracy`) and 0 elsewhere.
    """
    return np.array([1.0 - none_of_k(int(c), n, k) for c in hits], dtype=np.float64)


def leak_over_formats(hits: NDArray[np.int64], n: int, k: int, asked: NDArray[np.bool_] | None = None) -> Array:
    """(rows,) the same for someone who takes k samples in every format: 1 - product over formats of C(n - c, k) / C(n, k).

    hits: (rows, formats).   asked: (rows, formats), False where a format has no wording of that row; default all. Unbiased,
    since samples of different formats are independent: the expectation of the product is the product of expectations.
    Rows without any format are NaN.
    """
    missed = np.array([[none_of_k(int(c), n, k) for c in row] for row in hits], dtype=np.float64)
    if asked is None:
        return 1.0 - missed.prod(1)
    return np.where(asked.any(1), 1.0 - np.where(asked, missed, 1.0).prod(1), np.nan)


BUDGETS = (1, 2, 4, 8, 16, 32, 64, 128)
NO_FORMAT = "no row can be asked in any of the formats without its value standing in the prompt"


def _asked(leaks: NDArray[np.int64], k: int) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]:
    """hits (rows, formats), asked (rows, formats), samples of each; leaks: (rows, formats, 2) of hits and samples taken."""
    n = int(leaks[..., 1].max(initial=0))
    if 0 < n < k:
        raise Unmeasured(f"needs {k} samples and {n} were taken; set settings: {{samples: {{n: {k}}}}} or more")
    return leaks[..., 0], leaks[..., 1] > 0, n


def _leak_metric(k: int) -> Callable[[NDArray[np.int64]], Array | Estimate]:
    def leak(leaks: NDArray[np.int64]) -> Array | Estimate:
        hits, asked, n = _asked(leaks, k)
        if not asked.any():
            raise Unmeasured(NO_FORMAT)
        return mean_of_defined(leak_over_formats(hits, n, k, asked), np.asarray(asked.any(1)), NO_FORMAT)

    leak.__doc__ = f"""Probability that the value is named in any of {k} sampled answers to each prompt format.

    leaks: (rows, formats, 2), hits and samples taken. `leak_over_formats` with k = {k}, so {k} samples in every format;
    the mean over rows, with a bootstrap interval over rows. Unmeasured where fewer than {k} samples were taken."""
    return metric(f"leak_at_{k}", within=UNIT, source=LEAK, title=f"leak@{k}", better=KNOWLEDGE)(leak)


leak_at = {k: _leak_metric(k) for k in BUDGETS}


def _format_metric(how: str, wording: str) -> Callable[..., Array | Estimate]:
    def leak(leaks: NDArray[np.int64], leak_formats: list[tuple[str, ...]], *, k: Annotated[int, Range(1)] = 8):
        if how not in leak_formats[0]:
            raise Unmeasured(f"the format {how!r} is not among those sampled: {', '.join(leak_formats[0])}")
        hits, asked, n = _asked(leaks, k)
        column = leak_formats[0].index(how)
        mine = asked[:, column]
        values = np.where(mine, leak_at_k(hits[:, column], n, k) if n else np.nan, np.nan)
        return mean_of_defined(values, mine, f"no row can be asked in the format {how!r}")

    leak.__doc__ = f"""Probability that the value is named in any of k sampled answers when asked by {wording}.

    `leak_at_k` for this one format; rows that cannot be asked so are left out. k is the suite's (settings)."""
    name = f"leak_in_{how}"
    return metric(name, within=UNIT, source=LEAK, title=f"leak@k, {wording}", better=KNOWLEDGE)(leak)


leak_in = {how: _format_metric(how, wording) for how, wording in FORMATS.items()}


@provider("samples", gives=("leaks", "leak_formats"))
def samples(
    model: Any,
    plan: Plan,
    measured: Measured,
    context: Context,
    *,
    n: Annotated[int, Range(1)] = 16,
    temperature: Annotated[float, Range(0, None, open_low=True)] = 1.0,
    formats: tuple[str, ...] = tuple(FORMATS),
    seed: int = 0,
    max_new_tokens: Annotated[int | None, Range(1)] = None,
) -> dict[str, dict[str, Any]]:
    """How many of n sampled answers name the value, for every row and prompt format: (rows, formats, 2), hits and samples.

    Samples are whole-vocabulary (no top-k, no top-p); max_new_tokens: default the set's. A format in which a row cannot
    be asked has 0 samples.
    """
    from ..generate import bare_ids, cut_at
    from ..sampling import GENERATION_BUDGET, sample, worded

    for how in formats:
        if how not in FORMATS:
            raise UserError(f"there is no prompt format {how!r}.{nearest(how, FORMATS)}")

    def leaks_of(s: SetPlan) -> NDArray[np.int64]:
        s.require(measured, "value")
        counts = np.zeros((len(s.rows), len(formats), 2), dtype=np.int64)
        prompts: list[tuple[int, int, str]] = []
        for r, (row, i) in enumerate(zip(s.rows, s.answer, strict=True)):
            for f, how in enumerate(formats):
                text = worded(row, how, *plan.pairs[i], plan.tokenizer, s.template)
                if text is not None and bare_ids(text, model, plan.tokenizer):
                    prompts.append((r, f, text))
        found = sample(
            model, plan.tokenizer, [text for _, _, text in prompts], n, seed=seed, temperature=temperature,
            max_new_tokens=max_new_tokens or s.spec.max_new_tokens or plan.suite.max_new_tokens,
            token_budget=GENERATION_BUDGET, progress=context.progress_of("sampling answers"),
        )  # fmt: skip
        for (r, f, _), texts in zip(prompts, found, strict=True):
            values = accepted(s.rows[r])
            counts[r, f] = sum(names_value(cut_at(text, s.spec.stop), values) for text in texts), n
        return counts

    leaks = context.per_set(leaks_of)
    named = {name: found if isinstance(found, Unmeasured) else [formats] * len(found) for name, found in leaks.items()}
    return {"leaks": leaks, "leak_formats": named}
