"""Losses between whole next-token distributions of the model and of its reference."""

from __future__ import annotations

from torch import Tensor

from ..forward import Pass
from ..registry import Source, objective

_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)


def _kl(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
    """KL(reference || model) of each row, (m,)."""
    logq = z_ref.log_softmax(1)  # (m, vocab)
    return (logq.exp() * (logq - z.log_softmax(1))).sum(1)


@objective("kl", unit="token", needs=("logits", "ref_logits"), source=_TOFU)
def kl(p: Pass) -> Tensor:
    """KL(reference || model) of the next-token distribution at every target position, (n,).

    Prompt and padding are left out (open-unlearning averages over them too). Zero, with zero gradient, where the model
    equals its reference.
    """
    return p.map_logits(_kl, reference=True)
