"""The G-effect: its identities, what it predicts about a small step, and that measuring leaves no trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch

from peft_unlearn import registry
from peft_unlearn.attribution.effect import Effects, measure, places
from peft_unlearn.attribution.instances import weights
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import Errors, UserError
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.gradients.parse import parse_terms
from peft_unlearn.gradients.terms import Term
from peft_unlearn.gradients.vector import Space, Vec
from peft_unlearn.gradients.window import Window
from peft_unlearn.reporting.effect_pictures import group_of


def batches(n: int, rows: int = 3) -> list[dict[str, Any]]:
    tok = tiny.tokenizer()
    sets = {}
    for name in ("forget", "retain"):
        sets[name] = [encode(*to_text(r), tok)[0] for r in tiny.rows(n * rows, name[0] * len(name), seed=len(name))]
    return [{k: pad(v[i * rows : (i + 1) * rows], 0) for k, v in sets.items()} for i in range(n)]


def terms(*specs: str, **hyper: dict[str, Any]) -> dict[str, list[Term]]:
    errors = Errors()
    out = {k: parse_terms({k: {k: {"batch": "forget", **hyper.get(k, {})}}}, errors) for k in (*specs, *hyper)}
    errors.raise_if_any("test")
    return out


@pytest.fixture
def model() -> Any:
    return tiny.lora(tiny.llama(num_hidden_layers=3))


def gradients(model: Any, batch: dict[str, Any], space: Space) -> tuple[Vec, Vec]:
    """Risk gradients of one batch, straight from Pass."""
    with space.differentiable():
        out = [Vec(torch.autograd.grad(-Pass(model, batch[k]).logp.mean(), space.params)) for k in ("forget", "retain")]
    return out[0], out[1]


@pytest.mark.parametrize("space", ["adapter", "base"])
def test_gradient_ascent_and_retain_nll(model, space):
    """T1, T2: GA's effect is -|grad R_f|^2, and that of the retain NLL is +|grad R_r|^2, batch by batch and pooled."""
    three = batches(3)
    found = measure(model, terms("ga", nll={"batch": "retain"}), three, space=space)
    over = Space.trainable(model) if space == "adapter" else Space.under_adapters(model)
    each = [gradients(model, b, over) for b in three]
    norms = [[float(over.dot(v, v)) for v in pair] for pair in each]
    pooled = [sum((pair[i] for pair in each[1:]), each[0][i]) / 3 for i in range(2)]
    ga, nll = found.effects["ga"], found.effects["nll"]
    assert ga.unlearning.batches == pytest.approx([-n[0] for n in norms], rel=1e-4)
    assert nll.retaining.batches == pytest.approx([n[1] for n in norms], rel=1e-4)
    assert ga.unlearning.pooled == pytest.approx(-float(over.dot(pooled[0], pooled[0])), rel=1e-4)
    assert ga.retaining.pooled == pytest.approx(-float(over.dot(pooled[0], pooled[1])), rel=1e-4, abs=1e-9)
    for e in (ga.unlearning, nll.retaining, nll.unlearning):
        x = torch.tensor(e.batches, dtype=torch.float64)
        assert e.value == pytest.approx(float(x.mean())) and e.se == pytest.approx(float(x.std()) / 3**0.5)
    assert found.risk["forget"] == pytest.approx(-ga.loss)


@pytest.mark.parametrize("space", ["adapter", "base"])
def test_groups_and_layers_sum_to_the_total(model, space):
    """T3; a head with an adapter of its own makes its own group."""
    model = tiny.lora(
        tiny.llama(num_hidden_layers=3), target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"]
    )
    found = measure(model, terms("npo", "wga"), batches(2), reference=Reference(), space=space)
    for effect in found.effects.values():
        for parts in (effect.groups, effect.layers):
            assert sum(p.unlearning for p in parts.values()) == pytest.approx(effect.unlearning.value, rel=1e-9)
            assert sum(p.retaining for p in parts.values()) == pytest.approx(
                effect.retaining.value, rel=1e-9, abs=1e-12
            )
    groups = found.effects["npo"].groups
    middle = ["shallow", "middle", "deep"]
    if space == "adapter":
        assert list(groups) == ["input_embedding", *middle, "head"]
        assert list(found.effects["npo"].layers) == ["input_embedding", "0", "1", "2", "head"]
    else:
        assert set(middle) <= set(groups) and "head" not in groups


