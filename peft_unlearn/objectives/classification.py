"""Losses of classifiers, one value per row. On token rows they read every target of the row, so that soft prompts can use them too."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective

_VECTOR = Source(
    "Forget Vectors at Play: Universal Input Perturbations Driving Machine Unlearning in Image Classification",
    "https://arxiv.org/abs/2412.16780",
    2024,
)
NonNegative = Annotated[float, Range(0, None)]


def margins(z: Tensor, y: Tensor) -> Tensor:
    """By how much the right class leads: z_y - max of the others; z (n, classes), y (n,) -> (n,)."""
    right = z.gather(1, y[:, None])
    return (right - z.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)


def _row_mean(p: Pass, values: Tensor) -> Tensor:
    """(n,) values of targets -> (rows,) means over each row's targets."""
    return p.per_sequence(values) / p.lengths


@objective("margin", unit="row", needs=("logits",), source=_VECTOR)
def margin(p: Pass, *, tau: NonNegative = 1.0) -> Tensor:
    """Untargeted attack on the right class: max(z_y - max of the other z, -tau), (rows,).

    Its gradient ends once another class leads by `tau`: nothing is pushed further than that. The published loss divides the sums of
    forget and retain by the whole mixed batch: `joint: true` on both terms.
    """
    return _row_mean(p, p.map_logits(margins).clamp_min(-tau))


@objective("cross_entropy", unit="row", needs=("logp",), source=_VECTOR)
def cross_entropy(p: Pass) -> Tensor:
    """Negative log-likelihood of each row's target, of token rows the mean over its targets, (rows,).

    What `nll` is to tokens: there every token counts alike, here every row.
    """
    return _row_mean(p, -p.logp)


@objective("adapter_norm", unit="row", source=_VECTOR)
def adapter_norm(p: Pass) -> Tensor:
    """Euclidean norm of everything that is trained, once for each row: its mean is the norm itself, (rows,).

    The published penalty is lambda * norm / rows of the batch: a weight of lambda over the rows of a step. Not squared, as in the
    authors' code; at zero its gradient is zero.
    """
    trained = [q for q in p.model.parameters() if q.requires_grad]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(q.float()) for q in trained]))
    return norm.expand(int(p.mask.any(1).sum()))
