"""The routers' terms: anchors of the formula, where the logits come from, and that they go with everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families as f
import pytest
import tiny
import torch
from fakepass import values

from peft_unlearn.errors import UserError
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.gradients.terms import with_experts
from peft_unlearn.gradients.window import Window
from peft_unlearn.objectives.routing import gates
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer
from peft_unlearn.tuners.expert_lora import export_stock
from peft_unlearn.tuners.peft_type import PREFIX


class RouterPass:
    """What the routers' terms read of a pass: logits by block, and which positions are no padding."""

    def __init__(self, logits: dict[int, torch.Tensor], mask: torch.Tensor | None = None, top_k: int = 2) -> None:
        self.logits, self.before = logits, {k: v.clone() for k, v in logits.items()}
        rows = next(iter(logits.values())).shape[0]
        self.attention_mask = torch.ones(1, rows, dtype=torch.long) if mask is None else mask
        text = type("Config", (), {"num_experts_per_tok": top_k})()
        self.model = type("Model", (), {"config": type("Config", (), {"get_text_config": lambda self: text})()})()

    def router(self, layer: int, reference: bool = False) -> torch.Tensor:
        return (self.before if reference else self.logits)[layer]


def anchor(p: Any, **hyper: Any) -> torch.Tensor:
    return values("router_anchor", p, **hyper)


# --- T2: what the formula gives at hand-picked points --------------------------------------------------------------------


@pytest.mark.parametrize("e", [8, 64])
def test_uniform_softmax_is_one_minus_one_over_e(e):
    got = anchor(RouterPass({3: torch.zeros(5, e)}), experts={"3": [1]})
    assert got.tolist() == pytest.approx([1 - 1 / e] * 5)
    if e == 64:
        assert float(got[0]) == pytest.approx(0.984375, abs=1e-7)


@pytest.mark.parametrize("on", ["full_softmax", "topk_gates"])
def test_zero_exactly_at_the_one_hot(on):
    sure = torch.full((2, 8), -200.0)
    sure[:, 5] = 200.0
    assert anchor(RouterPass({0: sure}), experts={0: [5]}, on=on).tolist() == [0.0, 0.0]
    assert anchor(RouterPass({0: sure}), experts={0: [4]}, on=on).tolist() == pytest.approx([2.0, 2.0])
    near = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert float(anchor(RouterPass({0: near}), experts={0: [5]}, on=on).min()) > 0.05


def test_truncated_gates_inside_and_outside_the_top_k():
    e, k = 8, 2
    z = torch.zeros(1, e)
    z[0, [2, 6]] = 1e-4  # the top two; otherwise uniform
    inside = float(anchor(RouterPass({0: z}), experts={0: [2]}, on="topk_gates"))
    outside = float(anchor(RouterPass({0: z}), experts={0: [4]}, on="topk_gates"))
    assert inside == pytest.approx((1 - 1 / e) ** 2 + (k - 1) / e**2, abs=1e-4)
    assert outside == pytest.approx(1 + k / e**2, abs=1e-4)
    # Outside, the gate is a constant 0: nothing tells the chosen expert from others that were not selected either.
    z = torch.zeros(1, e).index_fill(1, torch.tensor([2, 6]), 1e-4).requires_grad_()
    (literal,) = torch.autograd.grad(anchor(RouterPass({0: z}), experts={0: [4]}, on="topk_gates").sum(), z)
    assert float(literal[0, 4]) == float(literal[0, 0]) and gates(z, 2)[0, 4] == 0
    (full,) = torch.autograd.grad(anchor(RouterPass({0: z}), experts={0: [4]}).sum(), z)
    assert float(full[0, 4]) < 0 < float(full[0, 0])  # the whole softmax pulls it in and pushes the others out


def test_several_experts_share_the_target_and_layers_are_averaged():
    z = torch.full((3, 4), -200.0)
    z[:, :2] = 0.0  # half and half
    assert anchor(RouterPass({1: z}), experts={1: [0, 1]}).tolist() == pytest.approx([0.0] * 3, abs=1e-12)
    one, two = (
        anchor(RouterPass({1: z}), experts={1: [0]}),
        anchor(RouterPass({2: torch.zeros(3, 4)}), experts={2: [3]}),
    )
    both = anchor(RouterPass({1: z, 2: torch.zeros(3, 4)}), experts={1: [0], 2: [3]})
    assert torch.allclose(both, (one + two) / 2)


def test_padding_is_left_out():
    z = torch.randn(6, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    got = anchor(RouterPass({0: z}, mask), experts={0: [1]})
    assert torch.equal(got, anchor(RouterPass({0: z[[0, 1, 2, 3]]}), experts={0: [1]})) and got.shape == (4,)


def test_keep_is_zero_at_the_reference_and_nowhere_else():
    p = RouterPass({0: torch.randn(5, 4).requires_grad_(), 2: torch.randn(5, 4).requires_grad_()})
    at = values("router_keep", p, layers=[0, 2])
    assert at.tolist() == [0.0] * 5
    assert not any(g.any() for g in torch.autograd.grad(at.sum(), list(p.logits.values())))
    p.logits[0] = p.before[0] + torch.eye(5, 4)
    moved = (p.logits[0].softmax(-1) - p.before[0].softmax(-1)).square().sum(-1) / 2
    assert torch.allclose(values("router_keep", p, layers=[0, 2]), moved.detach())


# --- on a model ----------------------------------------------------------------------------------------------------------


def batch(seed: int = 5) -> dict[str, torch.Tensor]:
    ids = f.batch(3, 9, seed)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 6:] = mask[2, 4:] = 0
    ids = ids * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def model(router: str = "full", experts: Any = None) -> Any:
    return f.adapted(f.base("olmoe"), experts=experts or {1: [2, 5]}, train_router=router)


