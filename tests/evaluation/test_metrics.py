"""Each metric against a literal loop, and against cases worked out by hand."""

from __future__ import annotations

import builtins
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_unlearn.evaluation.measured import Ragged, Unmeasured, bootstrap_ci
from peft_unlearn.evaluation.metrics.extraction import exact_memorization, extraction_strength
from peft_unlearn.evaluation.metrics.generation import python_parses, rouge_l_recall, value_accuracy
from peft_unlearn.evaluation.metrics.likelihood import (
    probability,
    probability_among_choices,
    truth_log_ratio,
    truth_ratio,
)
from peft_unlearn.evaluation.metrics.quality import (
    forget_quality,
    forget_quality_log10_p,
    ks_distance,
    ks_two_sample,
    model_utility,
)
from peft_unlearn.registry import methods

logps = st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=8), min_size=1, max_size=6)
bits = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), min_size=1, max_size=6)
samples = st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=2, max_size=6, unique=True)
quick = settings(max_examples=60, deadline=None)


@quick
@given(logps)
def test_probability_is_exp_of_the_mean(rows: list[list[float]]) -> None:
    wanted = [math.exp(math.fsum(row) / len(row)) for row in rows]
    np.testing.assert_allclose(probability(Ragged.of(rows)), wanted, rtol=1e-12)


@quick
@given(bits)
def test_extraction_strength_by_brute_force(rows: list[list[float]]) -> None:
    wanted = []
    for row in rows:
        n = len(row)
        k = next(k for k in range(n + 1) if all(x == 1.0 for x in row[k:]))
        wanted.append(1 - k / n)
    got = extraction_strength(Ragged.of(rows))
    np.testing.assert_allclose(got, wanted, atol=1e-15)
    em = exact_memorization(Ragged.of(rows))
    np.testing.assert_allclose(em, [sum(row) / len(row) for row in rows], rtol=1e-12)
    assert (got >= 0).all() and (got <= em + 1e-15).all() and (em <= 1).all()


def test_memorization_cases() -> None:
    rows = Ragged.of([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0], [math.nan, 1], []])
    # [1, 1, 1, 0] and [0, 0] are where open-unlearning says 1/n
    np.testing.assert_allclose(extraction_strength(rows), [1, 0.75, 0, 0.25, 0, math.nan, math.nan])
    np.testing.assert_allclose(exact_memorization(rows), [1, 0.75, 0.75, 0.25, 0, math.nan, math.nan])


def test_a_nan_stays_in_its_row() -> None:
    rows = Ragged.of([[-1.0], [math.nan, -1.0], [], [-2.0, -4.0]])
    np.testing.assert_allclose(rows.mean(), [-1, math.nan, math.nan, -3])
    np.testing.assert_allclose(rows.take([3, 0, 3]).flat, [-2, -4, -1, -2, -4])


@quick
@given(
    st.lists(st.tuples(st.floats(-8, 0), st.lists(st.floats(-8, 0), min_size=1, max_size=5)), min_size=1, max_size=5)
)
def test_truth_ratio_by_brute_force(rows: list[tuple[float, list[float]]]) -> None:
    right, wrong = np.array([r for r, _ in rows]), Ragged.of([w for _, w in rows])
    ratios = []
    for r, w in rows:
        geometric = math.prod(math.exp(x) for x in w) ** (1 / len(w))
        ratios.append(math.exp(r) / geometric)
    log_ratio = truth_log_ratio(right, wrong)
    np.testing.assert_allclose(np.exp(log_ratio), ratios, rtol=1e-9)
    np.testing.assert_allclose(truth_ratio(log_ratio, "forget"), [min(r, 1 / r) for r in ratios], rtol=1e-9)
    kept = [max(0.0, 1 - 1 / r) for r in ratios]
    np.testing.assert_allclose(truth_ratio(log_ratio, "retain"), kept, rtol=1e-9, atol=1e-12)
    choice = [math.exp(r) / (math.exp(r) + sum(math.exp(x) for x in w)) for r, w in rows]
    np.testing.assert_allclose(probability_among_choices(Ragged.of([[r] for r in right]), wrong), choice, rtol=1e-9)


