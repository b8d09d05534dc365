"""Numbers that the published formulas give at hand-picked points, through the registered functions."""

from __future__ import annotations

import math

import pytest
import torch
from fakepass import FakePass, values
from torch import nn

from peft_unlearn import registry
from peft_unlearn.gradients.vector import Space, Vec


def logits(*p: float) -> torch.Tensor:
    """One row of logits with these probabilities."""
    return torch.tensor([p], dtype=torch.float64).log()


def test_npo_at_its_start_is_20_ln_2():
    z = torch.randn(6, 9, dtype=torch.float64)
    got = values("npo", FakePass(z, [0, 1, 2, 3, 4, 5], (2, 4), z_ref=z.clone()))
    assert got.tolist() == pytest.approx([20 * math.log(2)] * 2) and float(got[0]) == pytest.approx(13.8629, abs=5e-5)


def test_simnpo_of_a_certain_answer():
    z = torch.full((3, 4), -1e4, dtype=torch.float64)
    z[:, 2] = 0.0  # NLL/T = 0
    assert float(values("simnpo", FakePass(z, [2, 2, 2]))) == pytest.approx(0.30807, abs=5e-6)


def test_inverted_hinge():
    assert float(values("inverted_hinge", FakePass(logits(0.6, 0.3, 0.1), [0]))) == pytest.approx(1.3)


def test_ceu_is_the_target_entropy_plus_ln_2_at_one_half():
    got = float(values("ceu", FakePass(logits(0.5, 0.2, 0.3), [0]), ignore_first=0))
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))  # of the target, the other two tokens renormalized
    assert got - entropy == pytest.approx(math.log(2))


def test_satimp_weight_at_its_peak():
    z = logits(5 / 6, 1 / 6).requires_grad_()
    got = values("satimp", FakePass(z, [0]))
    weight = float(got.detach()) / math.log(5 / 6)
    assert weight == pytest.approx((5 / 6) ** 5 / 6) and weight == pytest.approx(0.06698, abs=5e-6)
    (g,) = torch.autograd.grad(got.sum(), z)  # weight * (onehot - p): the weight is held constant
    assert g[0].tolist() == pytest.approx([weight / 6, -weight / 6])
    for p in (0.80, 0.86):  # p = beta1 / (beta1 + beta2) is where it is heaviest
        assert float(values("satimp", FakePass(logits(p, 1 - p), [0]))) / math.log(p) < weight


def test_pdu_margin():
    z = torch.tensor([[3.0, 0.0, 0.0]])
    for y in range(3):  # whatever the label is
        assert float(values("pdu", FakePass(z, [y]))) == pytest.approx(4.0)


def test_undial_target_on_a_uniform_reference():
    """The target's own mass shows in the gradient p - q."""
    z = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(
        values("undial", FakePass(z, [1], z_ref=torch.zeros(1, 4, dtype=torch.float64))).sum(), z
    )
    q = 0.25 - g[0]
    want = math.exp(-10) / (3 + math.exp(-10))
    assert float(q[1]) == pytest.approx(want, rel=1e-9) and want == pytest.approx(1.513e-5, abs=5e-9)
    assert q[[0, 2, 3]].tolist() == pytest.approx([(1 - want) / 3] * 3)


def test_ngdiff_of_orthogonal_gradients():
    space = Space([("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(2, 2)))])
    f, r = space.zeros(), space.zeros()
    f.tensors[0] += torch.tensor([3.0, 0.0])
    r.tensors[0] += torch.tensor([0.0, 0.5])
    r.tensors[1] += 7.0
    d: Vec = registry.get("rule", "ngdiff").fn({"forget": f, "retain": r}, space, {}, {})
    assert float(space.dot(d, d)) == pytest.approx(2.0)


def test_learning_rate_fit():
    """3 x^2 - 1.2 x + 5 probed around 0.1 has its minimum at 0.2."""
    gen = registry.get("step_size", "gen").fn
    assert gen(lambda x: 3 * x * x - 1.2 * x + 5, 0.1, smooth=0.0) == pytest.approx(0.2)