UOE = {"forget": {"npo": {"beta": 0.1}, "router_anchor": {"weight": 1.0}}, "retain": {"nll": {}}}


def terms(spec: dict[str, Any] | None = None, experts: Any = None, **config: Any) -> tuple[Any, list[Any]]:
    c = UnlearnConfig(output_dir="unused", terms=spec or UOE, use_cpu=True, **config)
    return c, with_experts(c.term_list, experts if experts is not None else {"1": [2, 5]})


def window(m: Any, spec: dict[str, Any] | None = None, experts: Any = None, **config: Any) -> Window:
    c, found = terms(spec, experts, **config)
    assert c.rule_method is not None
    return Window(
        m, found, c.rule_method, smoothing=c.smoothing_method, space=c.smoothing_space, reference=Reference("before")
    )


def two() -> list[dict[str, Any]]:
    return [{"forget": batch(1), "retain": batch(2)}]


def test_logits_are_those_of_the_one_training_forward():
    m, b = model(), batch()
    calls = []
    m.get_base_model().model.layers[1].mlp.gate.register_forward_hook(lambda _, x, y: calls.append(len(x[0])))
    p = Pass(m, b, routers=[1])
    got = anchor(p, experts={1: [2]})
    assert p.logp.requires_grad and got.requires_grad
    assert [n for n in calls if n > 2] == [b["input_ids"].numel()]  # beside it the head is tried on two tokens
    with torch.no_grad():
        theirs = m(**{k: b[k] for k in ("input_ids", "attention_mask")}, output_router_logits=True).router_logits[1]
    q = theirs[b["attention_mask"].flatten().bool()].softmax(-1)
    want = (q - torch.eye(8)[2]).square().sum(-1)
    assert got.shape == (int(b["attention_mask"].sum()),) and f.error(got, want) <= 2e-6


def test_experts_and_layers_default_to_the_adapters_own():
    spec = {**UOE, "retain": {"nll": {}, "router_keep": {}}}
    found = {t.objective.name: t for t in terms(spec)[1]}
    assert found["router_anchor"].hyper["experts"] == {"1": [2, 5]} and found["router_anchor"].routers == (1,)
    assert found["router_keep"].hyper["layers"] == [1] and found["router_keep"].routers == (1,)
    named = terms({"forget": {"npo": {}, "router_anchor": {"experts": {2: [7]}}}, "retain": {"nll": {}}})[1]
    assert named[1].hyper["experts"] == {2: [7]} and named[1].routers == (2,)
    keep = {"forget": {"npo": {}}, "retain": {"router_keep": {}}}
    for spec, word in ((UOE, "router_anchor needs experts"), (keep, "router_keep needs layers")):
        with pytest.raises(UserError, match=word):
            with_experts(UnlearnConfig(output_dir="x", terms=spec, use_cpu=True).term_list, None)


RULES = ["sum", "ngdiff", {"gru": {"gamma": 0.8}}, "pcgrad", "mgda", {"primal_dual": {"bound": 1.0}}]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r if isinstance(r, str) else next(iter(r)))
def test_the_anchor_goes_with_every_rule(rule):
    m = model()
    step = window(m, rule=rule).step(two())
    names = [n for n, p in m.named_parameters() if p.requires_grad]
    moved = {n.rpartition(f".{PREFIX}")[2] for n, v in zip(names, step.moved, strict=True) if v > 0}
    assert moved == {"router_delta.default", *(f"{p}_{x}.default" for p in ("gate_up", "down") for x in "AB")}
    assert all(torch.isfinite(t).all() for t in step.update.tensors)


@pytest.mark.parametrize("smoothing", ["sam", "rs", "gp", "cr"])
def test_the_anchor_goes_with_every_smoothing(smoothing):
    m = model()
    before = {n: p.clone() for n, p in m.named_parameters()}
    step = window(m, smoothing=smoothing).step(two())
    plain = window(m).step(two())
    assert all(torch.isfinite(t).all() for t in step.update.tensors)
    assert any(not torch.equal(a, b) for a, b in zip(step.update.tensors, plain.update.tensors, strict=True))
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())


def test_the_anchor_counts_towards_the_forget_loss_with_its_weight():
    m = model()
    one, more = ({**UOE, "forget": {"npo": {"beta": 0.1}, **a}} for a in ({}, {"router_anchor": {"weight": 100.0}}))
    values_of = [window(m, s).step(two()).values["forget"] for s in (one, UOE, more)]
    mean = float(anchor(Pass(m, batch(1), routers=[1]), experts={1: [2, 5]}).mean().detach())
    assert values_of[1] - values_of[0] == pytest.approx(mean, rel=1e-4)
    assert values_of[2] - values_of[0] == pytest.approx(100 * mean, rel=1e-4)