def test_truth_ratio_where_probabilities_underflow() -> None:
    log_ratio = truth_log_ratio(np.array([-2000.0, -900.0]), Ragged.of([[-2001.0], [-2.0]]))
    np.testing.assert_allclose(truth_ratio(log_ratio, "forget"), [math.exp(-1), 0.0])
    np.testing.assert_allclose(truth_ratio(log_ratio, "retain"), [1 - math.exp(-1), 0.0])
    np.testing.assert_allclose(probability_among_choices(Ragged.of([[-900.0]]), Ragged.of([[-2.0]])), [0.0])


def test_value_accuracy_cases() -> None:
    cases = [
        ("Ann was born in St. Malo.", "st malo", 1.0),
        ("Ann was born in Parish.", "Paris", 0.0),
        ("He plays the harp.", "harpsichord", 0.0),
        ("It was 1953!", "1953", 1.0),
        ("It was 19530.", "1953", 0.0),
        ("cafe\u0301 society", "CAF\u00c9", 1.0),
        ("She wrote The Amber  Tower", "The Amber Tower", 1.0),
        ("\u5f7c\u306f\u6771\u4eac\u306b\u4f4f\u3080", "\u6771\u4eac", 1.0),  # no spaces in the script
        ("", "Rome", 0.0),
        ("anything", "?!", math.nan),
    ]
    said, gold, wanted = zip(*cases, strict=True)
    np.testing.assert_array_equal(value_accuracy(said, gold), wanted)


def _lcs(a: list[str], b: list[str]) -> int:
    for size in range(min(len(a), len(b)), 0, -1):
        subsequences = set(combinations(a, size))
        if any(c in subsequences for c in combinations(b, size)):
            return size
    return 0


@quick
@given(*[st.lists(st.sampled_from(["red", "dog", "sun", "x1", "mat"]), min_size=1, max_size=6)] * 2)
def test_rouge_l_recall_by_brute_force(said: list[str], gold: list[str]) -> None:
    pytest.importorskip("rouge_score")
    got = rouge_l_recall([" ".join(said)], [" ".join(gold)])
    np.testing.assert_allclose(got, [_lcs(said, gold) / len(gold)])


def test_rouge_uses_the_stemmer_and_refuses_what_it_cannot_read() -> None:
    pytest.importorskip("rouge_score")
    got = rouge_l_recall(["She sails boats", "whatever"], ["She sailed a boat", "\u6771\u4eac"])
    np.testing.assert_allclose(got, [3 / 4, math.nan])


def test_a_missing_package_is_a_reason_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unmeasured, match="rouge-score is not installed"):
        rouge_l_recall(["a"], ["a"])


def _ks_by_counting(a: list[float], b: list[float]) -> tuple[float, float]:
    """D, and p by walking through every way to split the pooled order into two samples."""
    n, m = len(a), len(b)

    def distance(first: set[int]) -> int:  # in units of 1 / (n m), so that comparisons are exact
        d, x, y = 0, 0, 0
        for i in range(n + m):
            x, y = (x + 1, y) if i in first else (x, y + 1)
            d = max(d, abs(x * m - y * n))
        return d

    order = sorted([(v, 0) for v in a] + [(v, 1) for v in b])
    seen = distance({i for i, (_, which) in enumerate(order) if which == 0})
    splits = [distance(set(c)) for c in combinations(range(n + m), n)]
    return seen / (n * m), sum(d >= seen for d in splits) / len(splits)


@settings(max_examples=25, deadline=None)
@given(samples, samples)
def test_ks_by_brute_force(a: list[float], b: list[float]) -> None:
    b = [x + 1e-3 for x in b if x + 1e-3 not in a]  # ties between the samples have no exact distribution
    if len(b) < 2:
        return
    got = ks_two_sample(np.array(a), np.array(b))
    distance, p = _ks_by_counting(a, b)
    assert got.distance == pytest.approx(distance) and got.p == pytest.approx(p, rel=1e-9)
    assert got.log10_p == pytest.approx(math.log10(p), abs=1e-9)
    swapped = ks_two_sample(np.array(b), np.array(a))
    assert swapped.p == pytest.approx(got.p) and swapped.distance == pytest.approx(got.distance)
    # any increasing map of both, any order of rows
    again = ks_two_sample(np.exp(np.array(a[::-1])), np.exp(np.array(b)))
    assert again.p == pytest.approx(got.p)


@pytest.mark.parametrize(("n", "m", "shift"), [(200, 200, 1.5), (150, 90, 0.8), (60, 61, 0.0), (300, 300, 0.05)])
def test_ks_is_scipys(n: int, m: int, shift: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), rng.normal(shift, size=m)
    got, wanted = ks_two_sample(a, b), stats.ks_2samp(a, b, method="exact")
    assert got.distance == pytest.approx(wanted.statistic) and got.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert got == (forget_quality(a, b), forget_quality_log10_p(a, b), ks_distance(a, b))


