"""Callbacks that act on evaluations made while training: a metric for the best checkpoint, and stopping on a criterion.

Both look at the metrics of `Trainer.evaluate`, so `eval_strategy="steps"` and `eval_steps` say how often; see
`quick.make_score`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from ..errors import UserError
from .quick import best_metric, pick, read

Metrics = dict[str, float] | None
BEST = "eval_forget_at_floor"  # set metric_for_best_model to this, greater_is_better to False


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
    under it.   metric: which value; default the first of value accuracy, extraction strength, probability that the
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
