"""Against TOFU's published logs of Llama-2-7B and what its own aggregate functions print for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_unlearn.evaluation.measured import Array, Ragged
from peft_unlearn.evaluation.metrics.generation import rouge_l_recall
from peft_unlearn.evaluation.metrics.likelihood import (
    paraphrase_probability,
    probability,
    probability_among_choices,
    truth_log_ratio,
    truth_ratio,
    truth_ratio_prob_mean,
)
from peft_unlearn.evaluation.metrics.quality import ks_two_sample, model_utility

RETAIN, AUTHORS, WORLD, FORGET = (
    "eval_log.json",
    "eval_real_author_wo_options.json",
    "eval_real_world_wo_options.json",
    "eval_log_forget.json",
)
RUNS = ["llama2-7b_full", "llama2-7b_retain90"]


def _logp(losses: list[float]) -> Ragged:
    return Ragged.of([[-loss] for loss in losses])


def _log_ratio(log: dict[str, Any]) -> Array:
    wrong = Ragged.of([[-x for x in row] for row in log["average_perturb_loss"]])
    return truth_log_ratio(-np.array(log["avg_paraphrased_loss"]), wrong)


@pytest.mark.parametrize("run", RUNS)
def test_model_utility_and_its_parts(ground_truth: dict[str, Any], run: str) -> None:
    logs, expected = ground_truth["runs"][run]["files"], ground_truth["runs"][run]["expected_model_utility"]
    parts: dict[str, float] = {}
    for name, file in (("Retain", RETAIN), ("Real Authors", AUTHORS), ("Real World", WORLD)):
        log = logs[file]
        logp = _logp(log["avg_gt_loss"])
        wrong = Ragged.of([[-x for x in row] for row in log["average_perturb_loss"]])
        prob = probability(logp) if name == "Retain" else probability_among_choices(logp, wrong)
        parts[f"Prob. {name}"] = float(prob.mean())
        parts[f"ROUGE {name}"] = float(np.mean(log["rougeL_recall"]))
        parts[f"Truth Ratio {name}"] = float(truth_ratio(_log_ratio(log), "retain").mean())
    for name, value in parts.items():
        assert value == pytest.approx(expected[name], abs=1e-6), name
    assert model_utility(parts) == pytest.approx(expected["Model Utility"], abs=1e-5)
    forget = logs[FORGET]
    assert float(probability(_logp(forget["avg_gt_loss"])).mean()) == pytest.approx(expected["Prob. Forget"], abs=1e-6)
    got = float(truth_ratio(_log_ratio(forget), "forget").mean())
    assert got == pytest.approx(expected["Truth Ratio Forget"], abs=1e-6)


def test_forget_quality(ground_truth: dict[str, Any]) -> None:
    for case in ground_truth["forget_quality_cases"]:
        a, b = (_log_ratio(ground_truth["runs"][case[k]]["files"][FORGET]) for k in ("unlearn", "retain"))
        got = ks_two_sample(a, b)
        assert got.distance == pytest.approx(case["ks_statistic"], abs=1e-12)
        assert got.log10_p == pytest.approx(case["log10_p_exact"], abs=1e-3)
        # open-unlearning prints 1/R: the test does not see the difference
        assert ks_two_sample(-a, -b).log10_p == pytest.approx(case["log10_p_exact"], abs=1e-3)


def test_rouge_is_exact(ground_truth: dict[str, Any]) -> None:
    pytest.importorskip("rouge_score")
    cases = ground_truth["rouge_cases"]
    rows = [dict(zip(cases["fields"], row, strict=True)) for row in cases["rows"]]
    got = rouge_l_recall([r["generation"] for r in rows], [r["ground_truth"] for r in rows])
    np.testing.assert_array_equal(got, [r["rougeL_recall"] for r in rows])


@pytest.mark.parametrize("run", RUNS)
def test_every_expected_value_and_the_files_own_tolerance(ground_truth: dict[str, Any], run: str) -> None:
    logs, expected = ground_truth["runs"][run]["files"], dict(ground_truth["runs"][run]["expected_model_utility"])
    tolerance = ground_truth["tolerance"]["model_utility"]
    parts: dict[str, float] = {}
    for name, file in (("Retain", RETAIN), ("Real Authors", AUTHORS), ("Real World", WORLD), ("Forget", FORGET)):
        log = logs[file]
        assert len({len(column) for column in log.values()}) == 1  # the same rows in every column
        logp, ratio = _logp(log["avg_gt_loss"]), _log_ratio(log)
        wrong = Ragged.of([[-x for x in row] for row in log["average_perturb_loss"]])
        choices = name in ("Real Authors", "Real World")
        parts[f"Prob. {name}"] = float(
            (probability_among_choices(logp, wrong) if choices else probability(logp)).mean()
        )
        parts[f"ROUGE {name}"] = float(np.mean(log["rougeL_recall"]))
        parts[f"Truth Ratio {name}"] = float(truth_ratio(ratio, "forget" if name == "Forget" else "retain").mean())
        # the third orientation is a function of the same ratio: p(right) / (p(right) + p(wrong))
        right, geometric = np.exp(-np.array(log["avg_paraphrased_loss"])), np.exp(wrong.mean())
        np.testing.assert_allclose(truth_ratio_prob_mean(ratio), right / (right + geometric), rtol=1e-10)
        np.testing.assert_allclose(paraphrase_probability(-np.array(log["avg_paraphrased_loss"])), right, rtol=1e-12)
    nine = {k: v for k, v in parts.items() if not k.endswith("Forget")}
    assert len(nine) == 9 and model_utility(nine) == pytest.approx(expected.pop("Model Utility"), abs=tolerance)
    assert set(parts) == set(expected)
    for name, value in expected.items():
        assert parts[name] == pytest.approx(value, abs=tolerance), name


def test_p_is_the_exact_one_and_not_the_asymptotic(ground_truth: dict[str, Any]) -> None:
    tolerance = ground_truth["tolerance"]["log10_p"]
    for case in ground_truth["forget_quality_cases"]:
        a, b = (_log_ratio(ground_truth["runs"][case[k]]["files"][FORGET]) for k in ("unlearn", "retain"))
        assert [len(a), len(b)] == case["n"]
        got = ks_two_sample(a, b)
        assert got.log10_p == pytest.approx(case["log10_p_exact"], abs=tolerance)
        assert got.p == pytest.approx(case["p_exact"], rel=10**tolerance - 1)
        if case["p_asymptotic"] < 1e-6:  # where the two differ by more than the tolerance
            assert abs(got.log10_p - np.log10(case["p_asymptotic"])) > 100 * tolerance
