"""Gradient rules: how the named gradients of one step become its update direction.

``fn(g, space, state, values, *, hyper...) -> Vec``; `g` holds gradients of *minimized* losses, already summed over micro-batches
and ranks; `values[name]` is the loss whose gradient ``g[name]`` is; `state` is a dict that goes into checkpoints.
"""

from __future__ import annotations

from typing import Any

from ..registry import Source, rule
from .vector import Space, Vec


@rule("sum", source=Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024))
def sum_(g: dict[str, Vec], space: Space, state: dict[str, Any], values: dict[str, float]) -> Vec:
    """The plain sum of all gradients: the terms' weights decide (gradient difference and its kin)."""
    total = space.zeros()
    for v in g.values():
        total.add_(v)
    return total
