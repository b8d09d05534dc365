"""The algebra of every gradient rule on random vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_unlearn import registry
from peft_unlearn.gradients.rules import min_norm_weights
from peft_unlearn.gradients.vector import Space, Vec
from peft_unlearn.gradients.window import group_indices

SHAPES = {
    "model.layers.0.q.lora_A.default.weight": (2, 3),
    "model.layers.0.q.lora_B.default.weight": (4, 2),
    "model.layers.1.q.lora_A.default.weight": (2, 3),
    "model.layers.1.q.lora_B.default.weight": (4, 2),
}
SPACE = Space([(n, nn.Parameter(torch.zeros(s))) for n, s in SHAPES.items()])
RULES = [m.name for m in registry.methods("rule")]
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(1e-3, 1e3)
some = settings(max_examples=40, deadline=None, derandomize=True)


def draw(seed: int, scale: float = 1.0) -> Vec:
    return SPACE.randn(torch.Generator().manual_seed(seed)) * scale


def apply(name: str, g: dict[str, Vec], state: Any = None, values: Any = None, **hyper: Any) -> Vec:
    method = registry.get("rule", name)
    assert not method.check(hyper)
    state = {} if state is None else state
    return method.fn(g, SPACE, state, values or dict.fromkeys(g, 1.0), **method.resolve(hyper))


def dot(a: Vec, b: Vec) -> float:
    return float(SPACE.dot(a, b))


def norm(a: Vec) -> float:
    return float(SPACE.norm(a))


def near(a: Vec, b: Vec, rel: float = 1e-5, scale: float | None = None) -> bool:
    return norm(a - b) <= rel * (norm(b) if scale is None else scale)


def equal(a: Vec, b: Vec) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def conflicting(seed: int, cos: float) -> tuple[Vec, Vec]:
    """Two unit vectors with this cosine."""
    a, b = draw(seed), draw(seed + 1)
    a = a * (1 / norm(a))
    b = b - a * dot(a, b)
    return a, a * cos + b * (math.sqrt(1 - cos * cos) / norm(b))


# --- every rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("zero", ["forget", "retain"])
def test_one_zero_gradient_is_legitimate(name, zero):
    g = {"forget": draw(1), "retain": draw(2)}
    g[zero] = SPACE.zeros()
    d = apply(name, g)
    assert all(torch.isfinite(t).all() for t in d.tensors)
    if name != "gru" or zero == "retain":  # without a forget gradient gru has nothing to rectify
        assert norm(d) > 0
    both = apply(name, {"forget": SPACE.zeros(), "retain": SPACE.zeros()})
    assert norm(both) == 0.0


@pytest.mark.parametrize("name", RULES)
def test_inputs_are_left_alone(name):
    g = {"forget": draw(1), "retain": draw(1) * -0.5 + draw(2) * 0.1}
    before = {k: v.clone() for k, v in g.items()}
    state: dict[str, Any] = {}
    for _ in range(2):
        d = apply(name, g, state)
        d.add_(d, 3.0)  # whoever scales the update must not scale a gradient or the state either
    assert all(equal(g[k], before[k]) for k in g)
    again: dict[str, Any] = {}
    apply(name, g, again)
    d = apply(name, g, again)
    assert near(d, apply(name, g, state), 1e-6) or name == "primal_dual"  # its dual variable moves on


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("scope", ["layer", "tensor"])
def test_scope_is_the_rule_per_group(name, scope):
    """What the engine does with a scope, and at step 0, where every lora_A has an exactly zero gradient."""
    method = registry.get("rule", name)
    g = {"forget": draw(5), "retain": draw(6)}
    for v in g.values():
        for n, t in zip(SPACE.names, v.tensors, strict=True):
            if "lora_A" in n:
                t.zero_()
    groups = group_indices(SPACE.names, scope)
    assert len(groups) == {"layer": 2, "tensor": 4}[scope] and sorted(i for x in groups.values() for i in x) == [
        0,
        1,
        2,
        3,
    ]
    for indices in groups.values():
        part = {k: Vec([v.tensors[i] for i in indices]) for k, v in g.items()}
        d = method.fn(part, SPACE.sub(indices), {}, {"forget": 1.0, "retain": 1.0}, **method.resolve({}))
        for i, t in zip(indices, d.tensors, strict=True):
            assert torch.isfinite(t).all()
            if "lora_A" in SPACE.names[i]:
                assert float(t.abs().max()) == 0.0


# --- sum, ngdiff ------------------------------------------------------------------------------------------------------


@given(seeds)
@some
def test_sum(seed):
    g = {n: draw(seed + i) for i, n in enumerate(("forget", "retain", "more"))}
    assert near(apply("sum", g), g["forget"] + g["retain"] + g["more"], 1e-6)


@given(seeds, scales, scales)
@some
def test_ngdiff_ignores_scale(seed, a, b):
    f, r = draw(seed), draw(seed + 1)
    d = apply("ngdiff", {"forget": f, "retain": r})
    assert near(apply("ngdiff", {"forget": f * a, "retain": r * b}), d, scale=1.0)


@given(seeds, st.floats(-1, 1))
@some
def test_ngdiff_hurts_neither_loss(seed, cos):
    """g_f is the gradient of the minimized loss (ga): both inner products are >= 0, and |d|^2 = 2 + 2 cos."""
    f, r = conflicting(seed, cos)
    f = f * 7.0
    d = apply("ngdiff", {"forget": f, "retain": r})
    assert dot(d, r) == pytest.approx(1 + cos, abs=1e-5) and dot(d, f) == pytest.approx(7 * (1 + cos), abs=1e-4)
    assert dot(d, d) == pytest.approx(2 + 2 * cos, abs=1e-5)  # 2 - 2 cos of the raw NLL gradients
    assert dot(d, r) >= -1e-6 and dot(d, f) >= -1e-5


@given(seeds, scales)
@some
def test_ngdiff_of_parallel_gradients(seed, k):
    r = draw(seed)
    assert norm(apply("ngdiff", {"forget": r * -k, "retain": r})) <= 1e-6  # raw NLL gradients agree: nothing to gain
    assert norm(apply("ngdiff", {"forget": r * k, "retain": r})) == pytest.approx(2.0, rel=1e-5)


def test_ngdiff_leaves_tiny_gradients_out():
    r = draw(1)
    d = apply("ngdiff", {"forget": draw(2, 1e-20), "retain": r})
    assert near(d, r * (1 / norm(r)))


# --- gru --------------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 1))
@some
def test_gru_without_conflict_changes_no_bit(seed, cos):
    f, r = conflicting(seed, cos)
    if dot(f, r * 0.8) >= 0:
        assert equal(apply("gru", {"forget": f, "retain": r}), f)


@given(seeds, st.floats(-0.999, -0.01), scales)
@some
def test_gru_with_conflict(seed, cos, scale):
    f, r = conflicting(seed, cos)
    f = f * 3.0
    d = apply("gru", {"forget": f, "retain": r * scale})
    assert abs(dot(d, r)) <= 1e-5 * max(norm(d), 1e-2 * norm(f)) and norm(d) <= norm(f) * (1 + 1e-6)  # T2
    assert dot(d, f) >= 0  # still a descent direction of the forget loss
    assert near(apply("gru", {"forget": d, "retain": r * scale}), d, scale=norm(f) * 1e-1)  # T3
    assert near(apply("gru", {"forget": f, "retain": r}), d, 1e-5, norm(f))  # T4: the constraint's length is irrelevant
    assert norm(d) == pytest.approx(3 * math.sqrt(1 - cos * cos), rel=1e-4)


@given(seeds, scales)
@some
def test_gru_of_opposite_gradients_is_nothing(seed, k):
    r = draw(seed)
    assert norm(apply("gru", {"forget": r * -k, "retain": r}, gamma=1.0)) <= 1e-6 * k * norm(r)


@given(seeds, st.sampled_from([0.1, 0.8, 1.0]))
@some
def test_gru_average(seed, gamma):
    """m <- gamma r + (1 - gamma) m from zero, over five steps, against float64."""
    state: dict[str, Any] = {}
    m = torch.zeros(sum(t.numel() for t in SPACE.params), dtype=torch.float64)

    def flat(v: Vec) -> torch.Tensor:
        return torch.cat([t.flatten() for t in v.tensors]).double()

    for i in range(5):
        f, r = draw(seed + 2 * i), draw(seed + 2 * i + 1)
        m = gamma * flat(r) + (1 - gamma) * m
        u = flat(f)
        want = u if u @ m >= 0 else u - (u @ m) / (m @ m) * m
        got = flat(apply("gru", {"forget": f, "retain": r}, state, gamma=gamma))
        assert float((got - want).norm()) <= 1e-5 * float(u.norm())
    if gamma == 1.0:  # T7
        assert near(
            apply("gru", {"forget": f, "retain": r}, gamma=1.0),
            apply("gru", {"forget": f, "retain": r}, state, gamma=1.0),
        )


@given(seeds, st.floats(1e-3, 10), st.floats(-1, 1))
@some
def test_gru_tau(seed, tau, cos):
    f, r = conflicting(seed, cos)
    free, d = apply("gru", {"forget": f, "retain": r}), apply("gru", {"forget": f, "retain": r}, tau=tau)
    assert norm(d) <= tau * (1 + 1e-5)
    assert equal(d, free) if norm(free) <= tau else near(d, free * (tau / norm(free)), 1e-5)


@given(seeds, st.floats(-1, -0.6))
@some
def test_gru_cosine_floor(seed, cos):
    f, r = conflicting(seed, cos)
    d = apply("gru", {"forget": f, "retain": r}, cos_floor=-0.5)
    assert near(d, f + r * 0.5, 1e-5, 1.0)  # f - |f| cos_floor / |m| m
    assert dot(d, r) == pytest.approx(cos + 0.5, abs=1e-5)  # part of a strong conflict stays
    assert equal(apply("gru", {"forget": f, "retain": r}, cos_floor=0.0), f)
    mild = conflicting(seed, -0.3)
    free = apply("gru", {"forget": mild[0], "retain": mild[1]})
    assert near(apply("gru", {"forget": mild[0], "retain": mild[1]}, cos_floor=-0.5), free)


@given(seeds)
@some
def test_gru_names(seed):
    """With a constraint the retain gradient belongs to what is rectified; other names and `add` come afterwards."""
    f, r, c, k = (draw(seed + i) for i in range(4))
    want = apply("gru", {"forget": f + r, "retain": c})
    assert near(apply("gru", {"forget": f, "retain": r, "constraint": c}), want, 1e-6)
    assert near(apply("gru", {"forget": f, "retain": c, "more": k}), apply("gru", {"forget": f, "retain": c}) + k, 1e-6)
    state: dict[str, Any] = {}
    apply("gru", {"forget": f, "retain": k}, state)
    plain = apply("gru", {"forget": f, "retain": c}, {"m": [t.clone() for t in state["m"]]})
    # The addition is the current gradient, not its average.
    assert near(apply("gru", {"forget": f, "retain": c}, state, add=0.5), plain + c * 0.5, 1e-5)
    with pytest.raises(ValueError, match="constraint or retain"):
        apply("gru", {"forget": f})


# --- pcgrad, mgda -----------------------------------------------------------------------------------------------------


@given(seeds, st.floats(-0.99, 0.99), scales)
@some
def test_pcgrad_of_two(seed, cos, scale):
    a, b = conflicting(seed, cos)
    b = b * scale
    want = a + b
    if dot(a, b) < 0:
        want = (a - b * (dot(a, b) / dot(b, b))) + (b - a * (dot(a, b) / dot(a, a)))
    d = apply("pcgrad", {"forget": a, "retain": b})
    assert near(d, want, 1e-5, norm(a) + norm(b))
    assert dot(d, a) >= -1e-5 and dot(d, b) >= -1e-5 * scale
    assert near(apply("pcgrad", {"retain": b, "forget": a}), d, 1e-5, norm(a) + norm(b))


@given(seeds, st.floats(-1, 1), st.floats(0.01, 100))
@some
def test_mgda_of_two(seed, cos, scale):
    a, b = conflicting(seed, cos)
    b = b * scale
    d = apply("mgda", {"forget": a, "retain": b})
    top = max(1.0, scale)
    # |w a + (1 - w) b|^2 by the inner products, on a fine grid
    grid = min(w * w + (1 - w) ** 2 * scale**2 + 2 * w * (1 - w) * scale * cos for w in (i / 2000 for i in range(2001)))
    assert dot(d, d) <= max(grid, 0.0) + 1e-5 * top**2 and dot(d, d) >= grid - 1e-3 * top**2
    for v in (a, b):
        assert dot(d, v) >= dot(d, d) - 1e-5 * top**2


@given(seeds, st.integers(3, 5))
@some
def test_mgda_of_many(seed, k):
    """The minimum-norm point: <d, g_i> >= |d|^2 for every gradient, so no loss rises to first order; never beaten by sampling."""
    rng = torch.Generator().manual_seed(seed)
    g = {f"g{i}": draw(seed + i, 10 ** (2 * float(torch.rand((), generator=rng)) - 1)) for i in range(k)}
    if k == 5:
        g["g4"] = g["g0"] * 0.5 + g["g1"] * 0.5  # dependent
    d = apply("mgda", g)
    top = max(dot(v, v) for v in g.values())
    for v in g.values():
        assert dot(d, v) >= dot(d, d) - 1e-6 * top
    vs = list(g.values())
    gram = torch.tensor([[dot(a, b) for b in vs] for a in vs], dtype=torch.float64)
    w = torch.distributions.Dirichlet(torch.full((k,), 0.5, dtype=torch.float64)).sample((500,))
    assert dot(d, d) <= float((w @ gram * w).sum(1).min()) + 1e-6 * top


def test_min_norm_weights_by_brute_force():
    for seed in range(20):
        v = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gram = v @ v.T
        w = min_norm_weights(gram)
        assert float(w.sum()) == pytest.approx(1.0) and (w >= 0).all()
        a, b = torch.meshgrid(*[torch.linspace(0, 1, 101, dtype=torch.float64)] * 2, indexing="ij")
        grid = torch.stack([a, b, 1 - a - b], -1)[a + b <= 1 + 1e-12]
        best = float((grid @ gram * grid).sum(1).min())
        assert float(w @ gram @ w) <= best + 1e-9
    one = min_norm_weights(torch.ones(1, 1, dtype=torch.float64))
    assert one.tolist() == [1.0]
    assert float(min_norm_weights(torch.ones(3, 3, dtype=torch.float64)).sum()) == pytest.approx(1.0)  # all the same


# --- primal_dual ------------------------------------------------------------------------------------------------------


@given(seeds, st.lists(st.floats(0, 2), min_size=1, max_size=8), st.integers(0, 3))
@some
def test_primal_dual(seed, losses, warmup):
    """lambda rises above the bound, falls below it, never below zero, and rests during the warm-up."""
    f, r = draw(seed), draw(seed + 1)
    state: dict[str, Any] = {}
    lam = 2.0
    hyper = {"dual": 2.0, "step": 3.0, "bound": 1.0, "warmup": warmup}
    for i, loss in enumerate(losses):
        d = apply("primal_dual", {"forget": f, "retain": r}, state, {"forget": 0.0, "retain": loss}, **hyper)
        assert near(d, f + r * lam, 1e-5, norm(f) + lam * norm(r))  # the lambda from before this step
        if i >= warmup:
            lam = max(0.0, lam + 3.0 * (loss - 1.0))
        assert state["lambda"] == pytest.approx(lam) and state["lambda"] >= 0


def test_primal_dual_bound_from_the_first_step():
    state: dict[str, Any] = {}
    g = {"forget": draw(1), "retain": draw(2), "more": draw(3)}
    d = apply("primal_dual", g, state, {"forget": 0.0, "retain": 2.0, "more": 0.0}, dual=3.0, slack=1.25)
    assert state["bound"] == 2.5 and near(d, g["forget"] + g["more"] + g["retain"] * 3.0, 1e-6)
    for loss, falls in ((2.4, True), (2.6, False)):
        before = state["lambda"]
        apply("primal_dual", g, state, {"forget": 0.0, "retain": loss, "more": 0.0}, step=1.0)
        assert (state["lambda"] < before) == falls and state["bound"] == 2.5
