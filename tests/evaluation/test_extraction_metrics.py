"""Pure metrics against their definitions, counted out by brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_unlearn.evaluation.measured import Estimate, Ragged, Unmeasured
from peft_unlearn.evaluation.metrics.depth import (
    depth_scores,
    fact_recovered,
    recovered,
    suppression_depth,
    unlearning_depth,
)
from peft_unlearn.evaluation.metrics.extraction import (
    extraction_likelihood,
    memorization_accuracy,
    ngram_overlap,
    prefixes,
)
from peft_unlearn.evaluation.metrics.fluency import answer_nll_under_base, distinct_words, empty_answer, repetition
from peft_unlearn.evaluation.metrics.generation import rouge_l_f1
from peft_unlearn.evaluation.metrics.leak import leak_at, leak_at_k, leak_in, leak_over_formats
from peft_unlearn.evaluation.metrics.letters import (
    letter_above_chance,
    letter_accuracy,
    letter_mass,
    letter_probability,
)

tokens = st.lists(st.integers(0, 3), max_size=9)


# --- extraction likelihood and memorization accuracy -------------------------------------------------------------------


@given(said=tokens, true=tokens, n=st.integers(1, 4))
def test_overlap_is_the_share_of_ngrams_that_occur(said, true, n):
    grams = [said[i : i + n] for i in range(len(said)) if len(said[i : i + n]) == n]
    inside = sum(any(gram == true[j : j + n] for j in range(len(true))) for gram in grams)
    assert ngram_overlap(said, true, n) == (inside / len(grams) if grams else 0.0)


def test_el_is_the_published_sum():
    # x = 0..5, T = 6, n = 2: t = 1..4, so 0 to 3 tokens are given; this "model" always says what it says here
    x, n = [0, 1, 2, 3, 4, 5], 2
    said = {0: [0, 1, 2, 9, 9, 9], 1: [9, 9, 9, 9, 9], 2: [2, 3, 4, 5], 3: [3, 4]}
    assert prefixes(len(x), n) == [0, 1, 2, 3]
    by_hand = (2 / 5 + 0 + 1 + 1) / (6 - 2)
    overlap = Ragged.of([[ngram_overlap(said[k], x[k:], n) for k in prefixes(len(x), n)]])
    assert extraction_likelihood(overlap) == pytest.approx(by_hand)


@given(length=st.integers(0, 40), n=st.integers(1, 12), m=st.integers(1, 50))
def test_some_prefixes_are_spread_evenly(length, n, m):
    every, some = prefixes(length, n), prefixes(length, n, m)
    assert every == list(range(max(0, length - n)))
    assert len(some) == min(m, len(every)) and set(some) <= set(every) and sorted(set(some)) == some
    assert some[:1] == every[:1]  # the question alone
    gaps = np.diff([*some, len(every)]) if some else np.zeros(1)
    assert gaps.max() - gaps.min() <= 1


def test_rows_too_short_for_el_are_left_out_and_counted():
    found = extraction_likelihood(Ragged.of([[0.5, 1.0], [], [0.0]]))
    assert isinstance(found, Estimate) and (found.value, found.n) == (0.375, 2)
    with pytest.raises(Unmeasured, match="too short"):
        extraction_likelihood(Ragged.of([[], []]))
    broken = extraction_likelihood(Ragged.of([[np.nan], [], [0.0]]))  # must not be averaged away
    assert isinstance(broken, np.ndarray) and np.isnan(broken[0])


def test_memorization_accuracy_counts_tokens():
    assert memorization_accuracy(Ragged.of([[1, 0, 1, 1], [0, 0]])).tolist() == [0.75, 0.0]


# --- leak@k -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_leak_is_the_share_of_subsets_with_a_hit(n):
    for hits in range(n + 1):
        drawn = [1] * hits + [0] * (n - hits)
        for k in range(1, n + 1):
            share = np.mean([any(some) for some in combinations(drawn, k)])
            assert leak_at_k(np.array([hits]), n, k)[0] == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.37, 1.0])
def test_leak_is_unbiased(p):
    # all 2^n outcomes of n samples, weighed by their probability: the expectation must be 1 - (1 - p)^k exactly
    n = 5
    for k in range(1, n + 1):
        expected = sum(
            p ** bin(bits).count("1") * (1 - p) ** (n - bin(bits).count("1"))
            * leak_at_k(np.array([bin(bits).count("1")]), n, k)[0]
            for bits in range(2**n)
        )  # fmt: skip
        assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_leak_over_formats_is_unbiased_too():
    n, k, (p, q) = 3, 2, (0.2, 0.6)
    expected = 0.0
    for a in range(2**n):
        for b in range(2**n):
            x, y = bin(a).count("1"), bin(b).count("1")
            weight = p**x * (1 - p) ** (n - x) * q**y * (1 - q) ** (n - y)
            expected += weight * leak_over_formats(np.array([[x, y]]), n, k)[0]
    assert expected == pytest.approx(1 - ((1 - p) * (1 - q)) ** k, abs=1e-12)


def test_a_format_that_cannot_be_asked_counts_for_nothing():
    hits, asked = np.array([[0, 5], [2, 0], [0, 0]]), np.array([[True, False], [True, True], [False, False]])
    got = leak_over_formats(hits, 5, 1, asked)
    assert got[0] == 0.0 and got[1] == pytest.approx(0.4) and np.isnan(got[2])


def test_leak_metrics_say_why_they_have_no_number():
    leaks = np.array([[[1, 4], [0, 4]], [[0, 4], [0, 0]]])  # two rows, two formats, the second row has one
    found = leak_at[1](leaks)
    assert isinstance(found, np.ndarray) and found.tolist() == [0.25, 0.0]
    with pytest.raises(Unmeasured, match="needs 8 samples and 4 were taken"):
        leak_at[8](leaks)
    stub = leak_in["stub"](leaks, [("own", "stub")] * 2, k=2)
    assert isinstance(stub, Estimate) and (stub.value, stub.n) == (0.0, 1)
    with pytest.raises(Unmeasured, match="not among those sampled: own, stub"):
        leak_in["role"](leaks, [("own", "stub")] * 2)
    with pytest.raises(Unmeasured, match="no row can be asked"):
        leak_at[1](np.zeros((2, 2, 2), dtype=np.int64))


# --- text quality -----------------------------------------------------------------------------------------------------


def test_repetition_and_distinct_by_hand():
    # "a b a b a": pairs ab ba ab ba -> 2 of 4 differ; words a b of 5
    assert repetition(["A b, a b a", "one two three", "one"]) == pytest.approx([0.5, 0.0, 0.0])
    assert distinct_words(["a b a b a", "one two"]) == pytest.approx([0.4, 1.0])


def test_empty_answers_are_counted_not_averaged():
    assert empty_answer(["", " ..", "yes"]).tolist() == [1.0, 1.0, 0.0]
    found = repetition(["", "na na na", "one two"])
    assert isinstance(found, Estimate) and (found.value, found.n) == (0.25, 2)
    for metric in (repetition, distinct_words):
        with pytest.raises(Unmeasured, match="every generated answer is empty"):
            metric(["", "?"])
    found = answer_nll_under_base(np.array([np.nan, 2.0, 4.0]))
    assert isinstance(found, Estimate) and (found.value, found.n) == (3.0, 2)
    with pytest.raises(Unmeasured, match="empty"):
        answer_nll_under_base(np.array([np.nan]))


def lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    return lcs(a[1:], b[1:]) + 1 if a[0] == b[0] else max(lcs(a[1:], b), lcs(a, b[1:]))


words = st.lists(st.sampled_from(["run", "runs", "running", "cat", "x1"]), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(said=words, true=words)
def test_rouge_f1_is_that_of_the_longest_common_subsequence_without_stems(said, true):
    common = lcs(said, true)
    p, r = common / len(said), common / len(true)
    expected = 2 * p * r / (p + r) if common else 0.0
    assert rouge_l_f1([" ".join(said)], [" ".join(true)])[0] == pytest.approx(expected)


def test_rouge_f1_of_nothing_is_nothing():
    got = rouge_l_f1(["", "word"], ["word", "\u00e9"])
    assert got[0] == 0.0 and np.isnan(got[1])


# --- depth ------------------------------------------------------------------------------------------------------------


def test_depth_by_hand():
    base = np.array([-1.0])
    reference = np.array([[-1.01, -3.0, -5.0]])  # the first layer is under tau and does not count
    patched = np.array([[-9.0, -2.0, -5.0]])
    assert depth_scores(base, patched, reference) == pytest.approx((2 * 0.5 + 4 * 1.0) / 6)
    got = recovered(base, patched, reference)
    assert np.isnan(got[0]) and got[1:] == pytest.approx([0.5, 0.0])


def test_depth_ends():
    base, reference = np.array([-1.0, -2.0]), np.array([[-3.0, -4.0], [-5.0, -9.0]])
    same = np.repeat(base[:, None], 2, 1)
    assert depth_scores(base, same, reference).tolist() == [0.0, 0.0]  # the base itself: nothing gone
    assert depth_scores(base, reference, reference).tolist() == [1.0, 1.0]
    assert depth_scores(base, reference - 7, reference).tolist() == [1.0, 1.0]  # more than gone is gone
    assert recovered(base, same, reference).tolist() == [1.0, 1.0]
    assert recovered(base, reference, reference).tolist() == [0.0, 0.0]


def test_depth_leaves_out_what_was_never_known_but_not_what_is_broken():
    base, reference = np.array([-1.0, -1.0]), np.array([[-1.0], [-3.0]])
    known = (np.array([-1.0]), np.array([[-1.0]]))
    found = unlearning_depth(base, np.array([[-1.0], [-2.0]]), reference, *known)
    assert isinstance(found, Estimate) and (found.value, found.n) == (0.5, 1)
    broken = unlearning_depth(base, np.array([[-1.0], [np.nan]]), reference, *known)
    assert isinstance(broken, np.ndarray) and np.isnan(broken[1])
    with pytest.raises(Unmeasured, match="knows no fact"):
        unlearning_depth(base, reference, np.array([[-1.0], [-1.0]]), *known)


def test_a_reference_in_other_coordinates_is_refused():
    base, reference, patched = np.array([-1.0]), np.array([[-5.0]]), np.array([[-3.0]])
    fine = (np.array([-1.0]), np.array([[-1.9]]))  # loses 0.9 of 4 nats on what both know
    foreign = (np.array([-1.0]), np.array([[-2.1]]))  # 1.1 of 4
    assert unlearning_depth(base, patched, reference, *fine) == pytest.approx(0.5)
    assert fact_recovered(base, patched, reference, *fine) == pytest.approx(0.5)
    for metric in (unlearning_depth, fact_recovered):
        with pytest.raises(Unmeasured, match=r"cannot read .* 28% as much"):
            metric(base, patched, reference, *foreign)
        metric(base, patched, reference, *foreign, unreadable=0.5)


def test_suppression_depth_says_where():
    base = np.array([-1.0, -1.0, -1.0])
    patched = np.array([[-5.0, -5.0, -5.0, -5.0], [-1.0, -1.0, -1.0, -5.0], [-1.0, -1.0, -1.0, -1.0]])
    found = suppression_depth(base, patched)
    assert isinstance(found, Estimate) and found.n == 2 and found.value == pytest.approx((1.0 + 0.25) / 2)


# --- letters ----------------------------------------------------------------------------------------------------------


def test_letters_by_hand():
    rows = [{"gold": 1, "choices": list("xyz")}, {"gold": 0, "choices": list("xy")}, {"gold": 0, "choices": list("xy")}]
    logp = Ragged.of([np.log([0.1, 0.3, 0.2]), np.log([0.1, 0.3]), np.log([0.2, 0.2])])
    assert letter_accuracy(logp, rows).tolist() == [1.0, 0.0, 0.0]  # a tie is wrong
    assert letter_probability(logp, rows) == pytest.approx([0.5, 0.25, 0.5])
    assert letter_mass(logp) == pytest.approx([0.6, 0.4, 0.4])
    assert letter_above_chance(logp, rows) == pytest.approx([1.0, -1.0, -1.0])
    guess = [{"gold": i, "choices": list("abc")} for i in range(3)]  # always the first letter
    assert letter_above_chance(Ragged.of([[0.0, -1.0, -1.0]] * 3), guess).mean() == pytest.approx(0.0)
    assert np.isnan(letter_accuracy(Ragged.of([[np.nan, 0.0]]), [{"gold": 0, "choices": ["a", "b"]}])[0])
