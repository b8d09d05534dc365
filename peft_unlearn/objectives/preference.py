"""Preference losses: the forget answer as the loser, with or without a winner."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective


@objective(
    "npo",
    unit="sequence",
    needs=("logp", "ref_logp"),
    source=Source("Negative Preference Optimization", "https://arxiv.org/abs/2404.05868", 2024),
)
def npo(p: Pass, *, beta: Annotated[float, Range(0, None, open_low=True)] = 0.1) -> Tensor:
    """Negative preference optimization: -(2/beta) log sigmoid(-beta (log p(y) - log p_ref(y))), (rows,).

    Sums over the targets of a row, as in locuslab/open-unlearning (beta 0.1 is tuned for that); bounded below by 0.
    """
    ratio = p.per_sequence(p.logp - p.ref_logp)  # (rows,)
    return -2 / beta * F.logsigmoid(-beta * ratio)


@objective(
    "simnpo",
    unit="sequence",
    needs=("logp",),
    source=Source(
        "Simplicity Prevails: Rethinking Negative Preference Optimization", "https://arxiv.org/abs/2410.07163", 2024
    ),
)
def simnpo(p: Pass, *, beta: Annotated[float, Range(0, None, open_low=True)] = 4.5, delta: float = 0.0) -> Tensor:
    """Reference-free NPO on the length-normalized likelihood: -(2/beta) log sigmoid(beta (NLL/T - delta)), (rows,).

    T counts the targets of the row (the end-of-sequence token is one).
    """
    nll = -p.per_sequence(p.logp) / p.lengths  # (rows,)
    return -2 / beta * F.logsigmoid(beta * (nll - delta))
