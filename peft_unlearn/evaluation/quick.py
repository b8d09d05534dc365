"""The small evaluation while training, and the number by which checkpoints are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import suites
from .numbers import numbers_of
from .plan import make_plan, measure
from .shapes import Suite


def make_score(
    data: Any,
    tokenizer: Any,
    suite: str | Path | Mapping[str, Any] | Suite = "people",
    n: int | None = None,
    template: str | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function model -> {"forget/value_accuracy": .., "forget/probability": .., "retain/..": ..}, for use while
    training.

    Texts are tokenized once, here. n: rows of each set, evenly spaced; default the suite's. A number that does not
    exist (no 'value' in the rows, NaN logits) is left out, not 0. The model's train/eval mode is as before afterwards.
    """
    whole = suites.load(suite)
    plan = make_plan(whole.quick(), data, tokenizer, whole.quick_rows if n is None else n, template)

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
    metrics: Mapping[str, Any], order: tuple[str, ...] = ("value_accuracy", "extraction_strength", "probability")
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
    the base has of value accuracy, extraction strength, probability.
    """
    metric = metric or pick(base)
    forget, retain, wanted = (
        read(metrics, "forget", metric),
        read(metrics, "retain", metric),
        read(base, "retain", metric),
    )
    if forget is None or retain is None or wanted is None:
        return math.inf
    shortfall = floor * wanted - retain
    return forget if shortfall <= 1e-9 else forget + 1.0 + shortfall
