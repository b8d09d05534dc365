"""Losses between next-token distributions: of the model and its reference, or of the model and a target made from either.

Every function is row-wise over (m, vocab) logits, so no logits outlive their chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective

_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)
_GEFFECT = Source(
    "Rethinking LLM Unlearning Objectives: A Gradient Perspective", "https://arxiv.org/abs/2502.19301", 2025
)
_UNDIAL = Source("UNDIAL: Self-Distillation with Adjusted Logits", "https://arxiv.org/abs/2402.10052", 2024)
_CEU = Source("CE-U: Cross Entropy Unlearning", "https://arxiv.org/abs/2503.01224", 2025)
_PDU = Source("Constrained Entropic Unlearning: A Primal-Dual Framework", "https://arxiv.org/abs/2506.05314", 2025)
_IHL = Source(
    "Towards Robust and Parameter-Efficient Knowledge Unlearning (LoKU)", "https://arxiv.org/abs/2408.06621", 2025
)


def kl_rows(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
    """KL(reference || model) of each row of logits, (m,)."""
    logq, logp = z_ref.log_softmax(1), z.log_softmax(1)  # (m, vocab)
    q = logq.exp()
    # sum (p - q) is zero, but with it the gradient is exactly zero where the two are equal, not the rounding of sum q = 1,
    # which a rule that normalizes gradients would blow up to unit length.
    return (q * (logq - logp) + (logp.exp() - q)).sum(1)


@objective("kl", unit="token", needs=("logits", "ref_logits"), source=_TOFU)
def kl(p: Pass) -> Tensor:
    """KL(reference || model) of the next-token distribution at every target position, (n,).

    Prompt and padding are left out (open-unlearning averages over them too). Zero, with zero gradient, where the model
    equals its reference.
    """
    return p.map_logits(kl_rows, reference=True)


@objective("neg_kl", unit="token", needs=("logits", "ref_logits"), source=_GEFFECT, faithful="reconstructed")
def neg_kl(p: Pass) -> Tensor:
    """-KL(reference || model): pushes the model away from its reference, (n,). Unbounded: stop early."""
    return -p.map_logits(kl_rows, reference=True)


@objective("undial", unit="token", needs=("logits", "ref_logits"), source=_UNDIAL)
def undial(p: Pass, *, beta: Annotated[float, Range(0, None)] = 10.0) -> Tensor:
    """Cross entropy with the reference's distribution, the true token's logit lowered by beta, (n,).

    Target positions only: the released code averages over prompt and padding too and reads label -100 as a token.
    """

    def rows(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
        q = (z_ref - beta * torch.zeros_like(z_ref).scatter_(1, y[:, None], 1.0)).softmax(1)  # (m, vocab)
        return -(q * z.log_softmax(1)).sum(1)

    return p.map_logits(rows, reference=True)


def late_token(batch: Mapping[str, Any], hyper: Mapping[str, Any]) -> int:
    """Unit of `ceu`: the targets behind the first `ignore_first` of each row."""
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    return int((lengths - hyper.get("ignore_first", 1)).clamp_min(0).sum())


def ceu_rows(z: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with the own distribution without the true token, target held constant, (m,)."""
    target = z.detach().scatter(1, y[:, None], -torch.inf).softmax(1)  # (m, vocab)
    return -(target * z.log_softmax(1)).sum(1)


@objective("ceu", unit=late_token, needs=("logits",), source=_CEU)
def ceu(p: Pass, *, ignore_first: Annotated[int, Range(0, None)] = 1) -> Tensor:
    """Cross entropy with the model's own distribution from which the true token was struck out, (n,).

    Its gradient is that of -log(1 - p_y): bounded as p_y goes to 0. The first answer tokens of a row are left alone.
    """
    values = p.map_logits(ceu_rows)
    if not ignore_first:
        return values
    order = p.mask.cumsum(1)[p.mask]  # (n,): 1 at the first target of a row
    return values[order > ignore_first]


def margin_rows(z: Tensor, y: Tensor) -> Tensor:
    """(max logit - mean logit)^2 of each row, (m,)."""
    return (z.amax(1) - z.mean(1)) ** 2


@objective("pdu", unit="token", needs=("logits",), source=_PDU)
def pdu(p: Pass) -> Tensor:
    """Logit margin flattening: (max_v z - mean_v z)^2 at every target position, (n,). Goes with rule primal_dual.

    Shifted target positions; the released code reads the unshifted ones.
    """
    return p.map_logits(margin_rows)


def hinge_rows(z: Tensor, y: Tensor) -> Tensor:
    """1 + p_y - max of the other probabilities of each row, (m,), in [0, 2]."""
    prob = z.softmax(1)
    own = prob.gather(1, y[:, None]).squeeze(1)
    return 1 + own - prob.scatter(1, y[:, None], -1.0).amax(1)


@objective("inverted_hinge", unit="token", needs=("logits",), source=_IHL)
def inverted_hinge(p: Pass) -> Tensor:
    """Inverted hinge: 1 + p_y - max_{v != y} p_v, (n,), in [0, 2]: only the token and its runner-up are moved."""
    return p.map_logits(hinge_rows)
