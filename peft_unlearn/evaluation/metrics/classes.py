"""Metrics of classifiers, as unlearning of images reports them: accuracies, and whether forgotten rows look unseen."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...registry import metric
from ..measured import KNOWLEDGE, UNIT, Array, Ragged, Unmeasured
from ..provider import Context, provider
from ..shapes import Measured, Plan, SetPlan
from .sources import FORGET_VECTOR, SPARSITY


@metric("accuracy", within=UNIT, source=FORGET_VECTOR, better=KNOWLEDGE)
def accuracy(correct: Ragged) -> Array:
    """1.0 where the most probable class is the right one, else 0.0. Returns (rows,).

    On the retain set the papers' remaining accuracy, on unseen rows their test accuracy; of a row of text the share of its tokens.
    """
    return correct.mean()


@metric("unlearning_accuracy", within=UNIT, source=FORGET_VECTOR, better={"forget": "reference"})
def unlearning_accuracy(correct: Ragged) -> Array:
    """1 - accuracy: the papers' unlearning accuracy. Returns (rows,).

    Closest to the retain model is best: of a class that model knows nothing, of random rows nearly as much as of all others.
    """
    return 1.0 - correct.mean()


@metric(
    "mia_efficacy", within=UNIT, source=SPARSITY, title="membership inference efficacy", better={"forget": "reference"}
)
def mia_efficacy(taken_for_unseen: Array) -> Array:
    """Share of forgotten rows that an attacker takes for rows never trained on. Returns (rows,) of 0.0 and 1.0.

    Deviation from the papers, which fit a support vector machine to confidences: see the provider. Compare with the retain model: 1
    is not what retraining gives where unseen rows look like trained ones.
    """
    return taken_for_unseen


@provider("taken_for_unseen")
def taken_for_unseen(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """(rows,) 1.0 where the confidence in the right class lies under the threshold that best tells trained from unseen rows.

    Trained are the rows of the suite's retain sets that come from the training data, unseen those of its holdout set. Of all thresholds
    the one with the highest balanced accuracy is taken, the lowest of several.
    """
    roles = {"retain": [s for s in plan.sets.values() if s.spec.source == "retain"],
             "holdout": [s for s in plan.sets.values() if s.spec.source == "holdout"]}  # fmt: skip
    sides = {k: _confidences(measured, found) for k, found in roles.items()}

    def read(s: SetPlan) -> Array:
        s.require(measured)
        if lost := [k for k, values in sides.items() if not len(values)]:
            raise Unmeasured(f"the suite has no {lost[0]} rows, and membership is told by trained and unseen ones")
        cut = threshold(sides["retain"], sides["holdout"])
        return (measured.mean_logp[s.answer] < cut).astype(np.float64)

    return {"taken_for_unseen": context.per_set(read)}


def _confidences(measured: Measured, sets: list[SetPlan]) -> Array:
    values = np.concatenate([measured.mean_logp[s.answer] for s in sets] or [np.zeros(0)])
    return values[np.isfinite(values)]


def threshold(members: Array, others: Array) -> float:
    """The value under which scores are taken for those of `others`: of the highest balanced accuracy, the lowest of several.

    members: (n,), others: (m,), high = looks trained on. Source: the confidence attack of Song & Mittal, Systematic Evaluation of Privacy
    Risks of Machine Learning Models, https://arxiv.org/abs/2003.10595, with one threshold for all classes.
    """
    cuts = np.unique(np.concatenate([members, others, [np.inf]]))
    below = np.searchsorted(np.sort(others), cuts, side="left") / len(others)
    above = 1.0 - np.searchsorted(np.sort(members), cuts, side="left") / len(members)
    return float(cuts[np.argmax(below + above)])
