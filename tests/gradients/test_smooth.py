"""Smoothing on losses whose derivatives are known, and what it leaves untouched on a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from peft_unlearn import registry
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import Errors, UserError
from peft_unlearn.forward import Reference
from peft_unlearn.gradients.parse import parse_method, parse_terms
from peft_unlearn.gradients.vector import Space, Vec
from peft_unlearn.gradients.window import Window

SMOOTHINGS = [m.name for m in registry.methods("smoothing")]
SIZES = (3, 4)


class Toy:
    """A loss of one flat vector, its parameters split in two tensors; counts sweeps and remembers the points."""

    def __init__(self, loss: Callable[[Tensor], Tensor], theta: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.loss, self.theta, self.dtype = loss, theta, dtype
        parts = theta.to(torch.float32).split(SIZES)
        self.space = Space([(f"p{i}", nn.Parameter(t.clone())) for i, t in enumerate(parts)])
        self.seen: list[Tensor] = []

    def grad(self, at: Vec | None = None, wrt: Any = None) -> Vec:
        shift = torch.zeros_like(self.theta) if at is None else flat(at)
        self.seen.append(shift)
        x = (self.theta + shift).requires_grad_()
        (g,) = torch.autograd.grad(self.loss(x), x)
        return Vec(list(g.to(self.dtype).split(SIZES)))

    def smoothed(self, name: str, seed: int = 0, **hyper: Any) -> Tensor:
        method = registry.get("smoothing", name)
        assert not method.check(hyper)
        return flat(method.fn(self.grad, self.space, torch.Generator().manual_seed(seed), **method.resolve(hyper)))


def flat(v: Vec) -> Tensor:
    return torch.cat([t.flatten() for t in v.tensors]).double()


def hessian(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(7, 7, generator=g, dtype=torch.float64))
    return q @ torch.diag(torch.linspace(0.2, 3.0, 7, dtype=torch.float64)) @ q.T


def quadratic(h: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 0.5 * x @ h @ x


def start(seed: int = 1) -> Tensor:
    return torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).double()


# Finite differences of float32 gradients: rounding 1e-7 |g| is divided by h = 1e-3 and multiplied by lam.
PRECISION = [(torch.float64, 1e-9), (torch.float32, 2e-3)]


@pytest.mark.parametrize(
    ("name", "off"), [("sam", {"rho": 0.0}), ("rs", {"sigma": 0.0}), ("gp", {"lam": 0.0}), ("cr", {"lam": 0.0})]
)
def test_switched_off_it_is_the_base_bit_for_bit(name, off):
    toy = Toy(quadratic(hessian()), start())
    assert torch.equal(toy.smoothed(name, **off), flat(toy.grad()))


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_sam(dtype, tol, rho):
    h, x = hessian(), start()
    toy = Toy(quadratic(h), x, dtype)
    got, g = toy.smoothed("sam", rho=rho), h @ x
    torch.testing.assert_close(got, h @ (x + rho * g / g.norm()), rtol=tol / 100, atol=tol / 100)
    assert [float(s.norm()) for s in toy.seen] == pytest.approx([0.0, rho], rel=1e-5)  # two sweeps, |eps| = rho
    torch.testing.assert_close(
        toy.seen[1] / rho, g / g.norm(), rtol=1e-5, atol=1e-6
    )  # towards remembering: up the loss


def test_rs():
    h, x = hessian(), start()
    toy = Toy(quadratic(h), x)
    got = toy.smoothed("rs", sigma=0.3, n=5)
    assert len(toy.seen) == 5
    torch.testing.assert_close(got, h @ (x + torch.stack(toy.seen).mean(0)), rtol=1e-6, atol=1e-7)
    z = torch.cat([s / 0.3 for s in toy.seen])
    assert abs(float(z.mean())) < 0.6 and 0.6 < float(z.std()) < 1.4
    again = Toy(quadratic(h), x)
    assert torch.equal(again.smoothed("rs", sigma=0.3, n=5), got)  # the generator alone decides
    assert not torch.equal(again.smoothed("rs", seed=1, sigma=0.3, n=5), got)


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
def test_gp_on_a_quadratic(dtype, tol):
    h, x = hessian(), start()
    g = h @ x
    toy = Toy(quadratic(h), x, dtype)
    want = g + 2.5 * h @ g / g.norm()
    got = toy.smoothed("gp", lam=2.5)
    assert float((got - want).norm() / want.norm()) <= tol and len(toy.seen) == 3


@pytest.mark.parametrize(("dtype", "tol"), PRECISION)
def test_cr_on_a_quadratic(dtype, tol):
    """lam times the gradient of mu |H v|, v = g/|g|."""
    h, x = hessian(), start().requires_grad_()
    g = h @ x
    (penalty,) = torch.autograd.grad(0.3 * (h @ g / g.norm()).norm(), x)
    want = (g + 4.0 * penalty).detach()
    toy = Toy(quadratic(h), x.detach(), dtype)
    got = toy.smoothed("cr", lam=4.0, mu=0.3)
    assert float(penalty.norm()) * 4 > 0.05 * float(g.detach().norm())  # or the test would say nothing
    assert float((got - want).norm() / want.norm()) <= tol and len(toy.seen) == 6


def bowl(x: Tensor) -> Tensor:
    """Not quadratic: the Hessian moves along v."""
    a = hessian(3)
    return torch.logsumexp(a @ x, 0) + 0.1 * (x**4).sum()


@pytest.mark.parametrize("name", ["gp", "cr"])
def test_penalties_on_a_curved_loss_against_double_backward(name):
    x = start().requires_grad_()
    (g,) = torch.autograd.grad(bowl(x), x, create_graph=True)
    penalty = g.norm()
    if name == "cr":
        shifted = x + 0.2 * g / g.norm()
        (there,) = torch.autograd.grad(bowl(shifted), shifted, create_graph=True)
        penalty = (there - g).norm()
    (want,) = torch.autograd.grad(bowl(x) + 3.0 * penalty, x)
    hyper = {"lam": 3.0, "h": 1e-4, **({"mu": 0.2} if name == "cr" else {})}
    got = Toy(bowl, x.detach()).smoothed(name, **hyper)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_nothing_to_curve():
    """On a linear loss cr is 0; at a stationary point every smoothing is silent, without dividing by a zero norm."""
    slope = start(5)
    linear = Toy(lambda x: slope @ x, start())
    torch.testing.assert_close(linear.smoothed("cr"), slope, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(linear.smoothed("gp"), slope, rtol=1e-6, atol=1e-7)
    for name in ("sam", "gp", "cr"):
        still = Toy(quadratic(hessian()), torch.zeros(7, dtype=torch.float64))
        assert float(still.smoothed(name).abs().max()) == 0.0


# --- on a model -------------------------------------------------------------------------------------------------------


def batch_of(tag: str) -> dict[str, Tensor]:
    tok = tiny.tokenizer()
    return pad([encode(*to_text(r), tok)[0] for r in tiny.rows(4, tag, seed=len(tag))], 0)


def open_window(model: Any, smoothing: Any, spy: Callable[[Any], None] | None = None, terms: Any = None) -> Window:
    errors = Errors()
    parsed = parse_terms(terms or {"forget": {"npo": {}}, "retain": {"nll": {}}}, errors)
    rule, _ = parse_method("rule", "sum", errors)
    method, options = parse_method("smoothing", smoothing, errors, space=("adapter", "base"))
    errors.raise_if_any("test")
    if spy is not None:
        inner = parsed[0].objective

        def watched(p: Any, **hyper: Any) -> Tensor:
            out = inner.fn(p, **hyper)
            spy(p)
            return out

        parsed[0] = dataclasses.replace(parsed[0], objective=dataclasses.replace(inner, fn=watched))
    return Window(model, parsed, rule, smoothing=method, space=options.get("space", "adapter"), reference=Reference())


def state_of(model: nn.Module) -> dict[str, Any]:
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[n][0], b[n][0]) and a[n][1] == b[n][1] for n in a)


STRONG = {"sam": {"rho": 0.5}, "rs": {"sigma": 0.05, "n": 2}, "gp": {"h": 0.3}, "cr": {"mu": 0.3}}
CASES = [(n, s) for n in SMOOTHINGS for s in registry.get("smoothing", n).extra["spaces"]]


@pytest.mark.parametrize(("name", "space"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_come_back_bit_for_bit(name, space, dtype):
    model = tiny.lora(tiny.llama().to(dtype))
    before = state_of(model)
    points: list[Tensor] = []
    probe = Space.trainable(model) if space == "adapter" else Space.under_adapters(model)
    window = open_window(
        model, {name: {**STRONG[name], "space": space}}, lambda p: points.append(probe.params[3].detach().clone())
    )
    step = window.step([{"forget": batch_of("f"), "retain": batch_of("rr")}])
    assert any(not torch.equal(points[0], x) for x in points[1:])  # they did move
    assert same(before, state_of(model))
    assert all(torch.isfinite(t).all() for t in step.update.tensors)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("name", "space"), CASES)
def test_also_after_an_exception(name, space):
    model = tiny.lora(tiny.llama())
    before, calls = state_of(model), []

    def interrupt(p: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    window = open_window(model, {name: {**STRONG[name], "space": space}}, interrupt)
    with pytest.raises(KeyboardInterrupt):
        window.step([{"forget": batch_of("f"), "retain": batch_of("rr")}])
    assert same(before, state_of(model))


@pytest.mark.parametrize(
    ("name", "space", "objective", "mode"),
    [(n, s, "npo", "before") for n, s in CASES]
    + [("sam", "base", o, m) for o in ("npo", "undial", "representation_retention", "dpo") for m in ("before", "base")],
)
def test_reference_values_are_those_of_the_unshifted_point(name, space, objective, mode):
    """In space base the reference shares the weights that move."""
    model = tiny.lora(tiny.llama())
    seen: list[Tensor] = []

    def look(p: Any) -> None:
        if objective == "npo":
            seen.append(p.ref_logp.clone())
        elif objective == "dpo":
            seen.append(torch.cat([p.ref_logp, p.alternate.ref_logp]))
        elif objective == "undial":
            seen.append(
                p.map_logits(lambda z, z_ref, y: z_ref.gather(1, y[:, None]).squeeze(1), reference=True).detach()
            )
        else:
            seen.append(p.hidden(1, reference=True).clone())

    hyper = {"layer": 1} if objective == "representation_retention" else {}
    window = open_window(
        model, {name: {**STRONG[name], "space": space}}, look, {"forget": {objective: hyper}, "retain": {"nll": {}}}
    )
    window.reference = Reference(mode)
    batch = {**batch_of("f"), "alternate": batch_of("fff")}
    window.step([{"forget": batch, "retain": batch_of("rr")}])
    shifted = len(seen)
    window.smoothing = None
    window.step([{"forget": batch, "retain": batch_of("rr")}])
    assert shifted > 1 and all(torch.equal(x, seen[-1]) for x in seen[:shifted])


@pytest.mark.parametrize(("name", "space"), CASES)
def test_retain_gradient_and_values(name, space):
    """The retain gradient and its loss do not know about smoothing; the forget loss is that of the unshifted point."""
    model = tiny.lora(tiny.llama())
    window = [{"forget": batch_of("f"), "retain": batch_of("rr")}]
    plain, smooth = open_window(model, None), open_window(model, {name: {**STRONG[name], "space": space}})
    kept: dict[str, dict[str, Vec]] = {}
    for key, w in (("plain", plain), ("smooth", smooth)):
        method, hyper = w.rule

        def spy(g: Any, *a: Any, inner: Any = method.fn, key: str = key, **h: Any) -> Vec:
            kept[key] = g
            return inner(g, *a, **h)

        w.rule = (dataclasses.replace(method, fn=spy), hyper)
    a, b = plain.step(window), smooth.step(window)
    assert all(
        torch.equal(x, y)
        for x, y in zip(kept["plain"]["retain"].tensors, kept["smooth"]["retain"].tensors, strict=True)
    )
    assert not torch.equal(flat(kept["plain"]["forget"]), flat(kept["smooth"]["forget"]))
    assert b.values["retain"] == a.values["retain"]
    if name == "rs":  # never at the unshifted point: the mean over its sweeps
        assert b.values["forget"] == pytest.approx(a.values["forget"], rel=0.2)
    else:
        assert b.values["forget"] == a.values["forget"]


@pytest.mark.parametrize("space", ["adapter", "base"])
def test_sam_ball_on_a_model(space):
    """|eps| = rho over all parameters of the space together, along the gradient by them."""
    model = tiny.lora(tiny.llama())
    moved = Space.trainable(model) if space == "adapter" else Space.under_adapters(model)
    assert len(moved) == (28 if space == "adapter" else 14)
    points: list[Vec] = []
    window = open_window(model, {"sam": {"rho": 0.3, "space": space}}, lambda p: points.append(moved.read()))
    batch = [{"forget": batch_of("f"), "retain": batch_of("rr")}]
    window.step(batch)
    theta = moved.read()
    assert float(moved.norm(points[0] - theta)) == 0.0
    eps = points[1] - theta
    assert float(moved.norm(eps)) == pytest.approx(0.3, rel=1e-4)
    g, _ = open_window(model, None).sweep("forget", batch, window.counts(batch), moved)
    cos = float(moved.dot(eps, g)) / 0.3 / float(moved.norm(g))
    assert cos == pytest.approx(1.0, abs=1e-4)


def test_base_space_wants_float_weights_under_adapters():
    model = tiny.llama()
    for n, p in model.named_parameters():
        p.requires_grad_("q_proj" in n)
    model.get_base_model = lambda: model
    with pytest.raises(UserError, match="there are none"):
        open_window(model, {"sam": {"space": "base"}})


@pytest.mark.parametrize("name", ["gp", "cr"])
def test_the_default_step_against_double_backward_on_a_model(name):
    """The penalty's own gradient, in float64, at every default: within a thousandth of double backward."""
    model = tiny.lora(tiny.llama(attn_implementation="eager").double())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    ids = batch_of("f")["input_ids"]

    def gradient(create: bool = False) -> list[Tensor]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return list(torch.autograd.grad(loss, params, create_graph=create))

    def at(point: Vec | None = None, wrt: Any = None) -> Vec:
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, t in zip(params, [] if point is None else point.tensors, strict=point is not None):
                p.add_(t)
        out = Vec(gradient())
        with torch.no_grad():
            for p, t in zip(params, kept, strict=True):
                p.copy_(t)
        return out

    method = registry.get("smoothing", name)
    hyper = method.resolve({})
    got = flat(method.fn(at, Space(named), torch.Generator(), **hyper)) - flat(at())
    g = gradient(create=True)
    norm = torch.cat([t.flatten() for t in g]).norm()
    if name == "gp":
        penalty = norm
    else:
        moved = {n: p + hyper["mu"] * t / norm for (n, p), t in zip(named, g, strict=True)}
        out = torch.func.functional_call(model, moved, kwargs={"input_ids": ids, "labels": ids, "use_cache": False})
        there = torch.autograd.grad(out.loss, list(moved.values()), create_graph=True)
        penalty = torch.cat([(a - b).flatten() for a, b in zip(there, g, strict=True)]).norm()
    want = hyper["lam"] * flat(Vec(list(torch.autograd.grad(penalty, params))))
    assert float((got - want).norm() / want.norm()) <= 1e-3
