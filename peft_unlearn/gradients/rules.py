"""Gradient rules: how the named gradients of one step become its update direction.

``fn(g, space, state, values, *, hyper...) -> Vec``; `g` holds gradients of *minimized* losses (so gradient ascent on the forget set is
descent on ga), already summed over micro-batches and ranks; `values[name]` is the loss whose gradient ``g[name]`` is; `state` is a dict
of tensors and numbers that goes into checkpoints. A gradient may be exactly zero (kl at its reference): no rule divides by its norm then.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from ..registry import Range, Source, rule
from .vector import Space, Vec

_TOFU = Source("TOFU: A Task of Fictitious Unlearning for LLMs", "https://arxiv.org/abs/2401.06121", 2024)
_NGDIFF = Source("Unlearning as multi-task optimization (NGDiff)", "https://arxiv.org/abs/2410.22086", 2025)
_GRU = Source(
    "GRU: Mitigating the Trade-off between Unlearning and Retention", "https://arxiv.org/abs/2503.09117", 2025
)
_PCGRAD = Source("Gradient Surgery for Multi-Task Learning", "https://arxiv.org/abs/2001.06782", 2020)
_MGDA = Source("Multi-Task Learning as Multi-Objective Optimization", "https://arxiv.org/abs/1810.04650", 2018)
_PDU = Source("Constrained Entropic Unlearning: A Primal-Dual Framework", "https://arxiv.org/abs/2506.05314", 2025)

Eps = Annotated[float, Range(0, None)]


def total(g: dict[str, Vec], space: Space) -> Vec:
    """Sum of vectors."""
    out = space.zeros()
    for v in g.values():
        out.add_(v)
    return out


@rule("sum", source=_TOFU)
def sum_(g: dict[str, Vec], space: Space, state: dict[str, Any], values: dict[str, float]) -> Vec:
    """The plain sum of all gradients: the terms' weights decide (gradient difference and its kin)."""
    return total(g, space)


@rule("ngdiff", source=_NGDIFF, requires=("forget", "retain"))
def ngdiff(
    g: dict[str, Vec], space: Space, state: dict[str, Any], values: dict[str, float], *, eps: Eps = 1e-12
) -> Vec:
    """Normalized gradient difference: the sum of all gradients, each scaled to unit length.

    With ga on the forget set this is g_r/|g_r| - g_f/|g_f| of the raw NLL gradients: to first order the retain loss never rises and the
    forget loss never falls. Weights of single-term gradients cancel. A gradient of norm <= eps is left out.
    """
    out = space.zeros()
    for v in g.values():
        norm = float(space.norm(v))
        if norm > eps:
            out.add_(v, 1 / norm)
    return out


def rectified(g: Vec, m: Vec, space: Space, cos_floor: float | None = None) -> Vec:
    """`g` without its component against `m`; unchanged (the same object) where they agree or m is zero.

    cos_floor: only the part of the conflict down to this cosine is removed (so a stronger one leaves a rest).
    """
    dot, square = float(space.dot(g, m)), float(space.dot(m, m))
    if dot >= 0 or square == 0:
        return g
    if cos_floor is not None:
        dot = max(dot, cos_floor * float(space.norm(g)) * square**0.5)
    return g.clone().add_(m, -dot / square)


@rule("gru", source=_GRU, requires=("forget",))
def gru(
    g: dict[str, Vec],
    space: Space,
    state: dict[str, Any],
    values: dict[str, float],
    *,
    gamma: Annotated[float, Range(0, 1, open_low=True)] = 0.8,
    tau: Annotated[float | None, Range(0, None, open_low=True)] = None,
    cos_floor: Annotated[float | None, Range(-1, 0)] = None,
    add: Annotated[float, Range(0, None)] = 0.0,
) -> Vec:
    """Gradient rectified unlearning: the forget gradient is projected so that it does not work against a retain gradient.

    Constraint: the moving average m <- gamma g_c + (1 - gamma) m of the gradient named ``constraint`` (nll or kl on the retain set), or of
    ``retain`` where no constraint is named. With a constraint, ``retain`` belongs to the rectified objective (the published "GD + GRU").
    Gradients of any other name are added after the rectification (the published "+kl").

    Args:
        gamma: weight of the current gradient in the average; 1 = none.
        tau: the rectified gradient's norm is clipped to it.
        cos_floor: remove a conflict only down to this cosine (the repository uses -0.5).
        add: coefficient of the current constraint gradient added after rectification (the published "+ce").
    """
    if "constraint" not in g and "retain" not in g:
        raise ValueError("gru needs a gradient named constraint or retain")
    bound = "constraint" if "constraint" in g else "retain"
    own = {n: v for n, v in g.items() if n == "forget" or (n == "retain" and bound == "constraint")}
    rest = {n: v for n, v in g.items() if n not in own and n != bound}
    m = g[bound] * gamma
    if "m" in state:
        m.add_(Vec(state["m"]), 1 - gamma)
    state["m"] = m.tensors
    out = rectified(total(own, space), m, space, cos_floor)
    if add:
        out = out.clone().add_(g[bound], add)
    for v in rest.values():
        out = out.clone().add_(v)
    norm = float(space.norm(out))
    return out * (tau / norm) if tau is not None and norm > tau else out