def test_the_balancing_loss_stays_out():
    m = model()
    want = window(m).step(two())
    m.config.output_router_logits = m.get_base_model().config.output_router_logits = True
    got = window(m).step(two())
    assert got.values == want.values
    assert all(torch.equal(a, b) for a, b in zip(got.update.tensors, want.update.tensors, strict=True))


def test_no_anchor_and_all_experts_is_the_plain_method(tmp_path):
    """T4: alpha 0 and every expert chosen gives the gradients of stock PEFT on the fused experts."""
    everything = {k: list(range(8)) for k in range(3)}
    m = model("none", everything)
    off = {**UOE, "forget": {"npo": {"beta": 0.1}, "router_anchor": {"weight": 0.0}}}
    plain = {**UOE, "forget": {"npo": {"beta": 0.1}}}
    ours, bare = (window(m, s, {str(k): v for k, v in everything.items()}).step(two()) for s in (off, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours.update.tensors, bare.update.tensors, strict=True))
    export_stock(m, tmp_path / "stock")
    from peft import PeftModel

    stock = PeftModel.from_pretrained(f.base("olmoe"), str(tmp_path / "stock"), is_trainable=True)
    theirs = window(stock, plain).step(two())
    assert theirs.values["forget"] == pytest.approx(ours.values["forget"], rel=1e-5)
    assert theirs.norms["forget"] == pytest.approx(ours.norms["forget"], rel=1e-4)
    assert theirs.norms["retain"] == pytest.approx(ours.norms["retain"], rel=1e-4)


# --- in the trainer --------------------------------------------------------------------------------------------------------


def trainer(out: Path, router: str = "full", spec: Any = None, **over: Any) -> UnlearnTrainer:
    base = f.base("olmoe", vocab_size=320, max_position_embeddings=128)
    args = UnlearnConfig(
        output_dir=str(out), terms=spec or UOE, per_device_train_batch_size=4,
        **{"learning_rate": 1e-2, "max_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **over},
    )  # fmt: skip
    m = f.adapted(base, experts={1: [2]}, train_router=router)
    data = {"forget": tiny.rows(5, "f", seed=1), "retain": tiny.rows(5, "r", seed=2)}
    return UnlearnTrainer(m, args, data=data, processing_class=tiny.tokenizer())


def test_one_step_changes_the_chosen_expert_and_its_router_alone(tmp_path):
    """T3, on the merged weights."""
    t = trainer(tmp_path / "a")
    with torch.no_grad():  # from nothing: what differs from the base is the step's work
        for n, p in t.bare.named_parameters():
            if p.requires_grad and ("_B" in n or "delta" in n):
                p.zero_()
    t.train()
    plain = dict(f.base("olmoe", vocab_size=320, max_position_embeddings=128).named_parameters())
    changed = {}
    for n, p in t.bare.merge_and_unload().named_parameters():
        if not torch.equal(p, plain[n]):
            rows = (p != plain[n]).flatten(1).any(1).nonzero().flatten().tolist()
            changed[n.partition("layers.")[2]] = rows
    experts = {k: v for k, v in changed.items() if "experts" in k}
    assert experts == {"1.mlp.experts.gate_up_proj": [2], "1.mlp.experts.down_proj": [2]}
    assert set(changed) - set(experts) == {"1.mlp.gate.weight"}


def test_routers_have_a_learning_rate_of_their_own(tmp_path):
    t = trainer(tmp_path / "a", optim="sgd", router_learning_rate=1e-4, max_grad_norm=0.0)
    before = {n: p.detach().clone() for n, p in t.bare.named_parameters() if p.requires_grad}
    t.train()
    rates = {len(g["params"]): g["lr"] for g in t.optimizer.param_groups if g["params"]}  # type: ignore[union-attr]
    assert rates == {4: 1e-2, 1: 1e-4}
    after = {n: p for n, p in t.bare.named_parameters() if p.requires_grad}
    for (n, p), g in zip(after.items(), t.last_step.update.tensors, strict=True):
        rate = 1e-4 if "router" in n else 1e-2
        assert torch.allclose(p.detach(), before[n] - rate * g, atol=1e-8), n


def test_a_router_rate_without_a_trained_router_is_refused(tmp_path):
    with pytest.raises(UserError, match="the adapter trains no router"):
        trainer(tmp_path / "a", "none", router_learning_rate=1e-4).train()


def test_the_keep_term_in_a_run(tmp_path):
    spec = {**UOE, "retain": {"nll": {}, "router_keep": {"weight": 10.0}}}
    t = trainer(tmp_path / "a", spec=spec, max_steps=2)
    t.train()
    assert all(torch.isfinite(v).all() for v in t.last_step.update.tensors)
    with pytest.raises(UserError, match="router_keep need its inner layers"):
        UnlearnConfig(output_dir="x", terms=spec, use_cpu=True, reference="precomputed")