def test_thirds():
    assert [group_of(str(i), 33) for i in (0, 10, 11, 21, 22, 32)] == ["shallow"] * 2 + ["middle"] * 2 + ["deep"] * 2
    model = tiny.lora(tiny.llama(num_hidden_layers=2))
    assert set(places(model, Space.trainable(model))) == {"0", "1"}


@pytest.mark.parametrize("space", ["adapter", "base"])
@pytest.mark.parametrize("name", ["ga", "npo", "tnpo", "simnpo"])
def test_a_small_step_moves_the_risks_as_predicted(model, space, name):
    """T7: R(theta - eta grad L) - R(theta) = -eta e + O(eta^2), in float64, as the issue asks."""
    model = model.double()
    (batch,) = batches(1, rows=5)
    spec = terms(name)
    found = measure(model, spec, [batch], reference=Reference(), space=space).effects[name]
    over = Space.trainable(model) if space == "adapter" else Space.under_adapters(model)
    window = Window(model, [Term("u", "forget", spec[name][0].objective, 1.0, spec[name][0].hyper)],
                    (registry.get("rule", "sum"), {}), reference=Reference())  # fmt: skip
    u, _ = window.sweep("u", [batch], window.counts([batch]), over)

    @torch.no_grad()
    def risks(eta: float) -> list[float]:
        with over.shifted(u * -eta):
            return [float(-Pass(model, batch[k]).logp.double().mean()) for k in ("forget", "retain")]

    eta = 1e-3 / float(over.norm(u))  # logits are float32 whatever the model: much smaller steps drown
    up, here, down = risks(eta), risks(0.0), risks(-eta)
    for e, a, b, c in zip((found.unlearning, found.retaining), up, here, down, strict=True):
        assert a - b == pytest.approx(-eta * e.value, rel=5e-2)
        assert (a - c) / 2 == pytest.approx(-eta * e.value, rel=2e-3)  # the second order cancels
    assert found.unlearning.value < 0 and up[0] > down[0]  # forgetting raises the forget risk


def test_the_update_of_a_rule(model):
    """GRU's update, taken with no memory, never raises the retain risk; its state is left alone."""
    errors = Errors()
    spec = parse_terms({"forget": {"ga": {}}, "constraint": {"nll": {}}}, errors)
    gru = registry.get("rule", "gru")
    window = Window(model, spec, (gru, gru.resolve({"gamma": 0.8})))
    three = batches(3)
    window.step(three[:1])
    state = {k: dict(v) for k, v in window.rule_state.items()}
    fresh = Window(model, spec, (gru, gru.resolve({"gamma": 0.8})))
    found = measure(model, terms("ga"), three, update=fresh)
    assert fresh.rule_state == {}
    assert min(found.effects["update"].retaining.batches) >= -1e-6 * found.effects["update"].norm
    measure(model, terms("ga"), three, update=window)
    assert {k: dict(v) for k, v in window.rule_state.items()} == state
    with pytest.raises(UserError, match="space adapter"):
        measure(model, terms("ga"), three, update=fresh, space="base")