def test_ks_at_the_ends() -> None:
    """p = 1 and p too small for a float; scipy turns asymptotic at both."""
    apart = ks_two_sample(np.arange(700.0), np.arange(1000.0, 1700.0))
    exact = math.log10(2) - (math.lgamma(1401) - 2 * math.lgamma(701)) / math.log(10)  # 2 / C(1400, 700)
    assert apart.p == 0.0 and apart.distance == 1.0 and apart.log10_p == pytest.approx(exact, abs=1e-6)
    assert ks_two_sample(np.arange(7.0), np.arange(7.0) + 0.5) == pytest.approx((1.0, 0.0, 1 / 7))
    assert ks_two_sample(np.arange(7.0), np.arange(7.0)) == (1.0, 0.0, 0.0)


def test_ks_refuses_what_has_no_answer() -> None:
    with pytest.raises(Unmeasured, match="at least 2 rows"):
        ks_two_sample(np.zeros(1), np.zeros(5))
    with pytest.raises(Unmeasured, match="2 of 6 truth ratios are not finite"):
        ks_two_sample(np.array([1.0, math.nan, math.inf]), np.zeros(3))


@quick
@given(st.lists(st.floats(1e-3, 1), min_size=1, max_size=9))
def test_model_utility_is_the_harmonic_mean(values: list[float]) -> None:
    parts = {f"part{i}": v for i, v in enumerate(values)}
    got = model_utility(parts)
    assert got == pytest.approx(len(values) / math.fsum(1 / v for v in values))
    assert min(values) - 1e-12 <= got <= sum(values) / len(values) + 1e-12
    assert model_utility({**parts, "zero": 0.0}) == 0.0


def test_model_utility_refuses() -> None:
    with pytest.raises(Unmeasured):
        model_utility({})
    with pytest.raises(ValueError):
        model_utility({"a": -0.1})


@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_bootstrap_holds_the_mean_and_repeats(values: list[float], rng: Any) -> None:
    got = bootstrap_ci(np.array(values))
    assert got is not None and got == bootstrap_ci(np.array(values))
    low, high = got
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_bootstrap_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(1).normal(size=400)
    ci = bootstrap_ci(values)
    assert ci is not None
    assert (ci[1] - ci[0]) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert bootstrap_ci(np.ones(1)) is None and bootstrap_ci(np.ones(5)) == (1.0, 1.0)


def test_every_metric_says_what_it_is() -> None:
    found = {m.name: m for m in methods("metric")}
    assert {
        "probability", "rouge_l_recall", "value_accuracy", "extraction_strength", "exact_memorization", "truth_ratio",
        "forget_quality", "forget_quality_log10_p", "ks_distance", "model_utility", "probability_among_choices",
    } <= set(found)  # fmt: skip
    for method in found.values():
        assert method.summary and method.source.url and method.extra["version"] >= 1 and method.extra["better"]


def test_wordings_of_one_fact_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    facts = np.repeat(np.arange(20), 5)
    values = (rng.random(20) < 0.5).astype(float)[facts]  # all wordings of a fact agree
    low, high = bootstrap_ci(values, groups=list(facts))
    once_low, once_high = bootstrap_ci(values[::5])
    naive_low, naive_high = bootstrap_ci(values)
    assert (low, high) == pytest.approx((once_low, once_high), abs=0.06) and high - low > 1.7 * (naive_high - naive_low)
    assert bootstrap_ci(values, groups=[0] * 100) is None  # one fact says nothing of the next
    assert bootstrap_ci(np.ones(4), groups=["a", "a", "a", "b"]) == (1.0, 1.0)
    alone = bootstrap_ci(values, groups=list(range(100)))
    assert alone == pytest.approx((naive_low, naive_high), abs=0.03)  # other draws of the same


def test_python_that_parses():
    fenced = "Here it is:\n```python\ndef f(x):\n    return x\n```\nUse it well."
    cut = "```python\ndef f(x):\n    return x\n\ndef g(y):\n    if y"
    texts = [fenced, cut, "def f(x): return x", "I cannot write code.", "", "```python\ndef f(x:\n```", "x"]
    assert list(python_parses(texts)) == [1, 1, 1, 0, 0, 0, 0]
