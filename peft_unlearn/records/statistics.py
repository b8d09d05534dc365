"""What may be said of few people, few retain models and many looks."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MIN_RETAIN_MODELS = 5
"""2 ** -5 is the first p-value below 0.05 that `relative_test` can give."""


def upper_bound(hits: int, n: int, alpha: float) -> float:
    """The largest rate p with P(at most `hits` of n) >= alpha: one-sided Clopper-Pearson, at least 1 - alpha sure at any rate.

    Source: Clopper and Pearson, Biometrika 26 (1934). Raises ValueError unless 0 <= hits <= n, n >= 1, 0 < alpha < 1.
    """
    if not (0 <= hits <= n and n >= 1 and 0 < alpha < 1):
        raise ValueError(f"needs 0 <= hits <= n, n >= 1 and 0 < alpha < 1, got {hits}, {n}, {alpha}")
    if hits == n:
        return 1.0
    ways = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(hits + 1)]
    low, high = hits / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_most = (
            sum(math.exp(w + i * math.log(p) + (n - i) * math.log1p(-p)) for i, w in enumerate(ways)) if p < 1 else 0.0
        )
        low, high = (p, high) if at_most > alpha else (low, p)
    return high


@dataclass(frozen=True)
class LeakBound:
    """leaked of `subjects` people; at most the share `upper` of people like them leak, wrong with probability alpha at most."""

    leaked: int
    subjects: int
    upper: float
    alpha: float


def leak_bound(rows: Sequence[float], subjects: Sequence[str], alpha: float) -> LeakBound:
    """Bound on the share of people of whom anything leaks.

    rows: (n,) value accuracy or leak@k of each row: above 0 something leaked. subjects: (n,) whom each row is about. Rows about one
    person stand or fall together, so people are counted and not rows.
    """
    by_subject: dict[str, bool] = {}
    for value, who in zip(rows, subjects, strict=True):
        by_subject[who] = by_subject.get(who, False) or value > 0
    hits, n = sum(by_subject.values()), len(by_subject)
    return LeakBound(hits, n, upper_bound(hits, n, alpha), alpha)


def spent(alpha: float, look: int, claims: int = 1) -> float:
    """What each of `claims` bounds may spend at look 0, 1, ..: 6 alpha / (pi^2 (look + 1)^2) / claims, alpha over all looks together."""
    return 6 * alpha / (math.pi**2 * (look + 1) ** 2) / claims


def mmd2(x: Array, y: Array, bandwidth: float) -> float:
    """Squared maximum mean discrepancy of (n, d) and (m, d) under exp(-|a - b|^2 / (2 bandwidth^2)); biased, so never below 0.

    Source: Gretton et al., JMLR 13 (2012), equation 5.
    """

    def mean_kernel(a: Array, b: Array) -> float:
        return float(np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * bandwidth**2)).mean())  # (n, m, d) -> ()

    return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)


@dataclass(frozen=True)
class Relative:
    """Squared MMD of the unlearned model to the base and to each retain model, and of retain models among themselves.

    p: of "it is no nearer to retain models than to the base".
    """

    to_base: float
    to_retain: list[float]
    spread: list[float]
    p: float


def relative_test(unlearned: Array, base: Array, retain: Sequence[Array]) -> Relative:
    """Is the unlearned model nearer to models that never saw the forget set than to the base?

    Each argument: (rows, features) of the same rows. For each retain model s_j = MMD^2(unlearned, base) - MMD^2(unlearned, retain_j);
    p is `sign_flip_p` of s: exact for this unlearned model and this base where retain models are drawn alike and s_j is symmetric
    around 0 under the null hypothesis. Comparing with one retrain alone gives false alarms,
    since two retrains differ as well: their own distances are `spread`.

    Source: relative tests, Bounliphone et al., arXiv 1511.04581; their use for unlearning after "Regularized f-Divergence Kernel
    Tests" (AISTATS 2026). Both take rows as the sample; here it is the retain models, whose training is what varies.
    Raises ValueError for fewer than `MIN_RETAIN_MODELS` retain models, or more than 16.
    """
    if not MIN_RETAIN_MODELS <= len(retain) <= 16:
        raise ValueError(f"needs {MIN_RETAIN_MODELS} to 16 retain models, got {len(retain)}")
    known = np.concatenate([base, *retain])
    scale = np.where(known.std(0) > 0, known.std(0), 1.0)
    u, b, *others = (a / scale for a in (unlearned, base, *retain))
    pooled = np.concatenate([u, b, *others])
    pooled = pooled[:: max(1, len(pooled) // 500)]
    gaps = np.sqrt(((pooled[:, None] - pooled[None]) ** 2).sum(-1))
    bandwidth = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1.0
    to_base, to_retain = mmd2(u, b, bandwidth), [mmd2(u, r, bandwidth) for r in others]
    s = to_base - np.array(to_retain)
    pairs = [mmd2(x, y, bandwidth) for x, y in itertools.combinations(others, 2)]
    return Relative(to_base, to_retain, pairs, sign_flip_p(s))


def sign_flip_p(s: Array) -> float:
    """Share of the 2^m choices of signs for which the sum of s (m,) is at least the observed one."""
    flips = np.array(list(itertools.product((1.0, -1.0), repeat=len(s)))) @ s  # (2^m,)
    return float((flips >= s.sum() - 1e-12).mean())


def canonical(value: Any) -> bytes:
    """JSON of one spelling: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def commitment(rows: Sequence[Mapping[str, Any]], nonce: str) -> str:
    """What is published of canaries before training: sha256 over nonce and rows. Nobody finds rows from it without the nonce, and
    nobody finds others that fit it.
    """
    return hashlib.sha256(canonical([nonce, list(rows)])).hexdigest()
