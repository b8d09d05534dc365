"""Losses that make the next-token distribution of the forget set uncertain."""

from __future__ import annotations

import math

from torch import Tensor

from ..forward import Pass
from ..registry import Source, objective


def neg_entropy_rows(z: Tensor, y: Tensor) -> Tensor:
    """sum_v p log p of each row, (m,), in [-log V, 0]."""
    logp = z.log_softmax(1)
    return (logp.exp() * logp).sum(1)


@objective(
    "neg_entropy",
    unit="token",
    needs=("logits",),
    source=Source("Get Confused Cautiously (EMSO)", "https://arxiv.org/abs/2408.04983", 2024),
    faithful="reconstructed",
)
def neg_entropy(p: Pass) -> Tensor:
    """Negative entropy of the next-token distribution, (n,), in [-log V, 0].

    Its gradient p (log p + H) vanishes at the uniform distribution and at one-hot: a very sure model barely moves.
    """
    return p.map_logits(neg_entropy_rows)


def kl_uniform_rows(z: Tensor, y: Tensor) -> Tensor:
    """KL(uniform || model) of each row, (m,)."""
    return -math.log(z.shape[1]) - z.log_softmax(1).mean(1)


@objective(
    "kl_uniform",
    unit="token",
    needs=("logits",),
    source=Source("A Closer Look at Machine Unlearning for LLMs", "https://arxiv.org/abs/2410.08109", 2024),
)
def kl_uniform(p: Pass) -> Tensor:
    """KL(uniform || model) at every target position, (n,). Its logit gradient p - 1/V does not vanish at one-hot."""
    return p.map_logits(kl_uniform_rows)
