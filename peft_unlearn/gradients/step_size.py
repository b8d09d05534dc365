"""An automatic learning rate: fit the retain loss along the step that the optimizer would take.

GeN (arXiv 2407.02772), used by NGDiff (arXiv 2410.22086). The fit sees the optimizer's own preconditioned update; parameters and optimizer
state are bit for bit as before afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch

from ..registry import Range, Source, step_size
from .vector import Space, Vec

_GEN = Source(
    "Automatic gradient descent with generalized Newton's method (GeN)", "https://arxiv.org/abs/2407.02772", 2025
)


def fit(xs: list[float], losses: list[float]) -> tuple[float, float, float]:
    """(a, b, R^2) of losses ~ c - b x + a x^2 / 2 by least squares; xs hold at least three different values."""
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)
    scale = x.abs().max()
    design = torch.stack([torch.ones_like(x), -x / scale, 0.5 * (x / scale) ** 2], 1)  # (n, 3), well conditioned
    c = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    spread = ((y - y.mean()) ** 2).sum()
    rest = ((y - design @ c) ** 2).sum()
    r2 = 1 - float(rest / spread) if spread > 0 else 0.0
    return float(c[2] / scale**2), float(c[1] / scale), r2


def _enough_probes(hyper: Mapping[str, Any]) -> str | None:
    few = len(set(hyper["probes"])) < 3
    return "probes need at least three different multiples of the learning rate" if few else None


@step_size("gen", source=_GEN, check=_enough_probes)
def gen(
    loss: Callable[[float], float],
    eta: float,
    *,
    every: Annotated[int, Range(1, None)] = 10,
    max_ratio: Annotated[float, Range(1, None, open_low=True)] = 2.0,
    min_r2: Annotated[float, Range(0, 1)] = 0.99,
    smooth: Annotated[float, Range(0, 1)] = 0.9,
    probes: tuple[float, ...] = (-1.0, 0.0, 1.0),
) -> float:
    """The next learning rate, from the retain loss probed at multiples of the present one along the optimizer's own update.

    The minimum b/a of the fitted parabola c - b xi + a xi^2/2 is taken only where a > 0, b > 0 and R^2 >= min_r2; it is clamped to
    [eta/max_ratio, eta max_ratio] and smoothed: smooth * eta + (1 - smooth) * proposal. A loss that is not finite halves
    eta. With the three default probes the parabola is exact, so R^2 means something only once more are given.

    Args:
        loss: ``loss(xi)``, the retain loss at theta - xi u; ``loss(0)`` costs nothing.
        every: optimizer steps between refreshes (the engine's business).
    """
    xs = [m * eta for m in probes]
    losses = [loss(x) for x in xs]
    if not all(map(math.isfinite, losses)):
        return eta / 2
    a, b, r2 = fit(xs, losses)
    if not (a > 0 and b > 0 and r2 >= min_r2):
        return eta
    proposal = min(max(b / a, eta / max_ratio), eta * max_ratio)
    return smooth * eta + (1 - smooth) * proposal


@contextmanager
def peeked_update(optimizer: Any, space: Space) -> Iterator[Vec]:
    """The update u (per unit of learning rate) of the optimizer's next step, theta <- theta - lr u, taken and undone bit for bit.

    The whole optimizer state is copied for the time of the peek: moments and step counts stay what they were.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper counts and skips steps
    lr = float(inner.param_groups[0]["lr"])
    theta = [p.detach().clone() for p in space.params]
    state = {p: copy.deepcopy(s) for p, s in inner.state.items()}
    try:
        inner.step()
        with torch.no_grad():
            update = Vec([(t - p).float() / lr for t, p in zip(theta, space.params, strict=True)])
    finally:
        with torch.no_grad():
            for p, t in zip(space.params, theta, strict=True):
                p.copy_(t)
        inner.state.clear()
        inner.state.update(state)
    yield update
