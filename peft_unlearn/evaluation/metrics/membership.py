"""Membership inference: can somebody tell the forget rows from rows that no model has seen?

Every attack gives a row a score, high = looks like a non-member. The value is the AUC of telling holdout rows (label 1) from
forget rows (label 0): 1 = the forget rows are still known as members, 0.5 = cannot be told apart, under 0.5 = over-forgotten,
which gives them away as well. What to compare with is the value of the retain model, not 0.5: rows differ also in what they
say. Needs the suite's `against`, the holdout set.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np

from ...registry import Range, metric
from ..measured import UNIT, Array, Estimate, Ragged, Unmeasured, resampled
from ..provider import Context, provider
from ..shapes import Measured, Plan
from ..teacher import body, evaluating, pad_id_of
from .sources import CARLINI, LOSS, MIN_K, MIN_K_PLUS, MUSE, OPEN_UNLEARNING

CLOSEST = {"forget": "reference"}  # best is neither high nor low but where the retain model is
Share = Annotated[float, Range(0.0, 1.0, open_low=True)]


# --- AUC --------------------------------------------------------------------------------------------------------------


def _checked(scores: Array, which: str) -> Array:
    if not len(scores):
        raise Unmeasured(f"there are no {which} rows to score")
    if bad := int(np.sum(~np.isfinite(scores))):
        raise Unmeasured(f"{bad} of {len(scores)} {which} rows have no score: the model's logits are not finite there")
    return scores


def auc(members: Array, others: Array) -> float:
    """Chance that a row of `others` scores higher than one of `members`, ties counting half; exact, any scale.

    members: (n,), others: (m,), finite. Raises Unmeasured for an empty side or a score that is not finite.
    """
    members, others = np.sort(_checked(members, "forget")), _checked(others, "holdout")
    below = np.searchsorted(members, others, side="left")
    up_to = np.searchsorted(members, others, side="right")
    return int(below.sum() + up_to.sum()) / (2 * len(members) * len(others))


def _resampled(members: Array, others: Array, resamples: int = 1000, seed: int = 0) -> Array:
    """(resamples,) AUCs, both sides drawn with replacement; the same draws for any scores of the same rows."""
    pooled = np.concatenate([members, others])
    order = np.argsort(pooled, kind="stable")
    starts = np.flatnonzero(np.diff(pooled[order], prepend=-np.inf) > 0)  # of groups of equal scores
    is_other = order >= len(members)
    drawn = [resampled(len(side), resamples, seed + k) for k, side in enumerate((members, others))]
    out = []
    for k in range(0, resamples, 256):
        counts = np.concatenate([d[k : k + 256] for d in drawn], 1)[:, order].astype(np.float64)  # (256, rows) by score
        low = np.add.reduceat(np.where(is_other, 0.0, counts), starts, axis=1)  # members in each group
        high = np.add.reduceat(np.where(is_other, counts, 0.0), starts, axis=1)
        below = np.cumsum(low, axis=1) - low  # members that score less than the group
        out.append((high * (below + low / 2)).sum(1) / (len(members) * len(others)))
    return np.concatenate(out)


def _interval(values: Array) -> tuple[float, float] | None:
    if not np.all(np.isfinite(values)):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def auc_estimate(members: Array, others: Array, resamples: int = 1000, seed: int = 0) -> Estimate:
    """`auc` with a percentile bootstrap interval over the rows of both sides; n is their number together."""
    value, n = auc(members, others), len(members) + len(others)
    enough = min(len(members), len(others)) > 1
    return Estimate(value, _interval(_resampled(members, others, resamples, seed)) if enough else None, n)


# --- scores, one per row, high = non-member ---------------------------------------------------------------------------


def nll(logp: Ragged) -> Array:
    """(rows,) mean negative log-probability of each answer's tokens."""
    return -logp.mean()


def zlib_score(logp: Ragged, answer: Sequence[str]) -> Array:
    """(rows,) mean negative log-probability / bytes of the compressed answer: what is repetitive is cheap for any model."""
    return nll(logp) / np.array([len(zlib.compress(text.encode())) for text in answer], dtype=np.float64)


def min_k_score(values: Ragged, k: float) -> Array:
    """(rows,) minus the mean of the lowest k of each row's values, at least one (MUSE's int(n k) can be none)."""
    out = np.empty(len(values))
    for i in range(len(values)):
        row = values[i]
        take = max(1, int(len(row) * k))
        out[i] = -np.partition(row, take - 1)[:take].mean() if len(row) and not np.isnan(row).any() else np.nan
    return out


