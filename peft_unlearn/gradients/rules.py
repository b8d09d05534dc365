"""Gradient rules: how the named gradients of one step become its update direction.

``fn(g, space, state, values, *, hyper...) -> Vec``; `g` holds gradients of *minimized* losses (so gradient ascent on the forget set is
descent on ga), already summed over micro-batches and ranks; `values[name]` is the loss whose gradient ``g[name]`` is; `state` is a dict
of tensors and numbers that goes into checkpoints. A gradient may be exactly zero (kl at its reference): no rule divides by its norm then.
"""

from __future__ import annotations

import itertools
import math
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


@rule("ngdiff", source=_NGDIFF, requires=("forget", "retain"), sets_norm=True, ignores_weights=True)
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


@rule(
    "gru",
    source=_GRU,
    requires=("forget",),
    requires_any=("constraint", "retain"),
    sets_norm=lambda hyper: hyper["tau"] is not None,
)
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
        m.add_(Vec([t.to(u.device) for t, u in zip(state["m"], m.tensors, strict=True)]), 1 - gamma)
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
def mgda(g: dict[str, Vec], space: Space, state: dict[str, Any], values: dict[str, float]) -> Vec:
    """Multiple gradient descent: the shortest vector in the convex hull of the gradients; no loss rises to first order.

    A gradient that is exactly zero (kl at its reference) is left out: with it the shortest vector would be zero, and nothing
    would ever move. Exact, by trying every subset of the gradients, which are few.
    """
    out = space.zeros()
    vs = [v for v in g.values() if float(space.norm(v)) > 0]
    if not vs:
        return out
    gram = torch.stack([torch.stack([space.dot(a, b) for b in vs]) for a in vs]).cpu()  # (k, k)
    for v, w in zip(vs, min_norm_weights(gram).tolist(), strict=True):
        out.add_(v, w)
    return out


def min_norm_weights(gram: torch.Tensor) -> torch.Tensor:
    """Weights on the simplex that minimize w^T gram w, (k,): the best of the stationary points of all faces."""
    k = len(gram)
    scaled = gram / gram.diagonal().amax()
    best, least = torch.zeros(k, dtype=gram.dtype), math.inf
    for face in (f for n in range(1, k + 1) for f in itertools.combinations(range(k), n)):
        at, n = list(face), len(face)
        system = torch.ones(n + 1, n + 1, dtype=gram.dtype)  # gram w = mu 1, sum w = 1
        system[:n, :n], system[n, n] = scaled[at][:, at], 0
        right = torch.zeros(n + 1, 1, dtype=gram.dtype)
        right[n] = 1
        w = torch.linalg.lstsq(system, right).solution[:n, 0]
        if not (torch.isfinite(w).all() and (w >= -1e-12).all()):
            continue
        w = w.clamp_min(0) / w.clamp_min(0).sum()
        value = float(w @ scaled[at][:, at] @ w)
        if value < least:
            best, least = torch.zeros_like(best), value
            best[at] = w
    return best


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
    """Forget subject to a bound on the retain loss: g_f + lambda g_r, then lambda <- max(0, lambda + step (loss_r - bound)).

    In the order of open-unlearning's code: a step's gradient is weighted with the lambda from before it, and its loss moves the
    lambda of the next. The retain term wants weight 1, so that ``values["retain"]`` is the loss itself.

    Args:
        dual: lambda at the start; step: of its ascent; warmup: optimizer steps before it moves.
        bound: on the retain loss; None = slack times its value at the first step.
    """
    if "lambda" not in state:
        state.update({"lambda": dual, "bound": slack * values["retain"] if bound is None else bound, "steps": 0})
    now = state["lambda"]
    if state["steps"] >= warmup:
        state["lambda"] = max(0.0, now + step * (values["retain"] - state["bound"]))
    state["steps"] += 1
    rest = {n: v for n, v in g.items() if n != "retain"}
    return total(rest, space).add_(g["retain"], now)
