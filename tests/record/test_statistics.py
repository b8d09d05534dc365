"""Each statistic against scipy, against brute force, or against what it promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import beta, binom

from peft_unlearn.records.statistics import commitment, leak_bound, mmd2, relative_test, sign_flip_p, spent, upper_bound


@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.005])
def test_upper_bound_is_clopper_pearsons(alpha):
    for n in (1, 2, 10, 97, 1000):
        for hits in {0, 1, n // 3, n - 1, n}:
            wanted = 1.0 if hits == n else float(beta.ppf(1 - alpha, hits + 1, n - hits))
            assert upper_bound(hits, n, alpha) == pytest.approx(wanted, abs=1e-9)
    for bad in ((-1, 3, 0.1), (4, 3, 0.1), (0, 0, 0.1), (0, 3, 0.0)):
        with pytest.raises(ValueError, match="needs 0 <= hits"):
            upper_bound(*bad)


def test_the_bound_holds_as_often_as_it_says():
    """Exactly, not by sampling: over all outcomes, the bound lies below the rate with probability alpha at most."""
    for n, rate in ((10, 0.2), (10, 0.05), (40, 0.5)):
        missed = sum(binom.pmf(k, n, rate) for k in range(n + 1) if upper_bound(k, n, 0.05) < rate)
        assert missed <= 0.05


def test_people_are_counted_and_not_rows():
    rows, who = [0.0, 0.3, 1.0, 0.0, 0.0, 0.0], ["a", "a", "a", "b", "c", "c"]
    found = leak_bound(rows, who, 0.05)
    assert (found.leaked, found.subjects) == (1, 3)
    assert found.upper == pytest.approx(beta.ppf(0.95, 2, 2))
    assert found.upper > upper_bound(2, 6, 0.05)
    with pytest.raises(ValueError):
        leak_bound([0.0], ["a", "b"], 0.05)


def test_all_looks_together_spend_alpha():
    assert sum(spent(0.05, j) for j in range(200_000)) == pytest.approx(0.05, rel=1e-4)
    assert spent(0.05, 3, 4) == spent(0.05, 3) / 4


def test_mmd_against_the_double_sum():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 2)), rng.normal(1, 2, size=(5, 2))

    def k(a, b):
        return math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * 0.7**2))

    def mean(a, b):
        return sum(k(p, q) for p in a for q in b) / (len(a) * len(b))

    assert mmd2(x, y, 0.7) == pytest.approx(mean(x, x) + mean(y, y) - 2 * mean(x, y), abs=1e-12)
    assert mmd2(x, x, 0.7) == pytest.approx(0, abs=1e-12)


def model(rng, center):
    """100 rows of a model around `center`, with a shift of its own as seeds give."""
    return center + rng.normal(0, 0.3, size=(1, 2)) + rng.normal(size=(100, 2))


def test_near_the_retain_models_near_the_base_and_in_between():
    rng = np.random.default_rng(1)
    retain = [model(rng, 0.0) for _ in range(5)]
    base = model(rng, 4.0)
    near = relative_test(model(rng, 0.0), base, retain)
    assert near.p == 2**-5 and max(near.to_retain) < near.to_base and len(near.spread) == 10
    assert relative_test(model(rng, 4.0), base, retain).p == 1.0
    with pytest.raises(ValueError, match="5 to 16 retain models"):
        relative_test(base, base, retain[:4])


def test_the_signs_are_wrong_exactly_as_rarely_as_they_say():
    """Of all signs that symmetric values can have, 1 in 32 is called 1/32, 2 in 32 at most 2/32, and so on."""
    size = np.array([0.3, 1.1, 0.7, 2.3, 0.05])
    p = np.sort([sign_flip_p(size * signs) for signs in itertools.product((1, -1), repeat=5)])
    assert np.allclose(p, np.arange(1, 33) / 32)


def test_a_commitment_holds_its_rows():
    rows = [{"question": "q", "answer": "a"}]
    one = commitment(rows, "nonce")
    assert one == commitment([{"answer": "a", "question": "q"}], "nonce") and len(one) == 64
    assert (
        len(
            {
                one,
                commitment(rows, "other"),
                commitment([*rows, *rows], "nonce"),
                commitment([{"question": "q", "answer": "b"}], "nonce"),
            }
        )
        == 4
    )