def standardized(logp: Ragged, mean: Ragged, std: Ragged) -> Ragged:
    """(log p - its mean) / its spread, both over the vocabulary under p; the variance counts as 1e-6 at least."""
    return Ragged((logp.flat - mean.flat) / np.sqrt(np.maximum(std.flat**2, 1e-6)), logp.offsets)


# --- attacks ----------------------------------------------------------------------------------------------------------


@metric("mia_loss", within=UNIT, source=LOSS, title="membership by loss (AUC)", better=CLOSEST, version=2)
def mia_loss(loss_logp: Ragged, against_loss_logp: Ragged) -> Estimate:
    """AUC of the LOSS attack: score = mean negative log-probability of the answer, end token included but for raw text."""
    return auc_estimate(nll(loss_logp), nll(against_loss_logp))


@metric("mia_zlib", within=UNIT, source=CARLINI, title="membership by zlib (AUC)", better=CLOSEST, version=2)
def mia_zlib(
    loss_logp: Ragged, answer: Sequence[str], against_loss_logp: Ragged, against_answer: Sequence[str]
) -> Estimate:
    """AUC of the ZLib attack: score = mean negative log-probability / bytes of the zlib-compressed answer."""
    return auc_estimate(zlib_score(loss_logp, answer), zlib_score(against_loss_logp, against_answer))


@metric("mia_reference", within=UNIT, source=CARLINI, title="membership by reference (AUC)", better=CLOSEST, version=2)
def mia_reference(
    loss_logp: Ragged, reference_loss_logp: Ragged, against_loss_logp: Ragged, reference_against_loss_logp: Ragged
) -> Estimate:
    """AUC of the Reference attack: score = mean negative log-probability minus that of the retain model.

    Raises Unmeasured where the model says the same as its reference on every row: it is that model, and there is nothing to
    calibrate.
    """
    mine, theirs = nll(loss_logp) - nll(reference_loss_logp), nll(against_loss_logp) - nll(reference_against_loss_logp)
    if not np.any(mine) and not np.any(theirs):
        raise Unmeasured("the model and the reference of the attack are one and the same")
    return auc_estimate(mine, theirs)


@metric(
    "mia_gradnorm",
    within=UNIT,
    source=OPEN_UNLEARNING,
    title="membership by gradient norm (AUC)",
    better=CLOSEST,
    version=2,
)
def mia_gradnorm(gradient_norm: Array, against_gradient_norm: Array) -> Estimate:
    """AUC of the GradNorm attack: score = mean over the base's weight tensors of the norm of the loss's gradient.

    One backward for each row (provider `gradient_norm`), so the cost of many other metrics together.
    """
    return auc_estimate(gradient_norm, against_gradient_norm)


@metric("mia_min_k", within=UNIT, source=MIN_K, title="membership by Min-K% (AUC)", better=CLOSEST, version=2)
def mia_min_k(body_logp: Ragged, against_body_logp: Ragged, *, k: Share = 0.4) -> Estimate:
    """AUC of Min-K% Prob: score = minus the mean of the answer's lowest k log-probabilities, end token left out."""
    return auc_estimate(min_k_score(body_logp, k), min_k_score(against_body_logp, k))


@metric(
    "mia_min_k_plus_plus",
    within=UNIT,
    source=MIN_K_PLUS,
    title="membership by Min-K%++ (AUC)",
    better=CLOSEST,
    version=2,
)
def mia_min_k_plus_plus(
    body_logp: Ragged,
    body_logp_mean: Ragged,
    body_logp_std: Ragged,
    against_body_logp: Ragged,
    against_body_logp_mean: Ragged,
    against_body_logp_std: Ragged,
    *,
    k: Share = 0.4,
) -> Estimate:
    """AUC of Min-K%++: as Min-K% on log-probabilities standardized by their mean and spread over the vocabulary."""
    return auc_estimate(
        min_k_score(standardized(body_logp, body_logp_mean, body_logp_std), k),
        min_k_score(standardized(against_body_logp, against_body_logp_mean, against_body_logp_std), k),
    )


# --- relative to the retain model --------------------------------------------------------------------------------


def _relative(
    mine: Ragged, mine_against: Ragged, theirs: Ragged, theirs_against: Ragged, k: float, flip: bool
) -> Estimate:
    """100 (a - r) / r; a, r = Min-K% AUC of this model and of the retain model, or with `flip` 1 - AUC."""
    own = min_k_score(mine, k), min_k_score(mine_against, k)
    other = min_k_score(theirs, k), min_k_score(theirs_against, k)
    n, enough = len(mine) + len(mine_against), min(len(mine), len(mine_against)) > 1

    def relative(a: Any, r: Any) -> Any:
        a, r = (1 - a, 1 - r) if flip else (a, r)
        return 100 * (a - r) / r

    a, r = auc(*own), auc(*other)
    if r == (1 if flip else 0):
        raise Unmeasured("the retain model's AUC is 0 in this orientation: nothing is relative to it")
    with np.errstate(divide="ignore", invalid="ignore"):
        return Estimate(
            relative(a, r), _interval(relative(_resampled(*own), _resampled(*other))) if enough else None, n
        )


