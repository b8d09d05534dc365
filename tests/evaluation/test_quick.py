"""The evaluation while training, the number that compares checkpoints, and stopping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from eval_helpers import tiny
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.quick import BEST, ForgetAtFloor, StopOn, best_metric, make_score, pick


def named(forget: float, retain: float, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}forget/value_accuracy": forget, f"{prefix}retain/value_accuracy": retain}


def test_make_score_is_small_and_leaves_the_model_alone(model: Any, tokenizer: Any, data: Any) -> None:
    run = make_score(data, tokenizer, n=3)
    model.train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    got = run(model)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    names = ("value_accuracy", "extraction_strength", "probability")
    assert set(got) == {f"{role}/{m}" for role in ("forget", "retain") for m in names}
    assert all(isinstance(v, float) and math.isfinite(v) for v in got.values())
    assert got == run(model)


def test_what_cannot_be_had_is_left_out(tokenizer: Any) -> None:
    rows = {k: [{"question": f"{k}{i}", "answer": "x y"} for i in range(3)] for k in ("forget", "retain")}
    got = make_score(rows, tokenizer)(tiny())
    assert "forget/value_accuracy" not in got and pick(got) == "extraction_strength"
    broken = tiny()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    assert make_score(rows, tokenizer)(broken) == {}
    assert best_metric({}, 0.9, got) == math.inf


@given(*[st.floats(0, 1)] * 4)
def test_whatever_holds_the_floor_is_better(f1: float, r1: float, f2: float, r2: float) -> None:
    base = named(1.0, 1.0)
    a, b = best_metric(named(f1, r1), 0.9, base), best_metric(named(f2, r2, "eval_"), 0.9, base)
    if r1 >= 0.9 > r2:
        assert a <= b
    if r1 >= 0.9 and r2 >= 0.9:
        assert (a < b) == (f1 < f2)


def test_best_metric_cases() -> None:
    base = named(1.0, 0.8)
    assert best_metric(named(0.1, 0.72), 0.9, base) == pytest.approx(0.1)
    assert best_metric(named(0.1, 0.62), 0.9, base) == pytest.approx(1.2)
    assert best_metric({"forget/value_accuracy": 0.1}, 0.9, base) == math.inf
    assert best_metric(named(math.nan, 1.0), 0.9, base) == math.inf


def test_callbacks(tmp_path: Any) -> None:
    args, state = TrainingArguments(output_dir=str(tmp_path), report_to=[]), TrainerState(global_step=7)
    metrics = named(0.2, 0.99, "eval_")
    ForgetAtFloor(named(1.0, 1.0), floor=0.95).on_evaluate(args, state, TrainerControl(), metrics)
    assert metrics[BEST] == pytest.approx(0.2)

    stop, control = StopOn(forget_below=0.05, retain_below=0.5, patience=2), TrainerControl()
    for forget, stopped in ((0.04, False), (0.3, False), (0.05, False), (0.01, True)):
        stop.on_evaluate(args, state, control, named(forget, 0.9, "eval_"))
        assert control.should_training_stop is stopped
    assert stop.reason == "step 7: forget value_accuracy 0.0100 <= 0.05"
    assert "retain" in (StopOn(retain_below=0.5).verdict(named(1.0, 0.4)) or "")
    assert StopOn(forget_below=0.0).verdict({}) is None
    for wrong in ({}, {"forget_below": 0.1, "patience": 0}):
        with pytest.raises(UserError):
            StopOn(**wrong)
    with pytest.raises(UserError):
        ForgetAtFloor({}, floor=1.5)
