"""Numbers that the published formulas give at hand-picked points, through the registered functions."""

from __future__ import annotations

import math

import pytest
import torch
from fakepass import FakePass, values
from torch import nn

from peft_unlearn import registry
from peft_unlearn.gradients.vector import Space, Vec
from peft_unlearn.objectives.representation import steering_vector


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


def test_masc_ends_at_its_margin():
    """tau = log(.7/.3) = .8473; at probability .7 the value is 1, at a margin of tau - eta or less nothing is pushed."""
    assert float(values("masc", FakePass(logits(0.7, 0.2, 0.1), [0]))) == pytest.approx(1.0)
    low = 1 / (1 + math.exp(0.25) * 3 / 7)  # the probability of that margin
    z = logits(low - 1e-3, 1 - low + 1e-3).requires_grad_()
    got = values("masc", FakePass(z, [0]))
    assert float(got.detach()) == 0 and not torch.autograd.grad(got.sum(), z)[0].any()


def test_jensun_is_log_2_far_from_the_refusal_and_0_at_it():
    other = FakePass(
        logits(0.5, 0.5).expand(3, 2), [1, 1, 0]
    )  # the last token is the end: every position is to say token 1
    assert values(
        "jensun", FakePass(logits(1.0, 0.0).expand(4, 2).clamp_min(-1e4), [0] * 4, alternate=other)
    ).tolist() == pytest.approx([math.log(2)] * 4)
    assert values(
        "jensun", FakePass(logits(0.0, 1.0).expand(4, 2).clamp_min(-1e4), [0] * 4, alternate=other)
    ).tolist() == pytest.approx([0.0] * 4)


def test_flat_of_a_certain_forget_answer():
    """tanh(1)/2 - tanh(.25)/2."""
    got = values("flat", FakePass(logits(1.0, 0.0), [0], alternate=FakePass(logits(0.25, 0.75), [0])))
    assert float(got) == pytest.approx((math.tanh(1) - math.tanh(0.25)) / 2)


def test_unilogit_rests_at_the_uniform_token():
    """At p_y = 1/V its own target is the model's distribution: no gradient; above it p_y - 1/V."""
    for p, slope in ((0.25, 0.0), (0.55, 0.3)):
        z = logits(p, *[(1 - p) / 3] * 3).requires_grad_()
        (g,) = torch.autograd.grad(values("unilogit", FakePass(z, [0])).sum(), z)
        assert g[0].tolist() == pytest.approx([slope, *[-slope / 3] * 3], abs=1e-9)


def test_circuit_breaker_and_adaptive_rmu():
    h, ref = (
        torch.tensor([[[9.0, 9.0], [3.0, 4.0]]]),
        torch.tensor([[[9.0, 9.0], [4.0, -3.0]]]),
    )  # one target, at right angles
    p = FakePass(logits(0.5, 0.5), [0], hidden=h, ref_hidden=ref)
    assert float(values("rr", p)) == pytest.approx(0, abs=1e-7)
    assert float(values("rr", FakePass(logits(0.5, 0.5), [0], hidden=h, ref_hidden=h))) == pytest.approx(1)
    u = steering_vector(2, 0)  # the target is 5 * |ref| = 25 long
    assert float(values("adaptive_rmu", p)) == pytest.approx(float(((h[0, 1] - 25 * u) ** 2).mean()), rel=1e-6)


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
