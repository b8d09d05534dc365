"""The small evaluation while training, the number by which checkpoints are compared, and callbacks that act on it.

The callbacks look at the metrics of `Trainer.evaluate`, so `eval_strategy="steps"` and `eval_steps` say how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.chat import Template
from ..errors import UserError
from . import suites
from .numbers import numbers_of
from .plan import make_plan, measure
from .shapes import Suite

Metrics = dict[str, float] | None
BEST = "eval_forget_at_floor"  # set metric_for_best_model to this, greater_is_better to False


def make_score(
    data: Any,
    tokenizer: Any,
    suite: str | Path | Mapping[str, Any] | Suite = "people",
    n: int | None = None,
    template: Template | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function model -> {"forget/value_accuracy": .., "forget/probability": .., "retain/..": ..}, for use while
    training.

    Texts are tokenized once, here. n: rows of each set, evenly spaced; default the suite's. A number that does not
    exist (no 'value' in the rows, NaN logits) is left out, not 0. The model's train/eval mode is as before afterwards.
    """
    whole = suites.load(suite)
    plan = make_plan(whole.quick(), data, tokenizer, whole.quick_rows if n is None else n, template, brief=True)

    def run(model: Any) -> dict[str, float]:
        found = numbers_of(plan, measure(model, plan), None, ci=False)
        return {key: number.value for key, number in found.items() if number.value is not None}

    return run


def read(metrics: Mapping[str, Any], role: str, metric: str) -> float | None:
    """``role/metric`` from a mapping whose keys may carry the Trainer's prefix: eval_forget/.., eval_forget_..,
    forget/.. ."""
    for key in (f"{role}/{metric}", f"eval_{role}/{metric}", f"eval_{role}_{metric}", f"{role}_{metric}"):
        value = metrics.get(key)
        if value is not None and not math.isnan(value):
            return float(value)
    return None


def pick(
    metrics: Mapping[str, Any],
    order: tuple[str, ...] = ("value_accuracy", "accuracy", "extraction_strength", "probability"),
) -> str:
    """The metric that decides: the first of `order` that both sets have (rows of a user's own may have no values)."""
    for metric in order:
        if read(metrics, "forget", metric) is not None and read(metrics, "retain", metric) is not None:
            return metric
    return order[-1]


def best_metric(metrics: Mapping[str, Any], floor: float, base: Mapping[str, Any], metric: str | None = None) -> float:
    """One number to minimize: the forget value, if the retain value is at least floor times the base's own.

    Below the floor: forget + 1 + shortfall, so every checkpoint that holds the floor comes before every one that
    does not. inf where a value is missing. A floor met up to rounding (0.9 of 0.8 against 0.72) is met.

    metrics, base: results of `make_score`, with or without the Trainer's prefix.   metric: default the first that
    the base has of value accuracy, accuracy, extraction strength, probability.
    """
    metric = metric or pick(base)
    forget, retain = read(metrics, "forget", metric), read(metrics, "retain", metric)
    wanted = read(base, "retain", metric)
    if forget is None or retain is None or wanted is None:
        return math.inf
    shortfall = floor * wanted - retain
    return forget if shortfall <= 1e-9 else forget + 1.0 + shortfall


class ForgetAtFloor(TrainerCallback):
    """Adds `eval_forget_at_floor` (lower is better) to the metrics of every evaluation, for `load_best_model_at_end`.

    base: the base's own scores (`make_score(..)(base)`).   floor: share of the base's retain value that must be kept.
    """

    def __init__(self, base: Mapping[str, float], floor: float = 0.95, metric: str | None = None) -> None:
        if not 0.0 <= floor <= 1.0:
            raise UserError(f"the retain floor is a share of the base's own value, between 0 and 1, not {floor!r}")
        self.base, self.floor, self.metric = dict(base), floor, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Metrics = None, **kwargs: Any) -> None:
        if metrics is not None:
            metrics[BEST] = best_metric(metrics, self.floor, self.base, self.metric)


class StopOn(TrainerCallback):
    """Stops training once forgetting is enough or retaining too little.

    forget_below: stop when the forget value is at or under it.   retain_below: stop when the retain value falls
    under it.   metric: which value; default the first of value accuracy, accuracy, extraction strength, probability that the
    evaluation has.   patience: evaluations in a row that must agree (every method dips first: a stop at the first
    low value can be a stop inside the dip).   reason: afterwards, why.
    """

    def __init__(
        self,
        forget_below: float | None = None,
        retain_below: float | None = None,
        metric: str | None = None,
        patience: int = 1,
    ) -> None:
        if forget_below is None and retain_below is None:
            raise UserError("nothing to stop on: give forget_below, retain_below, or both")
        if patience < 1:
            raise UserError(f"patience is a number of evaluations and at least 1, not {patience!r}")
        self.forget_below, self.retain_below, self.metric, self.patience = forget_below, retain_below, metric, patience
        self.reason: str | None = None
        self._agree = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Metrics = None, **kwargs: Any) -> None:
        why = self.verdict(metrics or {})
        self._agree = self._agree + 1 if why else 0
        if why and self._agree >= self.patience:
            self.reason = f"step {state.global_step}: {why}"
            control.should_training_stop = True

    def verdict(self, metrics: Mapping[str, float]) -> str | None:
        """Why these metrics say stop; None where they do not."""
        metric = self.metric or pick(metrics)
        forget, retain = read(metrics, "forget", metric), read(metrics, "retain", metric)
        if self.forget_below is not None and forget is not None and forget <= self.forget_below:
            return f"forget {metric} {forget:.4f} <= {self.forget_below:g}"
        if self.retain_below is not None and retain is not None and retain < self.retain_below:
            return f"retain {metric} {retain:.4f} < {self.retain_below:g}"
        return None
