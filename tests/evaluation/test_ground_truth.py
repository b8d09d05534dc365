"""Against TOFU's published logs of Llama-2-7B and what its own aggregate functions print for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peft_unlearn.evaluation.measured import Array, Ragged
from peft_unlearn.evaluation.metrics.generation import rouge_l_recall
from peft_unlearn.evaluation.metrics.likelihood import (
    probability,
    probability_among_choices,
    truth_log_ratio,
    truth_ratio,
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
