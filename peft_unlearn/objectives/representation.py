"""Losses on hidden states. The forward ends after the layer they look at."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective

_RMU = Source(
    "The WMDP Benchmark: Measuring and Reducing Malicious Use (RMU)", "https://arxiv.org/abs/2403.03218", 2024
)

_ADAPTIVE = Source(
    "On Effects of Steering Latent Representation for Large Language Model Unlearning (Adaptive RMU)",
    "https://arxiv.org/abs/2408.06223",
    2025,
)
_BREAKERS = Source("Improving Alignment and Robustness with Circuit Breakers", "https://arxiv.org/abs/2406.04313", 2024)


def _per_sequence(p: Pass, x: Tensor) -> Tensor:
    """Mean over target positions of each row that has one: (batch, seq) -> (rows,)."""
    mask = p.labels != -100
    return ((x * mask).sum(1) / mask.sum(1).clamp_min(1))[p.mask.any(1)]


def steering_vector(size: int, seed: int) -> Tensor:
    """RMU's direction: uniform on [0, 1)^size, scaled to unit length, (size,)."""
    u = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return u / u.norm()


@objective("rmu", unit="sequence", needs=("hidden",), source=_RMU)
def rmu(
    p: Pass,
    *,
    layer: int | str,
    coeff: Annotated[float, Range(0, None)] = 2.0,
    seed: Annotated[int, Range(0, None)] = 0,
) -> Tensor:
    """Misdirection: mean over target tokens and features of (h_layer - coeff * u)^2, (rows,); u is a fixed unit vector.

    Put adapters on `layer` and below only: nothing above it is reached. coeff is compared with the hidden state's own
    norm, which differs between models and layers.
    """
    h = p.hidden(layer).float()  # (batch, seq, hidden)
    target = coeff * steering_vector(h.shape[-1], seed).to(h)
    return _per_sequence(p, (h - target).square().mean(-1))


@objective("adaptive_rmu", unit="sequence", needs=("hidden", "ref_hidden"), source=_ADAPTIVE, faithful="reconstructed")
def adaptive_rmu(
    p: Pass,
    *,
    layer: int | str,
    coeff: Annotated[float, Range(0, None)] = 5.0,
    seed: Annotated[int, Range(0, None)] = 0,
) -> Tensor:
    """RMU towards `coeff` times the length of the reference's hidden state of each token, (rows,): no length to be found per layer."""
    h, ref = p.hidden(layer).float(), p.hidden(layer, reference=True).float()  # (batch, seq, hidden)
    target = coeff * ref.norm(dim=-1, keepdim=True) * steering_vector(h.shape[-1], seed).to(h)
    return _per_sequence(p, (h - target).square().mean(-1))


@objective("rr", unit="sequence", needs=("hidden", "ref_hidden"), source=_BREAKERS, faithful="reconstructed")
def rr(p: Pass, *, layer: int | str) -> Tensor:
    """Representation rerouting of circuit breakers: mean over target tokens of relu(cos(h_layer, h_layer of the reference)), (rows,).

    Ends where hidden states are orthogonal to what they were. One layer a term; the paper's schedule of weights is not part of it.
    """
    h, ref = p.hidden(layer).float(), p.hidden(layer, reference=True).float()
    return _per_sequence(p, torch.cosine_similarity(h, ref, dim=-1).relu())


@objective("representation_retention", unit="sequence", needs=("hidden", "ref_hidden"), source=_RMU)
def representation_retention(p: Pass, *, layer: int | str) -> Tensor:
    """Mean over target tokens and features of (h_layer - h_layer of the reference)^2, (rows,): RMU's retain loss."""
    h, ref = p.hidden(layer).float(), p.hidden(layer, reference=True).float()
    return _per_sequence(p, (h - ref).square().mean(-1))
