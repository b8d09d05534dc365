"""Averaging of the adapter over the last part of training; the average replaces the last iterate at the end."""

from __future__ import annotations

from typing import Annotated, Any

import torch

from ..registry import Range, Source, averaging
from ..tuners.lowrank import cut
from .vector import Space, Vec

_SOURCE = Source("Towards LLM Unlearning Resilient to Relearning Attacks", "https://arxiv.org/abs/2502.05374", 2025)


@averaging("wa", source=_SOURCE)
def wa(
    theta: Vec,
    space: Space,
    state: dict[str, Any],
    step: int,
    *,
    start: Annotated[int, Range(0, None)] = 100,
    every: Annotated[int, Range(1, None)] = 5,
    exact: bool = False,
) -> Vec | None:
    """Weight averaging: the mean of the adapter every `every` steps from step `start` on.

    exact: average the products B A instead of the factors, and factor the mean again at the adapter's rank: the mean of rank-r products
    has a higher rank, so this is the best rank-r approximation of it. Keeps every averaged factor (one adapter each).
    """
    if step < start or (step - start) % every:
        return None
    if exact:
        state.setdefault("kept", []).append([t.to("cpu", copy=True) for t in theta.tensors])
        return _mean_product(state["kept"], space, theta)
    n = state["n"] = state.get("n", 0) + 1
    mean = Vec([t.to(u.device) for t, u in zip(state["mean"], theta.tensors, strict=True)]) if n > 1 else space.zeros()
    mean = mean.add_(theta - mean, 1 / n)
    state["mean"] = mean.tensors
    return mean


def _mean_product(kept: list[list[torch.Tensor]], space: Space, theta: Vec) -> Vec:
    """Factors of the best rank-r approximation of the mean of B A over `kept`; other parameters by their plain mean."""
    out = [torch.stack([k[i] for k in kept]).mean(0) for i in range(len(space))]
    where = {n: i for i, n in enumerate(space.names)}
    for name, i in where.items():
        j = where.get(name.replace("lora_A", "lora_B"))
        if "lora_A" in name and j is not None:
            a = torch.cat([k[i] for k in kept])  # (n r, in)
            b = torch.cat([k[j] for k in kept], 1) / len(kept)  # (out, n r)
            out[i], out[j], _ = cut(a, b, rank=kept[0][i].shape[0])
    return Vec([t.to(u.device) for t, u in zip(out, theta.tensors, strict=True)])
