"""Membership attacks against pair counting in plain Python, orientations against cases whose answer is known."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_unlearn.evaluation.measured import Ragged, Unmeasured
from peft_unlearn.evaluation.metrics import membership as mia
from peft_unlearn.evaluation.metrics.quality import (
    closeness,
    harmonic_mean,
    mem_score,
    overall_score,
    priv_score,
    utility_score,
)

scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=15).map(np.array)


def pairs(members: Any, others: Any) -> float:
    """AUC as it is defined: over every pair, a tie is half."""
    return sum((o > m) + 0.5 * (o == m) for m in members for o in others) / (len(members) * len(others))


@settings(deadline=None)
@given(scores, scores)
def test_auc_is_the_share_of_pairs(members: Any, others: Any) -> None:
    got = mia.auc(members, others)
    assert got == pytest.approx(pairs(members, others), abs=1e-15)
    assert mia.auc(others, members) == pytest.approx(1 - got, abs=1e-15)
    # a rank statistic: any increasing map leaves it
    assert mia.auc(np.exp(members / 3) + 7, np.exp(others / 3) + 7) == got
    assert mia.auc(members, members) == 0.5


@settings(deadline=None, max_examples=25)
@given(scores, scores)
def test_each_resample_is_the_auc_of_the_rows_drawn(members: Any, others: Any) -> None:
    from peft_unlearn.evaluation.measured import resampled

    got = mia._resampled(members, others, 20, 3)
    for k in range(20):
        drawn = np.repeat(members, resampled(len(members), 20, 3)[k])
        also = np.repeat(others, resampled(len(others), 20, 4)[k])
        assert got[k] == pytest.approx(pairs(drawn, also), abs=1e-12)


def test_interval_holds_the_value_and_narrows_with_rows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (20, 320):
        got = mia.auc_estimate(rng.normal(0, 1, n), rng.normal(0.5, 1, n))
        assert got.ci95 is not None and got.ci95[0] < got.value < got.ci95[1] and got.n == 2 * n
        widths.append(got.ci95[1] - got.ci95[0])
    assert widths[1] < widths[0] / 3
    assert mia.auc_estimate(np.zeros(1), np.ones(1)).ci95 is None


def test_sides_that_cannot_be_scored_are_a_reason() -> None:
    with pytest.raises(Unmeasured, match="no holdout rows"):
        mia.auc(np.zeros(2), np.zeros(0))
    with pytest.raises(Unmeasured, match="1 of 2 forget rows"):
        mia.auc(np.array([0.0, math.nan]), np.zeros(2))
    with pytest.raises(Unmeasured, match="holdout"):
        mia.mia_loss(Ragged.of([[-1.0]]), Ragged.of([[-math.inf], [-1.0]]))


rows = st.lists(st.lists(st.floats(-30, -1e-3), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(deadline=None)
@given(rows, rows, st.sampled_from([0.05, 0.2, 0.4, 1.0]))
def test_scores_in_plain_float64(mine: Any, theirs: Any, k: float) -> None:
    def low(row: list[float]) -> float:
        n = max(1, int(len(row) * k))
        return -sum(sorted(row)[:n]) / n

    a, b = Ragged.of(mine), Ragged.of(theirs)
    np.testing.assert_allclose(mia.min_k_score(a, k), [low(r) for r in mine], rtol=1e-12)
    # sums in another order may split a tie: scores closer than rounding count as one
    want = pairs(np.round([low(r) for r in mine], 9), np.round([low(r) for r in theirs], 9))
    assert mia.auc(np.round(mia.min_k_score(a, k), 9), np.round(mia.min_k_score(b, k), 9)) == pytest.approx(want)
    np.testing.assert_allclose(mia.nll(a), [-sum(r) / len(r) for r in mine], rtol=1e-12)


def test_min_k_plus_plus_is_standardized_over_the_vocabulary() -> None:
    logp, mean, std = [[-1.0, -5.0, -2.0], [-3.0]], [[-2.0, -4.0, -2.5], [-1.0]], [[0.5, 2.0, 1.0], [0.0]]
    got = mia.standardized(*(Ragged.of(x) for x in (logp, mean, std)))
    np.testing.assert_allclose(got[0], [2.0, -0.5, 0.5])
    np.testing.assert_allclose(got[1], [-2.0 / 1e-3])  # the variance counts as 1e-6 at least
    args = [Ragged.of(x) for x in (logp, mean, std, [[-1.0]], [[-2.0]], [[0.5]])]
    assert mia.mia_min_k_plus_plus(*args).value == 0.0  # the holdout row's score -2 is under 0.5 and 2000


def test_zlib_divides_by_the_compressed_bytes() -> None:
    text = "again and again and again and again"
    got = mia.zlib_score(Ragged.of([[-2.0, -4.0]]), [text])
    assert got[0] == pytest.approx(3.0 / len(zlib.compress(text.encode())))


def of(values: list[float]) -> Ragged:
    return Ragged.of([[-v] for v in values])


KNOWN, UNSEEN, RUINED = [0.1, 0.2, 0.15], [2.0, 2.2, 1.9], [9.0, 8.0, 9.5]


def test_orientation_known_is_one_and_over_forgotten_under_a_half() -> None:
    for attack in (mia.mia_loss, mia.mia_min_k):
        assert attack(of(KNOWN), of(UNSEEN)).value == 1.0
        assert attack(of(UNSEEN), of(UNSEEN)).value == 0.5
        assert attack(of(RUINED), of(UNSEEN)).value == 0.0


def test_privleak_is_in_muse_orientation_and_rel_diff_in_open_unlearnings() -> None:
    # the retain model ranks a third of the pairs as members: AUC 1/3 in ours, 2/3 in MUSE's orientation
    retain, holdout = [2.0, 4.0, 6.0], [1.0, 3.0, 5.0]
    r = pairs(retain, holdout)
    assert r == pytest.approx(1 / 3)
    args = (of(retain), of(holdout))
    assert mia.privleak(of(KNOWN), of(UNSEEN), *args).value == pytest.approx(-100)
    assert mia.privleak(of(RUINED), of(UNSEEN), *args).value == pytest.approx(100 * (1 - (1 - r)) / (1 - r))
    assert mia.privleak(of(retain), of(holdout), *args).value == 0
    assert mia.mia_rel_diff(of(KNOWN), of(UNSEEN), *args).value == pytest.approx(100 * (1 - r) / r)
    assert mia.mia_rel_diff(of(RUINED), of(UNSEEN), *args).value == pytest.approx(-100)
    with pytest.raises(Unmeasured, match="AUC is 0"):
        mia.privleak(of(KNOWN), of(UNSEEN), of(KNOWN), of(UNSEEN))


def test_the_reference_attack_subtracts_and_refuses_itself() -> None:
    mine, theirs = of([1.0, 2.0]), of([3.0, 5.0])
    got = mia.mia_reference(mine, of([2.0, 2.5]), theirs, of([3.5, 4.0])).value
    assert got == pairs([-1.0, -0.5], [-0.5, 1.0])
    with pytest.raises(Unmeasured, match="one and the same"):
        mia.mia_reference(mine, mine, theirs, theirs)


def test_closeness_is_one_at_the_reference_and_zero_at_the_far_end() -> None:
    assert closeness(0.3, 0.3) == 1 and closeness(1.0, 0.3) == 0 and closeness(1.0, 0.5) == 0 == closeness(0.0, 0.5)
    assert closeness(0.65, 0.3) == pytest.approx(0.5)
    assert all(0 <= closeness(a, r) <= 1 for a in np.linspace(0, 1, 11) for r in np.linspace(0, 1, 11))


def test_aggregates_are_harmonic_and_zero_where_a_part_is() -> None:
    assert harmonic_mean([1, 0.5]) == pytest.approx(2 / 3) and harmonic_mean([0.3, 0.0, 1.0]) == 0
    assert mem_score({"a": 0.0, "b": 0.5}) == pytest.approx(2 / 3) and mem_score({"a": 1.0, "b": 0.1}) == 0
    assert priv_score({"a": 0.6}, {"a": 0.5}) == pytest.approx(0.8)
    assert priv_score({"a": 0.5, "b": 1.0}, {"a": 0.5, "b": 0.5}) == 0
    assert utility_score({"u": 0.3}, {"u": 0.6}) == pytest.approx(0.5)
    assert utility_score({"u": 0.7}, {"u": 0.6}) == 1
    assert overall_score({"a": 0.9, "b": 0.0, "c": 1.0}) == 0
    with pytest.raises(Unmeasured, match="base's own u"):
        utility_score({"u": 0.1}, {"u": 0.0})
    with pytest.raises(ValueError, match=">= 0"):
        harmonic_mean([-0.1])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_moments_of_the_vocabulary_come_from_the_same_forward(scale: float) -> None:
    import torch

    from peft_unlearn.evaluation.teacher import _with_moments, logp_and_correct

    z = scale * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    z[3, 7] = -math.inf  # a token that the model never says
    z[4] = math.nan
    y = torch.arange(50)
    got = _with_moments(z.clone(), y).double().numpy()
    logs = z.double().log_softmax(-1).numpy()
    p = np.exp(logs)
    logs = np.where(p == 0, 0.0, logs)
    mean = (p * logs).sum(-1)
    std = np.sqrt((p * (logs - mean[:, None]) ** 2).sum(-1))
    sound = np.arange(50) != 4
    np.testing.assert_allclose(got[sound, 2], mean[sound], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[sound, 3], std[sound], rtol=1e-4, atol=1e-5)
    assert np.isnan(got[4]).all()
    plain = logp_and_correct(z.clone(), y).double().numpy()
    np.testing.assert_allclose(plain[sound], got[sound, :2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(plain[sound, 0], logs[sound, np.arange(50)[sound]], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(plain[sound, 1], (z.argmax(-1) == y).double().numpy()[sound])


@pytest.mark.parametrize("raw", [False, True])
def test_the_appended_end_is_no_evidence(raw: bool) -> None:
    """open-unlearning drops the last target, MUSE's texts have none; its loss attacks count it, but not of raw text."""
    from eval_helpers import byte_tokenizer, qa, tiny

    from peft_unlearn.evaluation import suites
    from peft_unlearn.evaluation.feed import Reading, feed
    from peft_unlearn.evaluation.plan import make_plan, measure
    from peft_unlearn.registry import get

    rows = {name: [qa(i, name) for i in range(3)] for name in ("forget", "holdout")}
    if raw:
        rows = {name: [{"text": r["answer"]} for r in found] for name, found in rows.items()}
    names = ("loss", "zlib", "reference", "min_k", "min_k_plus_plus", "gradnorm", "rel_diff")
    asked = [*(f"mia_{n}" for n in names), "privleak"]
    forget = {"role": "forget", "metrics": asked, "against": "holdout"}
    sets = {"forget": forget, "holdout": {"role": "holdout", "metrics": []}}
    plan = make_plan(suites.load({"format": 1, "sets": sets}), rows, byte_tokenizer())
    found = measure(tiny(), plan)
    reading = Reading(plan.sets["forget"], found, np.arange(3))
    whole, body, loss = (feed(name, reading) for name in ("logp", "body_logp", "loss_logp"))
    for i in range(3):
        np.testing.assert_array_equal(body[i], whole[i][:-1])
        np.testing.assert_array_equal(loss[i], whole[i][:-1] if raw else whole[i])
        assert len(feed("against_body_logp_std", reading)[i]) == len(feed("against_logp", reading)[i]) - 1
    for name in asked:
        method = get("metric", name)
        assert method.extra["version"] == 2
        bodied = name in ("mia_min_k", "mia_min_k_plus_plus", "mia_rel_diff", "privleak")
        assert ("body_logp" in method.inputs, "loss_logp" in method.inputs) == (
            bodied, name in ("mia_loss", "mia_zlib", "mia_reference"),
        )  # fmt: skip
