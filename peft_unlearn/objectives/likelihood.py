"""Losses that weigh the log-likelihood of each target token."""

from __future__ import annotations

from torch import Tensor

from ..forward import Pass
from ..registry import Source, objective

_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)


@objective("nll", unit="token", needs=("logp",), source=_TOFU)
def nll(p: Pass) -> Tensor:
    """Negative log-likelihood of each target token: what a retain set is trained on.  -log p_t, (n,)."""
    return -p.logp


@objective("ga", unit="token", needs=("logp",), source=_TOFU)
def ga(p: Pass) -> Tensor:
    """Gradient ascent: the log-likelihood of each target token, to be pushed down without bound.  log p_t, (n,)."""
    return p.logp
