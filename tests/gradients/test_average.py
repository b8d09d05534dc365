"""Weight averaging: constant trajectories, the plain mean, the best low-rank factors of the mean product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_unlearn import registry
from peft_unlearn.gradients.vector import Space, Vec

R, OUT, IN = 2, 5, 7
NAMES = ["m.lora_A.default.weight", "m.lora_B.default.weight", "m.bias"]
SPACE = Space([(n, nn.Parameter(torch.zeros(s))) for n, s in zip(NAMES, [(R, IN), (OUT, R), (OUT,)], strict=True)])


def point(seed: int) -> Vec:
    return SPACE.randn(torch.Generator().manual_seed(seed))


def run(points: list[Vec], **hyper: Any) -> list[Vec | None]:
    method, state = registry.get("averaging", "wa"), {}
    assert not method.check(hyper)
    return [method.fn(p, SPACE, state, i, **method.resolve(hyper)) for i, p in enumerate(points, 1)]


def product(v: Vec) -> torch.Tensor:
    return v.tensors[1].double() @ v.tensors[0].double()


@pytest.mark.parametrize("exact", [False, True])
def test_a_constant_trajectory_is_its_average(exact):
    theta = point(1)
    found = run([theta.clone() for _ in range(6)], start=2, every=2, exact=exact)
    assert [f is not None for f in found] == [False, True, False, True, False, True]
    last = found[-1]
    assert last is not None
    torch.testing.assert_close(product(last), product(theta), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last.tensors[2], theta.tensors[2], atol=1e-6, rtol=1e-6)
    if not exact:
        for a, b in zip(last.tensors, theta.tensors, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_running_mean_of_the_chosen_steps():
    points = [point(i) for i in range(12)]
    found = run(points, start=3, every=4)
    chosen = [points[i - 1] for i in (3, 7, 11)]
    assert [i for i, f in enumerate(found, 1) if f is not None] == [3, 7, 11]
    for i, t in enumerate(found[10].tensors):
        torch.testing.assert_close(t, torch.stack([c.tensors[i] for c in chosen]).mean(0))


def test_exact_is_the_best_rank_r_of_the_mean_product():
    points = [point(10 + i) for i in range(4)]
    last = run(points, start=1, every=1, exact=True)[-1]
    assert last is not None and [t.shape for t in last.tensors] == [p.shape for p in SPACE.params]
    dense = torch.stack([product(p) for p in points]).mean(0)
    u, s, vt = torch.linalg.svd(dense)
    best = (u[:, :R] * s[:R]) @ vt[:R]
    torch.testing.assert_close(product(last), best, atol=1e-5, rtol=1e-5)
    error = float((product(last) - dense).norm())
    assert error == pytest.approx(float(s[R:].norm()), rel=1e-4)
    plain = run(points, start=1, every=1)[-1]
    assert plain is not None and float((product(plain) - dense).norm()) > error  # what the cheap mean of factors misses
    torch.testing.assert_close(last.tensors[2], torch.stack([p.tensors[2] for p in points]).mean(0))


@pytest.mark.parametrize("exact", [False, True])
def test_the_trajectory_is_not_aliased(exact):
    """The optimizer goes on writing into theta; the average must not follow, and an average handed out must not move a point kept."""
    theta, state = point(3), {}
    wa = registry.get("averaging", "wa").fn
    wa(theta, SPACE, state, 1, start=1, every=1, exact=exact)
    first = theta.clone()
    theta.add_(point(4))
    second = theta.clone()
    last = wa(theta, SPACE, state, 2, start=1, every=1, exact=exact)
    want = (first + second) * 0.5
    torch.testing.assert_close(last.tensors[2], want.tensors[2])
    theta.add_(point(5), 100.0)
    torch.testing.assert_close(last.tensors[2], want.tensors[2])
    again = wa(second, SPACE, state, 3, start=1, every=1, exact=exact)
    torch.testing.assert_close(again.tensors[2], (first + second * 2).tensors[2] / 3)
