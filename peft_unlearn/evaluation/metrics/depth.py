"""How deep it was forgotten: does the base still read the fact out of the unlearned model's hidden states?"""

from __future__ import annotations

from typing import Annotated

import numpy as np

from ...registry import Range, Source, metric
from ..measured import Array, Estimate, Unmeasured
from .extraction import mean_of_defined

UDS = Source(
    paper="Measuring the Depth of LLM Unlearning via Activation Patching",
    url="https://arxiv.org/abs/2605.24614",
    year=2026,
)


def depth_scores(base: Array, patched: Array, reference: Array, tau: float = 0.05) -> Array:
    """Depth score of each row: 1 = in every layer as gone as in a model that never learned it, 0 = all still there.

    base: (rows,) mean log-probability of the fact's tokens under the base.   patched: (rows, layers) the same when the
    base goes on from the unlearned model's hidden states after block l.   reference: (rows, layers) from the
    retain-only model's. With drops D = base - reference and d = base - patched, the score is
    sum D clip(d / D, 0, 1) / sum D over the layers where D > tau nats: those by which the base has come to know more
    than the retain-only model. Returns (rows,) in [0, 1]; NaN for a row without such a layer: nothing there could be
    forgotten. Higher is better on a forget set, lower on a retain set.
    """
    lacking = base[:, None] - reference
    known = lacking > tau
    with np.errstate(invalid="ignore", divide="ignore"):
        gone = np.clip((base[:, None] - patched) / lacking, 0.0, 1.0)
        score = np.where(known, lacking * gone, 0.0).sum(1) / np.where(known, lacking, 0.0).sum(1)
    bad = np.isnan(base) | np.isnan(patched).any(1) | np.isnan(reference).any(1)
    return np.where(bad, np.nan, score)


def recovered(base: Array, patched: Array, reference: Array, tau: float = 0.05) -> Array:
    """(layers,) how much of the fact comes back at each layer, over all rows: 1 = as much as the base has, 0 = as little as
    the retain-only model.

    base: (rows,), patched, reference: (rows, layers), as for `depth_scores`. The ratio of the sums
    (patched - reference) / (base - reference), so that rows of which the base knew little weigh little; not clipped: below 0
    it is suppressed further than never learned. NaN for a layer where base and reference differ by less than tau nats on
    average: there is no fact there to recover.
    """
    lacking = (base[:, None] - reference).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lacking > tau, (patched - reference).mean(0) / lacking, np.nan)


NOTHING = "the base knows no fact here by more than tau nats better than the retain-only model, in any layer"


Tau = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check_readable(
    fact_logp: Array, reference: Array, known_fact_logp: Array, known_reference: Array, unreadable: float
) -> None:
    """Whether the base can read the retain-only model's hidden states at all.

    fact_logp (rows,), reference (rows, layers): of the set in question; known_..: of rows that both models know. What the
    base loses with the reference's states counts as missing knowledge only as far as it is not lost on those rows too.
    Raises Unmeasured where more than the share `unreadable` of it is: then the two models differ in coordinates, not in facts.
    """
    lost = np.clip((fact_logp[:, None] - reference).mean(0), 0, None).sum()
    also = np.clip((known_fact_logp[:, None] - known_reference).mean(0), 0, None).sum()
    if also > unreadable * lost:
        share = f"{also / lost:.0%} as much" if lost > 0 else "more"
        raise Unmeasured(
            f"the base cannot read the retain-only model's hidden states: on rows that both know {share} is lost as here; the two "
            "must come from one pretrained model"
        )


@metric("unlearning_depth", source=UDS, needs=("depth", "pair"), better={"forget": "higher"}, reference="retain_only",
        version=1, faithful="reconstructed")  # fmt: skip
def unlearning_depth(
    fact_logp: Array,
    patched_logp: Array,
    reference_patched_logp: Array,
    against_fact_logp: Array,
    reference_against_patched_logp: Array,
    *,
    tau: Tau = 0.05,
    unreadable: Share = 0.25,
) -> Array | Estimate:
    """Depth score: 1 = in every layer as gone as in the retain-only model, 0 = the base still reads all of it out.

    `depth_scores` on hidden states of this model, of the retain-only model, and the base's own reading. Rows of which the
    base knows nothing more than the retain-only model are left out; n counts the others. Adapted from the paper, which has
    the same score, patches and tau as far as the authors' public code shows: there each row comes with an annotated span,
    here it is the row's `value` in the answer (the whole answer where the row has none). The prompt's positions are not
    patched, so blocks above still see the base's own reading of the question, with any source. Ours: the suite's `against`
    names rows that both know, and `check_readable` refuses a reference that the base cannot read even there.
    """
    check_readable(fact_logp, reference_patched_logp, against_fact_logp, reference_against_patched_logp, unreadable)
    values = depth_scores(fact_logp, patched_logp, reference_patched_logp, tau)
    known = np.any(fact_logp[:, None] - reference_patched_logp > tau, axis=1)
    broken = np.any(np.isnan(np.column_stack([fact_logp, patched_logp, reference_patched_logp])), axis=1)
    return mean_of_defined(values, np.logical_or(known, broken), NOTHING)


@metric("fact_recovered", source=UDS, needs=("depth", "pair"), better={"forget": "lower"}, reference="retain_only",
        version=1, faithful="reconstructed")  # fmt: skip
def fact_recovered(
    fact_logp: Array,
    patched_logp: Array,
    reference_patched_logp: Array,
    against_fact_logp: Array,
    reference_against_patched_logp: Array,
    *,
    tau: Tau = 0.05,
    unreadable: Share = 0.25,
) -> float:
    """The most that comes back at any layer, `recovered`: 1 = as much as the base has, 0 = as a model that never learned it.

    The ratio of sums over rows at the layer where it is largest; only layers count where the retain-only model lacks the
    fact by more than tau nats on average. The same check of the reference as in `unlearning_depth`.
    """
    check_readable(fact_logp, reference_patched_logp, against_fact_logp, reference_against_patched_logp, unreadable)
    curve = recovered(fact_logp, patched_logp, reference_patched_logp, tau)
    if np.isnan(curve).all():
        raise Unmeasured(NOTHING)
    return float(np.nanmax(curve))


@metric("suppression_depth", source=UDS, needs=("depth",), better={"forget": "higher"}, reference=None, version=1,
        faithful="reconstructed")  # fmt: skip
def suppression_depth(
    fact_logp: Array, patched_logp: Array, *, tau: Annotated[float, Range(0)] = 0.05
) -> Array | Estimate:
    """How early the fact goes, without a retain-only model: 1 = in the first block, 1 / layers = only in the last.

    Mean over layers of clip((base - patched after block l) / (base - patched after the last block), 0, 1): the share of
    what this model lacks in the end that its hidden states lack already. Rows that lose at most tau nats are left out; n
    counts the others. Ours, from the same patches as `unlearning_depth`; it says where, not how thoroughly.
    """
    lost = fact_logp[:, None] - patched_logp
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.clip(lost / lost[:, -1:], 0.0, 1.0).mean(1)
    return mean_of_defined(values, ~(lost[:, -1] <= tau), "no row lost more than tau nats")