@metric("privleak", within=(-100, None), source=MUSE, title="PrivLeak in percent", better=CLOSEST, version=2)
def privleak(
    body_logp: Ragged,
    against_body_logp: Ragged,
    reference_body_logp: Ragged,
    reference_against_body_logp: Ragged,
    *,
    k: Share = 0.4,
) -> Estimate:
    """MUSE's PrivLeak in percent, from Min-K%: 0 = as the retain model, toward -100 = memorized, over 0 = over-forgotten.

    100 (A - A_retain) / A_retain in MUSE's orientation, A = 1 - the AUC of `mia_min_k`. A missing retain model gives
    null; open-unlearning then puts 0.5 in its place.
    """
    return _relative(body_logp, against_body_logp, reference_body_logp, reference_against_body_logp, k, flip=True)


@metric(
    "mia_rel_diff",
    within=(-100, None),
    source=OPEN_UNLEARNING,
    title="Min-K% AUC against the retain model's, in percent",
    better=CLOSEST,
    version=2,
)
def mia_rel_diff(
    body_logp: Ragged,
    against_body_logp: Ragged,
    reference_body_logp: Ragged,
    reference_against_body_logp: Ragged,
    *,
    k: Share = 0.4,
) -> Estimate:
    """Relative difference in percent of the Min-K% AUC from the retain model's: 100 (AUC - AUC_retain) / AUC_retain.

    0 = as the retain model; its sign is against that of `privleak`: over 0 = still known as members.
    """
    return _relative(body_logp, against_body_logp, reference_body_logp, reference_against_body_logp, k, flip=False)


# --- gradients --------------------------------------------------------------------------------------------------------


@provider("gradient_norm")
def gradient_norm(
    model: Any, plan: Plan, measured: Measured, context: Context, *, p: Annotated[float, Range(1.0)] = 2.0
) -> dict[str, dict[str, Any]]:
    """(rows,) mean over weight tensors of the p-norm of d(mean negative log-probability of the answer) / d(weights); the
    end token is left out.

    The tensors are those of the model under its adapters: a LoRA adapter only adds to them, so their gradient is that of the
    merged weights, and base, adapter and retain model are compared over the same tensors. One forward and backward for each row.
    """
    import torch

    from ...data.chat import end_tokens
    from ...data.collate import IGNORE, pad
    from ...forward import Pass
    from ...tuners.bypass import refuse_bypass

    refuse_bypass(model, "gradient_norm")
    pairs = sorted({i for s in context.sets.values() for i in s.answer})
    device = model.get_input_embeddings().weight.device
    ends, norms = end_tokens(plan.tokenizer), {}
    with evaluating(model), _weights(model) as weights, torch.enable_grad():
        for done, i in enumerate(pairs, 1):
            batch = {k: v.to(device) for k, v in pad([plan.encoded[i]], pad_id_of(plan.tokenizer)).items()}
            if body(plan.encoded[i], ends) is not None:
                batch["labels"][0, -1] = IGNORE
            found = torch.autograd.grad(-Pass(model, batch).logp.mean(), weights, allow_unused=True)
            norms[i] = float(torch.stack([g.float().norm(p) for g in found if g is not None]).mean())
            if context.progress is not None and (done % 50 == 0 or done == len(pairs)):
                context.progress("gradient norms", done, len(pairs))
    return {"gradient_norm": {name: np.array([norms[i] for i in s.answer]) for name, s in context.sets.items()}}


@contextmanager
def _weights(model: Any) -> Iterator[list[Any]]:
    """The weights under the adapters, trainable inside; every flag as before afterwards."""
    from ...folder.digest import base_tensors

    base = {id(t) for t in base_tensors(model).values()}  # tied weights once
    flags = [(q, q.requires_grad) for q in model.parameters()]
    wanted = [q for q in model.parameters() if q.is_floating_point() and id(q) in base]
    try:
        for q, _ in flags:
            q.requires_grad_(False)
        for q in wanted:
            q.requires_grad_(True)
        yield wanted
    finally:
        for q, flag in flags:
            q.requires_grad_(flag)