@rule("pcgrad", source=_PCGRAD)
def pcgrad(g: dict[str, Vec], space: Space, state: dict[str, Any], values: dict[str, float]) -> Vec:
    """Projecting conflicting gradients: each loses its component against every other it conflicts with; then they are summed.

    In the order of their names in the terms (the paper shuffles; with two gradients the order makes no difference).
    """
    out = space.zeros()
    for name, v in g.items():
        for other, w in g.items():
            if other != name:
                v = rectified(v, w, space)
        out.add_(v)
    return out


@rule("mgda", source=_MGDA)
def mgda(
    g: dict[str, Vec],
    space: Space,
    state: dict[str, Any],
    values: dict[str, float],
    *,
    iterations: Annotated[int, Range(1, None)] = 100,
) -> Vec:
    """Multiple gradient descent: the shortest vector in the convex hull of the gradients; no loss rises to first order.

    Two gradients in closed form, more by Frank-Wolfe steps on their Gram matrix.
    """
    vs = list(g.values())
    gram = torch.stack([torch.stack([space.dot(a, b) for b in vs]) for a in vs]).cpu()  # (k, k)
    weights = min_norm_weights(gram, iterations)
    out = space.zeros()
    for v, w in zip(vs, weights.tolist(), strict=True):
        out.add_(v, w)
    return out


def min_norm_weights(gram: torch.Tensor, iterations: int = 100) -> torch.Tensor:
    """Weights on the simplex that minimize w^T gram w, (k,)."""
    k = len(gram)
    w = torch.full((k,), 1 / k, dtype=gram.dtype)
    if k == 2:
        a, b, ab = gram[0, 0], gram[1, 1], gram[0, 1]
        spread = a + b - 2 * ab  # |g1 - g2|^2
        first = ((b - ab) / spread).clamp(0, 1) if spread > 0 else torch.full_like(a, 0.5)
        return torch.stack([first, 1 - first])
    for _ in range(iterations):
        slope = gram @ w
        i = int(slope.argmin())
        d = -w.clone()
        d[i] += 1
        curve = d @ gram @ d
        if slope @ d >= -1e-14 * gram.diagonal().max() or curve <= 0:
            break
        w = w + (-(slope @ d) / curve).clamp(0, 1) * d
    return w


@rule("primal_dual", source=_PDU, requires=("forget", "retain"))
def primal_dual(
    g: dict[str, Vec],
    space: Space,
    state: dict[str, Any],
    values: dict[str, float],
    *,
    dual: Annotated[float, Range(0, None)] = 50.0,
    step: Annotated[float, Range(0, None)] = 1.0,
    bound: Annotated[float | None, Range(0, None)] = None,
    slack: Annotated[float, Range(1, None)] = 1.1,
    warmup: Annotated[int, Range(0, None)] = 0,
) -> Vec:
    """Forget subject to a bound on the retain loss: g_f + lambda g_r, lambda <- max(0, lambda + step (loss_r - bound)).

    The retain term wants weight 1, so that ``values["retain"]`` is the loss itself.

    Args:
        dual: lambda at the start; step: of its ascent; warmup: optimizer steps before it moves.
        bound: on the retain loss; None = slack times its value at the first step.
    """
    if "lambda" not in state:
        state.update({"lambda": dual, "bound": slack * values["retain"] if bound is None else bound, "steps": 0})
    elif state["steps"] >= warmup:
        state["lambda"] = max(0.0, state["lambda"] + step * (values["retain"] - state["bound"]))
    state["steps"] += 1
    rest = {n: v for n, v in g.items() if n != "retain"}
    return total(rest, space).add_(g["retain"], state["lambda"])