@pytest.mark.parametrize("space", ["adapter", "base"])
@pytest.mark.parametrize("trainable", [True, False])
def test_no_side_effects(model, space, trainable):
    """P3: weights, buffers, gradients, flags, modes and random states."""
    model = tiny.lora(tiny.llama(attention_dropout=0.1), lora_dropout=0.2)
    model.train()
    model.base_model.model.model.layers[1].eval()  # a mixed state comes back mixed
    if not trainable:
        for p in model.parameters():
            p.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rng = torch.get_rng_state()
    a = measure(
        model, terms("npo", "rmu", rmu={"layer": 1}), batches(2), reference=Reference(), space=space, instances=2
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    again = measure(
        model, terms("npo", "rmu", rmu={"layer": 1}), batches(2), reference=Reference(), space=space, instances=2
    )
    assert again.to_dict() == a.to_dict()  # nothing was dropped at random


def test_moving_average_depends_on_order_and_the_mean_does_not(model):
    seven = batches(7, rows=2)
    plain, ema = (measure(model, terms("ga"), seven, repro=r).effects["ga"] for r in (False, True))
    over = Space.trainable(model)
    smooth = None
    seen = []
    for i, b in enumerate(seven):
        f, r = gradients(model, b, over)
        smooth = (
            (f, r) if smooth is None else tuple(old * 0.6 + new * 0.4 for old, new in zip(smooth, (f, r), strict=True))
        )
        seen += [-float(over.dot(smooth[0], smooth[1]))] * ((i + 1) % 4 == 3)
    assert ema.retaining.batches == pytest.approx(seen, rel=1e-3, abs=1e-7) and len(seen) == 2
    assert ema.retaining.value == pytest.approx(seen[-1], rel=1e-3, abs=1e-7)
    assert ema.unlearning.se is None and ema.unlearning.pooled is None
    back = [measure(model, terms("ga"), seven[::-1], repro=r).effects["ga"].unlearning.value for r in (False, True)]
    assert back[0] == pytest.approx(plain.unlearning.value, rel=1e-9)
    assert back[1] != pytest.approx(ema.unlearning.value, rel=1e-3)


@pytest.mark.parametrize("name", ["ga", "wga", "tnpo", "npo", "simnpo", "satimp"])
def test_instances_sum_to_the_objective(model, name):
    """sum_i w_i grad log p_i / N is the objective's gradient: as vectors, and in both inner products."""
    (batch,) = batches(1, rows=4)
    spec = terms(**{name: {"weight": 0.7}})
    (term,) = spec[name]
    p = Pass(model, batch["forget"], reference=Reference())
    assert len(p.logp)
    w = weights(p, term)
    assert w is not None and bool((w > 0).all())
    params = [x for x in model.parameters() if x.requires_grad]
    got = torch.autograd.grad((w * p.logp).sum(), params, retain_graph=True)
    want = torch.autograd.grad(0.7 * term.objective.fn(p, **term.hyper).sum(), params)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)

    effect = measure(model, spec, [batch], reference=Reference(), instances=4).effects[name]
    whole = term.objective.unit == "sequence"
    assert len(effect.instances) == (4 if whole else len(w))  # all of them
    n = len(effect.instances)
    for side, total in (("forget", effect.unlearning), ("retain", effect.retaining)):
        summed = sum(i.weight * getattr(i, side) for i in effect.instances) / n
        assert summed == pytest.approx(total.value, rel=1e-3, abs=1e-6)
    assert all((i.token is None) == whole and 0 < i.p < 1 for i in effect.instances)


def test_objectives_without_instances_say_why(model):
    found = measure(
        model,
        terms("kl", ga={"temperature": 2.0}, nll={"batch": "retain"}),
        batches(1),
        reference=Reference(),
        instances=2,
    )
    assert "no re-weighted likelihood" in found.effects["kl"].note and "no re-weighted" in found.effects["ga"].note
    assert "on the forget set" in found.effects["nll"].note
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["effects"]["kl"]["instances"] == []


def test_not_finite_is_null_with_a_note(model):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1.mlp.down_proj.lora_B" in n).fill_(float("nan"))
    found = measure(model, terms("ga"), batches(2))
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))["effects"]["ga"]
    assert said["unlearning"]["value"] is None and "not finite" in said["note"]
    assert isinstance(found, Effects)


def test_refusals(model):
    with pytest.raises(UserError, match="at least one batch"):
        measure(model, terms("ga"), [])
    with pytest.raises(UserError, match="cannot be labelled update"):
        measure(model, {"update": terms("ga")["ga"]}, batches(1))
    with pytest.raises(UserError, match="adapter, base"):
        measure(model, terms("ga"), batches(1), space="weights")
