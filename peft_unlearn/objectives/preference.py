"""Preference losses: the forget answer as the loser, with or without a winner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective

_DPO = Source("Direct Preference Optimization", "https://arxiv.org/abs/2305.18290", 2023)
_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)
_NPO = Source("Negative Preference Optimization", "https://arxiv.org/abs/2404.05868", 2024)
_ALTPO = Source(
    "Alternate Preference Optimization for Unlearning Factual Knowledge", "https://arxiv.org/abs/2409.13474", 2024
)

Positive = Annotated[float, Range(0, None, open_low=True)]


@objective("npo", unit="sequence", needs=("logp", "ref_logp"), source=_NPO)
def npo(p: Pass, *, beta: Positive = 0.1) -> Tensor:
    """Negative preference optimization: -(2/beta) log sigmoid(-beta (log p(y) - log p_ref(y))), (rows,).

    Sums over the targets of a row, as in locuslab/open-unlearning (beta 0.1 is tuned for that); bounded below by 0.
    """
    ratio = p.per_sequence(p.logp - p.ref_logp)  # (rows,)
    return -2 / beta * F.logsigmoid(-beta * ratio)


@objective(
    "simnpo",
    unit="sequence",
    needs=("logp",),
    source=Source("Simplicity Prevails: Rethinking NPO for LLM Unlearning", "https://arxiv.org/abs/2410.07163", 2024),
)
def simnpo(p: Pass, *, beta: Positive = 4.5, delta: float = 0.0) -> Tensor:
    """Reference-free NPO on the length-normalized likelihood: -(2/beta) log sigmoid(beta (NLL/T - delta)), (rows,).

    T counts the targets of the row (the end-of-sequence token is one).
    """
    nll = -p.per_sequence(p.logp) / p.lengths  # (rows,)
    return -2 / beta * F.logsigmoid(beta * (nll - delta))


def _dpo(p: Pass, beta: float) -> Tensor:
    win = p.alternate.per_sequence(p.alternate.logp - p.alternate.ref_logp)  # (rows,)
    lose = p.per_sequence(p.logp - p.ref_logp)
    return -2 / beta * F.logsigmoid(beta * (win - lose))


@objective("dpo", unit="sequence", needs=("logp", "ref_logp", "alternate"), source=_DPO, alternates="row")
def dpo(p: Pass, *, beta: Positive = 0.1) -> Tensor:
    """Preference for the row's own ``alternate`` answer: -(2/beta) log sigmoid(beta (r_win - r_lose)), (rows,).

    r = log p - log p_ref summed over the answer. The factor 2/beta is locuslab/open-unlearning's.
    """
    return _dpo(p, beta)


@objective("idk_dpo", unit="sequence", needs=("logp", "ref_logp", "alternate"), source=_TOFU, alternates="refusal")
def idk_dpo(p: Pass, *, beta: Positive = 0.1) -> Tensor:
    """dpo whose winner is a refusal, (rows,)."""
    return _dpo(p, beta)


@objective("altpo", unit="sequence", needs=("logp", "ref_logp", "alternate"), source=_ALTPO, alternates="generated")
def altpo(p: Pass, *, beta: Positive = 0.1) -> Tensor:
    """dpo whose winners are other answers that the model itself gave before training, (rows,)."""
    return _dpo(p, beta)


def alternate_token(batch: Mapping[str, Any], hyper: Mapping[str, Any]) -> int:
    """Unit of `idk`: the targets of the winner answers."""
    return int((batch["alternate"]["labels"][:, 1:] != -100).sum())


@objective("idk", unit=alternate_token, needs=("alternate",), source=_TOFU, alternates="refusal")
def idk(p: Pass) -> Tensor:
    """Negative log-likelihood of a refusal to the forget question, (n of the refusal,)."""
    return -p.alternate.logp
