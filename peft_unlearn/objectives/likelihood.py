"""The likelihood family: every loss here is a weight, held constant, times the log-likelihood of each target token.

One code path (`ascend`) serves all of them, with the three control tricks of Unlearning with Control (arXiv 2406.09179,
tmlr-group/Unlearning-with-Control) as options of each: likelihood capping, loss selection, temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..forward import Pass
from ..head import token_logp
from ..registry import Range, Source, objective

_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)
_GEFFECT = Source(
    "Rethinking LLM Unlearning Objectives: A Gradient Perspective", "https://arxiv.org/abs/2502.19301", 2025
)
_SATIMP = Source(
    "Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning", "https://arxiv.org/abs/2505.11953", 2025
)

Cap = Annotated[float | None, Range(0, 1, open_low=True)]
Select = Annotated[float, Range(0, 1, open_low=True)]
Positive = Annotated[float, Range(0, None, open_low=True)]
NonNegative = Annotated[float, Range(0, None)]


def _kept(lengths: Tensor, select: float) -> Tensor:
    """Targets that selection keeps of rows with `lengths` targets: the fraction rounded up, at least one."""
    return (lengths * select - 1e-6).ceil().clamp_min(1).long()


def selected_token(batch: Mapping[str, Any], hyper: Mapping[str, Any]) -> int:
    """Unit of the family: the targets that loss selection keeps (all of them at ``select=1``)."""
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    return int(_kept(lengths[lengths > 0], hyper.get("select", 1.0)).sum())


def ascend(
    p: Pass, weight: Callable[[Tensor], Tensor] | None, cap: float | None, select: float, temperature: float
) -> Tensor:
    """sg[w_t] log p_t of the selected targets, (n_selected,): minimizing it is weighted gradient ascent on the NLL.

    Args:
        weight: log p (n,) detached -> (n,); None = 1.
        cap: likelihood below which a token counts as forgotten: its log-likelihood stays at log cap, without gradient.
        select: fraction of each row's targets kept: those with the smallest NLL, still remembered best.
        temperature: of the softmax that is pushed; above 1 it flattens it. Weights, cap and selection look at the model's own
            likelihoods, so that those of a reference stay comparable.
    """
    if temperature == 1:
        pushed = own = p.logp
    else:
        pair = p.map_logits(lambda z, y: torch.stack([token_logp(z / temperature, y), token_logp(z.detach(), y)], 1))
        pushed, own = pair.unbind(1)
    seen = own.detach()
    if cap is not None:
        pushed = torch.where(seen > math.log(cap), pushed, math.log(cap))
    values = pushed if weight is None else weight(seen) * pushed
    if select < 1:
        padded = seen.new_full(p.mask.shape, -torch.inf).masked_scatter(p.mask, seen)  # (batch, seq-1)
        rank = padded.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        values = values[(rank < _kept(p.mask.sum(1), select)[:, None])[p.mask]]
    return values


@objective("nll", unit="token", needs=("logp",), source=_TOFU)
def nll(p: Pass) -> Tensor:
    """Negative log-likelihood of each target token: what a retain set is trained on.  -log p_t, (n,)."""
    return -p.logp


@objective("ga", unit=selected_token, needs=("logp",), source=_TOFU)
def ga(p: Pass, *, cap: Cap = None, select: Select = 1.0, temperature: Positive = 1.0) -> Tensor:
    """Gradient ascent: the log-likelihood of each target token, pushed down without bound.  log p_t, (n,)."""
    return ascend(p, None, cap, select, temperature)


@objective("wga", unit=selected_token, needs=("logp",), source=_GEFFECT)
def wga(
    p: Pass, *, beta: NonNegative = 1.0, cap: Cap = None, select: Select = 1.0, temperature: Positive = 1.0
) -> Tensor:
    """Weighted gradient ascent: sg[p_t^beta] log p_t, (n,); forgotten tokens lose their weight.

    beta 1 is locuslab/open-unlearning's default, 5 tmlr-group/G-effect's; beta 0 is gradient ascent.
    """
    return ascend(p, lambda logp: (beta * logp).exp(), cap, select, temperature)


@objective("tnpo", unit=selected_token, needs=("logp", "ref_logp"), source=_GEFFECT)
def tnpo(
    p: Pass,
    *,
    beta: NonNegative = 4.0,
    eps: NonNegative = 1e-5,
    cap: Cap = None,
    select: Select = 1.0,
    temperature: Positive = 1.0,
) -> Tensor:
    """Token-wise NPO: sg[w_t] log p_t with w_t = 2 p_t^beta / (p_t^beta + p_ref,t^beta + eps), (n,)."""
    return ascend(p, lambda logp: _npo_weight(logp, p.ref_logp, beta, eps), cap, select, temperature)


@objective("wtnpo", unit=selected_token, needs=("logp", "ref_logp"), source=_GEFFECT)
def wtnpo(
    p: Pass,
    *,
    beta: NonNegative = 4.0,
    alpha: NonNegative = 1.5,
    eps: NonNegative = 1e-5,
    cap: Cap = None,
    select: Select = 1.0,
    temperature: Positive = 1.0,
) -> Tensor:
    """Weighted token-wise NPO: the weight of tnpo times p_t^alpha, (n,)."""
    return ascend(
        p, lambda logp: (alpha * logp).exp() * _npo_weight(logp, p.ref_logp, beta, eps), cap, select, temperature
    )


def _npo_weight(logp: Tensor, ref: Tensor, beta: float, eps: float) -> Tensor:
    """2 p^beta / (p^beta + p_ref^beta + eps) as a sigmoid of log-likelihoods: no 0/0 where both powers underflow."""
    other = torch.logaddexp(beta * ref, ref.new_tensor(math.log(eps) if eps else -math.inf))
    return 2 * torch.sigmoid(beta * logp - other)


@objective("satimp", unit=selected_token, needs=("logp",), source=_SATIMP)
def satimp(
    p: Pass,
    *,
    beta1: NonNegative = 5.0,
    beta2: NonNegative = 1.0,
    cap: Cap = None,
    select: Select = 1.0,
    temperature: Positive = 1.0,
) -> Tensor:
    """Saturation and importance: sg[p_t^beta1 (1 - p_t)^beta2] log p_t, (n,); heaviest at p = beta1 / (beta1 + beta2).

    Sources differ on the weights of forget and retain (10:1 either way): say yours in the recipe.
    """

    def weight(logp: Tensor) -> Tensor:
        # 1 - p = -expm1(log p) keeps its digits near p = 1; 0^0 is 1, as for beta2 = 0.
        return (beta1 * logp).exp() * (-torch.expm1(logp)).clamp_min(0) ** beta2

    return ascend(p, weight, cap, select, temperature)
