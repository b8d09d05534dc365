"""Forget losses with an end: a margin, a divergence of at most log 2, a squashed probability, a target of probability 1/V."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..forward import Pass
from ..registry import Range, Source, objective

_MASC = Source("MASC: margin-based unlearning with a stop rule", "https://arxiv.org/abs/2606.02920", 2026)
_JENSUN = Source("Unlearning That Lasts (JensUn)", "https://arxiv.org/abs/2509.02820", 2025)
_FLAT = Source(
    "LLM Unlearning via Loss Adjustment with Only Forget Data (FLAT)", "https://arxiv.org/abs/2410.11143", 2025
)
_UNILOGIT = Source(
    "Unilogit: Robust Machine Unlearning Using Uniform-Target Self-Distillation",
    "https://arxiv.org/abs/2505.06027",
    2025,
)


@objective("masc", unit="token", needs=("logits",), source=_MASC, faithful="reconstructed")
def masc(
    p: Pass,
    *,
    rho: Annotated[float, Range(0.01, 0.99)] = 0.7,
    eta: Annotated[float, Range(0, None, open_low=True)] = 0.25,
    top: Annotated[int, Range(1, None)] = 10,
) -> Tensor:
    """Margin to the rivals: relu(m_t - (tau - eta)) / eta with m_t = z_y - logsumexp of the `top` other largest logits, (n,).

    tau = log(rho / (1 - rho)): the margin at which the token has probability rho among itself and its rivals. Zero, without gradient,
    below tau - eta. The paper reads a suffix of a text; here all targets of an answer.
    """
    bound = math.log(rho / (1 - rho)) - eta

    def rows(z: Tensor, y: Tensor) -> Tensor:
        others = z.scatter(1, y[:, None], -torch.inf).topk(min(top, z.shape[1] - 1), dim=1).values  # (m, top)
        lead = z.gather(1, y[:, None]).squeeze(1) - others.logsumexp(1)
        return F.relu(lead - bound) / eta

    return p.map_logits(rows)


def cyclic(p: Pass) -> Tensor:
    """Tokens of each row's winner answer, its last one (the end) left out where there are others, over and over: one per target, (n,)."""
    out = []
    for row, n in zip(p.batch["alternate"]["labels"], p.mask.sum(1).tolist(), strict=True):
        words = row[row != -100]
        words = words[:-1] if len(words) > 1 else words
        out.append(words[torch.arange(n, device=words.device) % len(words)])
    return torch.cat(out)


@objective(
    "jensun",
    unit="token",
    needs=("logits", "alternate"),
    source=_JENSUN,
    alternates="refusal",
    faithful="reconstructed",
)
def jensun(p: Pass) -> Tensor:
    """Jensen-Shannon divergence to a refusal's tokens, repeated over the answer's positions, (n,), in [0, log 2].

    The target is one-hot at token v, so that only q = p_v counts: log 2 + (q log q - (1 + q) log(1 + q)) / 2. The paper repeats "No Idea";
    here each row has a refusal of the package's list.
    """

    def rows(z: Tensor, v: Tensor) -> Tensor:
        logq = z.log_softmax(1).gather(1, v[:, None]).squeeze(1)
        q = logq.exp()
        return math.log(2) + (q * logq - (1 + q) * torch.log1p(q)) / 2

    return p.map_logits(rows, targets=cyclic(p))


@objective("jsd", unit="token", needs=("logits", "ref_logits"), source=_JENSUN, faithful="reconstructed")
def jsd(p: Pass) -> Tensor:
    """Jensen-Shannon divergence of model and reference at every target, (n,), in [0, log 2]: JensUn's retain loss."""

    def rows(z: Tensor, z_ref: Tensor, y: Tensor) -> Tensor:
        logp, logq = z.log_softmax(1), z_ref.log_softmax(1)
        log_mean = torch.logaddexp(logp, logq) - math.log(2)
        return (logp.exp() * (logp - log_mean) + logq.exp() * (logq - log_mean)).sum(1) / 2

    return p.map_logits(rows, reference=True)


@objective(
    "flat", unit="sequence", needs=("logp", "alternate"), source=_FLAT, alternates="refusal", faithful="reconstructed"
)
def flat(p: Pass) -> Tensor:
    """f-divergence of a refusal over the forget answer, total variation: (tanh P_forget - tanh P_refusal) / 2, (rows,).

    P is the mean probability of an answer's tokens. Needs no retain set; in the paper no retain set is read at all.
    """
    other = p.alternate
    forget, refusal = (x.per_sequence(x.logp.exp()) / x.lengths for x in (p, other))
    return (forget.tanh() - refusal.tanh()) / 2


@objective("unilogit", unit="token", needs=("logits",), source=_UNILOGIT, faithful="reconstructed")
def unilogit(p: Pass) -> Tensor:
    """Cross entropy with the model's own distribution in which the true token has probability 1/V, held constant, (n,).

    The target's logit is logsumexp of the others - log(V - 1). Like ceu, which strikes the token out altogether.
    """

    def rows(z: Tensor, y: Tensor) -> Tensor:
        others = z.detach().scatter(1, y[:, None], -torch.inf)
        even = others.logsumexp(1, keepdim=True) - math.log(z.shape[1] - 1)
        return -(others.scatter(1, y[:, None], even).softmax(1) * z.log_softmax(1)).sum(1)

    return p.map_logits(rows)
