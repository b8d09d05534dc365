"""Losses on the routers of mixture-of-experts models: UOE's anchor, and a term that holds routing where it was."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..forward import Pass
from ..registry import Source, objective

_UOE = Source(
    "SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?", "https://arxiv.org/abs/2411.18797", 2025
)


def gates(logits: Tensor, top_k: int) -> Tensor:
    """Full softmax with all but the `top_k` largest entries of a row set to 0, not renormalized: (tokens, experts)."""
    q = logits.float().softmax(-1)
    kept = q.topk(top_k, dim=-1)
    return torch.zeros_like(q).scatter(-1, kept.indices, kept.values)


def top_k_of(model: Any) -> int:
    """Experts that a token gets, from the model's config."""
    text = model.config.get_text_config()
    for name in ("num_experts_per_tok", "moe_top_k", "num_experts_per_token"):
        if getattr(text, name, None):
            return int(getattr(text, name))
    raise ValueError("the model's config does not say how many experts a token gets")


@objective("router_anchor", unit="position", needs=("router",), source=_UOE)
def router_anchor(
    p: Pass, *, experts: dict | None = None, on: Literal["full_softmax", "topk_gates"] = "full_softmax"
) -> Tensor:
    """Router anchor: squared distance between a token's gates and the one-hot of the chosen expert, (tokens,).

    Mean over the layers of `experts` (``{layer: [ids]}``; several experts share the target equally). The paper's text sees
    the truncated gates (`topk_gates`), under which an expert that fell out of the top k has no gradient; the full softmax
    can pull it back. The paper does not state the reduction: unpadded tokens of the batch here.

    Args:
        experts: default the adapter's own.
    """
    tokens = p.attention_mask.flatten().bool()
    per_layer = []
    for layer, ids in (experts or {}).items():
        logits = p.router(int(layer))[tokens]  # (unpadded tokens, experts)
        q = logits.float().softmax(-1) if on == "full_softmax" else gates(logits, top_k_of(p.model))
        target = torch.zeros_like(q[:1])
        target[0, list(ids)] = 1 / len(ids)
        per_layer.append((q - target).square().sum(-1))
    return torch.stack(per_layer).mean(0)


@objective(
    "router_keep",
    unit="position",
    needs=("router", "ref_router"),
    source=Source("peft_unlearn: a keep term for routing on retain tokens", "https://arxiv.org/abs/2411.18797", 2026),
    faithful="reconstructed",
)
def router_keep(p: Pass, *, layers: list | None = None) -> Tensor:
    """Keeps routing where it was: squared distance between the routers' softmax and the reference's, mean over layers, (tokens,).

    Ours, not the paper's: meant for the retain batch when a router is trained.

    Args:
        layers: blocks whose routers are held; default those of the adapter.
    """
    tokens = p.attention_mask.flatten().bool()
    per_layer = [
        (p.router(int(k))[tokens].float().softmax(-1) - p.router(int(k), reference=True)[tokens].float().softmax(-1))
        .square()
        .sum(-1)
        for k in layers or ()
    ]
    return torch.stack(per_layer).mean(0)
