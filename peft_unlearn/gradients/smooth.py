"""Smoothing of the forget loss, against relearning: Unlearn-Smooth (arXiv 2502.05374, OPTML-Group/Unlearn-Smooth).

``fn(grad, space, rng, *, hyper...) -> Vec``: `grad(at, wrt=None)` sweeps the forget terms with the parameters of `space` shifted by `at`
(None = not shifted) and returns the adapter's gradient, or with ``wrt=space`` that of `space`. Parameters come back bit for bit.

The released GP and CR penalties carry no gradient (their norms are taken with ``.item()``); here they have one, by central differences:
Hessian times unit vector w is (grad(theta + h w) - grad(theta - h w)) / 2h, whose error is of the order of h^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch

from ..registry import Range, Source, smoothing
from .vector import Space, Vec

_SOURCE = Source("Towards LLM Unlearning Resilient to Relearning Attacks", "https://arxiv.org/abs/2502.05374", 2025)
Grad = Callable[..., Vec]
NonNegative = Annotated[float, Range(0, None)]
Positive = Annotated[float, Range(0, None, open_low=True)]


def _unit(v: Vec, space: Space) -> Vec | None:
    norm = float(space.norm(v))
    return v * (1 / norm) if norm > 0 else None


@smoothing("sam", source=_SOURCE, spaces=("adapter", "base"))
def sam(grad: Grad, space: Space, rng: torch.Generator, *, rho: NonNegative = 0.01) -> Vec:
    """Sharpness-aware: the gradient at theta + rho g/|g|, the worst point of a ball: one simulated step of relearning.

    Two sweeps. In the adapter space the ball is one of (A, B); rho has to be tuned anew against full-weight runs.
    """
    at = _unit(grad(None, wrt=space), space) if rho else None
    return grad(None if at is None else at * rho)


@smoothing("rs", source=_SOURCE, spaces=("adapter", "base"))
def rs(
    grad: Grad, space: Space, rng: torch.Generator, *, sigma: NonNegative = 1e-4, n: Annotated[int, Range(1, None)] = 3
) -> Vec:
    """Randomized smoothing: the mean gradient at n points theta + sigma z, z standard normal. n sweeps."""
    if not sigma:
        return grad(None)
    out = grad(space.randn(rng) * sigma)
    for _ in range(n - 1):
        out.add_(grad(space.randn(rng) * sigma))
    return out * (1 / n)


def _curved(grad: Grad, at: Vec | None, w: Vec, space: Space, h: float) -> Vec:
    """Hessian at theta + at (None = theta), times w. Two sweeps."""
    size = float(space.norm(w))
    if size == 0:
        return space.zeros()
    step = w * (h / size)
    ahead, behind = (step, step * -1.0) if at is None else (at + step, at - step)
    return grad(ahead).add_(grad(behind), -1.0) * (size / (2 * h))


@smoothing("gp", source=_SOURCE)
def gp(grad: Grad, space: Space, rng: torch.Generator, *, lam: NonNegative = 10.0, h: Positive = 1e-3) -> Vec:
    """Gradient penalty: the gradient of L + lam |grad L|. Three sweeps; h is the finite-difference step."""
    g = grad(None)
    v = _unit(g, space)
    if v is None or not lam:
        return g
    return g.add_(_curved(grad, None, v, space, h), lam)


@smoothing("cr", source=_SOURCE)
def cr(
    grad: Grad,
    space: Space,
    rng: torch.Generator,
    *,
    lam: NonNegative = 10.0,
    mu: Positive = 0.01,
    h: Positive = 1e-3,
) -> Vec:
    """Curvature regularization: the gradient of L + lam |grad L(theta + mu v) - grad L(theta)|, v = grad L/|grad L|.

    v's own dependence on theta is kept: without it the penalty would have no gradient on a quadratic. Six sweeps.
    """
    g = grad(None)
    v = _unit(g, space)
    if v is None or not lam:
        return g
    w = _unit(grad(v * mu) - g, space)
    if w is None:  # no curvature along v
        return g
    h1w = _curved(grad, v * mu, w, space, h)
    # d v / d theta = (I - v v^T) H0 / |g|, symmetric part by part: carry H1 w back through it, together with -H0 w.
    side = h1w.clone().add_(v, -float(space.dot(v, h1w))) * (mu / float(space.norm(g)))
    h0 = _curved(grad, None, side.add_(w, -1.0), space, h)
    return g.clone().add_(h1w, lam).add_(h0, lam)
