"""The sparse tuner: any parameter, exact in every state, no copy of a weight kept, hooks and gradients of the base untouched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import families as f
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_unlearn.errors import UserError
from peft_unlearn.stack.attach import add
from peft_unlearn.tuners.expert_lora import ExpertLoraConfig
from peft_unlearn.tuners.expert_lora.layer import ExpertsLayer
from peft_unlearn.tuners.selection import Selection
from peft_unlearn.tuners.sparse import SparseConfig, export_stock
from peft_unlearn.tuners.sparse.export import entries_of
from peft_unlearn.tuners.sparse.layer import SparseLayer

IDS = torch.arange(24).view(2, 12) + 5


def chosen(model: Any, ratio: float = 0.05, names: Sequence[str] = (), seed: int = 0) -> Selection:
    """Random entries of every parameter that can be adapted, or of those with one of `names` in their own."""
    g, indices = torch.Generator().manual_seed(seed), {}
    wanted = [n for n, _ in model.named_parameters() if (any(x in n for x in names) if names else "sinks" not in n)]
    shapes = {n: tuple(model.get_parameter(n).shape) for n in wanted}
    for n, s in shapes.items():
        size = torch.Size(s).numel()
        indices[n] = torch.randperm(size, generator=g)[: max(1, int(ratio * size))].sort().values
    return Selection(indices, shapes, {"method": "by hand"})


def sparse(model: Any, selection: Selection | None = None, **over: Any) -> Any:
    config = SparseConfig(
        selection=selection or chosen(model), task_type="CAUSAL_LM", **{"init_weights": False, **over}
    )  # type: ignore[arg-type]
    torch.manual_seed(3)
    return get_peft_model(model, config)


def dense(plain: Any, model: Any, *adapters: str) -> Any:
    """`plain` with the adapters' deltas written into its weights."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for adapter in adapters or ("default",):
            scale = model.peft_config[adapter].scale
            for name, e in entries_of(model, adapter).items():
                plain.get_parameter(name).view(-1)[e.positions] += (e.values * scale).to(plain.dtype)
    return plain


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return (
        GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False)
        )
        .to(dtype)
        .eval()
    )


BASES = {"llama": tiny.llama, "conv1d": gpt2, "experts": lambda: f.base("olmoe", "grouped_mm"),
         "transposed experts": lambda: f.base("gpt_oss", "eager")}  # fmt: skip


@pytest.mark.parametrize("kind", list(BASES))
def test_every_parameter_is_exact_in_every_state(kind, tmp_path):
    plain = BASES[kind]()
    before = f.logits(plain, {"input_ids": IDS})
    zero = sparse(copy.deepcopy(plain), init_weights=True)
    assert torch.equal(f.logits(zero, {"input_ids": IDS}), before)
    model = sparse(copy.deepcopy(plain), scale=0.5).eval()
    assert entries_of(model).keys() == chosen(plain).shapes.keys()
    on = f.logits(model, {"input_ids": IDS})
    assert float((on - before).abs().max()) > 1e-3
    assert torch.equal(on, f.logits(dense(plain, model), {"input_ids": IDS}))
    with model.disable_adapter():
        assert torch.equal(f.logits(model, {"input_ids": IDS}), before)
    model.merge_adapter()
    assert torch.equal(f.logits(model, {"input_ids": IDS}), on)
    model.unmerge_adapter()
    assert torch.equal(f.logits(model, {"input_ids": IDS}), on)
    model.save_pretrained(str(tmp_path))
    for more in ({}, {"low_cpu_mem_usage": True}):
        again = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path), **more).eval()
        assert torch.equal(f.logits(again, {"input_ids": IDS}), on)
    off = model.unload()
    assert all(torch.equal(p, q) for p, q in zip(off.parameters(), plain.parameters(), strict=True))


def test_half_precision_merges_to_what_it_computes():
    plain = tiny.llama().to(torch.bfloat16)
    model = sparse(copy.deepcopy(plain)).eval()
    add(model, "other", SparseConfig(selection=chosen(plain, seed=0), init_weights=False))  # the very same entries
    model.base_model.set_adapter(["default", "other"])
    on = model(IDS).logits
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, on)
    model.unmerge_adapter()
    assert (
        torch.equal(model(IDS).logits, on)
        and model.base_model.model.lm_head.peft_unlearn_sparse_values["other"].dtype == torch.float32
    )
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("kind", list(BASES))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_weights(kind, checkpointing):
    """Of the values, and of the base's own weights where they require one."""
    plain = BASES[kind]()
    model = sparse(copy.deepcopy(plain), scale=2.0)
    want = dense(plain, model).requires_grad_(True)
    if checkpointing:
        if kind == "conv1d":
            pytest.skip("its blocks drop at random in training mode")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(), want.train()
    base = {n: p for n, p in model.named_parameters() if "sparse" not in n}
    for p in base.values():
        p.requires_grad_(True)
    for m in (model, want):
        (m(input_ids=IDS).logits.square().mean()).backward()
    grads = {n: p.grad for n, p in want.named_parameters()}
    seen = 0
    for path, layer in (
        (n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if isinstance(m, SparseLayer)
    ):
        got = layer.values("default").grad
        assert got is not None
        for (leaf, (i, _)), part in zip(
            layer.entries("default").items(), got.split(list(layer.counts["default"].values())), strict=True
        ):
            assert torch.allclose(part, 2.0 * grads[f"{path}.{leaf}"].view(-1)[i], rtol=1e-4, atol=1e-7), (path, leaf)
            seen += len(i)
    assert seen == chosen(plain).count
    for n, p in base.items():
        name = n.removeprefix("base_model.model.").replace(".base_layer", "")
        assert p.grad is not None and torch.allclose(p.grad, grads[name], rtol=1e-4, atol=1e-7), n


@pytest.mark.parametrize("kind", list(BASES))
def test_no_copy_of_a_weight_outlives_the_forward(kind):
    """Whatever autograd saves of the size of an adapted matrix is the base's own weight."""
    plain = BASES[kind]()
    names = [
        n for n, p in plain.named_parameters() if p.dim() > 1 and "embed" not in n and "wte" not in n and "wpe" not in n
    ]
    model = sparse(plain, chosen(plain, names=names))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "base_layer" in n and p.dim() > 1}
    shapes |= {(*s[:-2], s[-1], s[-2]) for s in shapes}
    copies: list[Any] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if tuple(t.shape) in shapes and t.untyped_storage().data_ptr() not in own:
            copies.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=IDS[:, :7]).logits.square().mean()  # 14 tokens: no activation has a weight's shape
    loss.backward()
    assert not copies


def test_hooks_of_base_layers_run():
    model = sparse(tiny.llama())
    calls: list[str] = []
    for n, m in model.named_modules():
        if n.endswith(("q_proj.base_layer", "input_layernorm.base_layer", "embed_tokens.base_layer")):
            m.register_forward_hook(lambda m, a, out, n=n: calls.append(n) or out * 0)
    z = model(IDS).logits
    assert len(calls) == 5 and not z.any()  # embeddings times zero: nothing is left
    assert all("forward" not in vars(m) for m in model.modules())


def test_stacks_with_lora_and_expert_adapters_of_a_mixture_of_experts():
    plain = f.base("olmoe", "grouped_mm")
    names = ["layers.0.mlp.experts.down_proj", "layers.1.self_attn.q_proj"]
    model = sparse(copy.deepcopy(plain), chosen(plain, names=names)).eval()
    add(model, "low", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    add(model, "expert", ExpertLoraConfig(experts={"1": [2, 5]}, r=2, init_weights=False))
    model.base_model.set_adapter(["default", "low", "expert"])
    together = f.logits(model)
    with torch.no_grad():
        whole = dense(plain, model)
        for n, m in model.named_modules():
            if getattr(m, "lora_A", None):
                whole.get_parameter(n.removeprefix("base_model.model.") + ".weight").add_(m.get_delta_weight("low"))
            if isinstance(m, ExpertsLayer):
                place = whole.get_submodule(n.removeprefix("base_model.model."))
                for p, e in m._touched(["expert"]):
                    w = getattr(place, f"{p}_proj")
                    w[e] = m._merged((p, e), w[e], ["expert"])
    assert f.error(together, f.logits(whole)) <= 1e-5
    for name in ("low", "expert", "default"):
        without = [a for a in ("default", "low", "expert") if a != name]
        model.base_model.set_adapter(without)
        assert f.error(f.logits(model), together) > 1e-4
    with model.disable_adapter():
        assert torch.equal(f.logits(model), f.logits(plain))
    with pytest.raises(ValueError, match="already carries an adapter of another type"):
        add(model, "late", ExpertLoraConfig(experts={"0": [2]}))
    with pytest.raises(ValueError, match=r"carries an adapter of another type already \(ExpertsLayer\)"):
        add(model, "later", SparseConfig(selection=chosen(plain, names=["layers.1.mlp.experts.down_proj"])))


def test_loaders_of_transformers_and_status(tmp_path):
    plain = tiny.llama()
    model = sparse(copy.deepcopy(plain), chosen(plain, names=["proj"])).eval()
    on = model(IDS).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    other = tiny.llama()
    other.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(other(IDS).logits, on)
    other.delete_adapter("default")
    assert torch.equal(other(IDS).logits, plain(IDS).logits)
    found: Any = PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "adapter"), is_trainable=True)
    assert torch.equal(found.eval()(IDS).logits, on) and sum(p.requires_grad for p in found.parameters()) == 14
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.num_adapter_layers == 14


def test_autocast_is_that_of_the_base():
    plain = tiny.llama()
    model = sparse(copy.deepcopy(plain), chosen(plain, names=["proj"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = model(IDS).logits, dense(plain, model)(IDS).logits
    assert torch.equal(a, b)
    a.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_five_sgd_steps_are_dense_masked_training():
    plain = tiny.llama()
    selection = chosen(plain, names=["proj"])
    model, whole = sparse(copy.deepcopy(plain), selection, init_weights=True), copy.deepcopy(plain).requires_grad_(True)
    masks = {n: torch.zeros(s, dtype=torch.bool) for n, s in selection.shapes.items()}
    for n, i in selection.indices.items():
        masks[n].view(-1)[i] = True
    a = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    b = torch.optim.SGD(whole.parameters(), lr=0.5)
    for step in range(5):
        for m, optimizer in ((model, a), (whole, b)):
            optimizer.zero_grad()
            m(IDS + step, labels=IDS + step).loss.backward()
            if m is whole:
                for n, p in whole.named_parameters():
                    p.grad = p.grad * masks[n] if n in masks else None
            optimizer.step()
    moved = dense(plain, model)
    worst = max(float((p - q).abs().max()) for p, q in zip(moved.parameters(), whole.parameters(), strict=True))
    assert worst <= 1e-6
    assert max(float((p - q).abs().max()) for p, q in zip(whole.parameters(), plain.parameters(), strict=True)) > 1e-2
    for n, p in moved.named_parameters():  # outside the support not a bit has moved
        still = ~masks[n] if n in masks else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[still], plain.get_parameter(n)[still])


@pytest.mark.parametrize("order", ["lora first", "sparse first"])
def test_with_a_lora_on_the_same_module(order):
    plain = tiny.llama()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    own = SparseConfig(selection=chosen(plain, names=["q_proj", "up_proj"]), init_weights=False)
    first, second = (lora, own) if order == "lora first" else (own, lora)
    torch.manual_seed(5)
    model: Any = get_peft_model(copy.deepcopy(plain), first, "a").eval()
    add(model, "b", second)
    model.base_model.set_adapter(["a", "b"])
    name = "b" if second is own else "a"
    want = dense(plain, model, name)
    with torch.no_grad():
        for n, m in model.named_modules():
            if hasattr(m, "lora_A") and len(m.lora_A):
                q = want.get_parameter(n.removeprefix("base_model.model.") + ".weight")
                other = "a" if name == "b" else "b"
                q += m.get_delta_weight(other)
    assert f.error(model(IDS).logits, want(IDS).logits) <= 1e-5
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


def test_what_is_refused():
    plain = tiny.llama()

    def refused(words: str, selection: Selection | None = None, model: Any = None, **over: Any) -> None:
        base = model or tiny.llama()
        names = [n for n, _ in base.named_modules()]
        with pytest.raises(ValueError, match=words):
            get_peft_model(base, SparseConfig(selection=selection, **over))
        assert [n for n, _ in base.named_modules()] == names  # untouched

    name = "model.layers.0.self_attn.q_proj.weight"
    shape = tuple(plain.get_parameter(name).shape)
    other = name.replace("q_proj", "q_prj")
    refused(
        "no parameter 'model.layers.0.self_attn.q_prj.weight'.*Did you mean",
        Selection({other: torch.arange(2)}, {other: shape}),
    )
    sinks = "model.layers.0.self_attn.sinks"
    refused("holds others with weights", Selection({sinks: torch.arange(2)}, {sinks: (4,)}), f.base("gpt_oss", "eager"))
    refused(
        r"is \[32, 32\] here, and the entries were chosen in \[2, 3\]",
        Selection({name: torch.arange(2)}, {name: (2, 3)}),
    )
    refused("come with a selection")
    refused("chose no entry", Selection({name: torch.arange(0)}, {name: shape}))
    refused("finite number that is not 0", chosen(plain), scale=0.0)
    refused("has 6 entries, and 7 of them", counts={name: 7}, shapes={name: [2, 3]})
    refused("the shape of each parameter", counts={name: 2})
    experts = f.base("olmoe", "grouped_mm")
    lora = get_peft_model(experts, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(ValueError, match=r"carries an adapter of another type already \(ParamWrapper\)"):
        add(lora, "s", SparseConfig(selection=chosen(f.base("olmoe", "grouped_mm"), names=["down_proj"])))
    dora = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        add(dora, "s", SparseConfig(selection=chosen(plain, names=["q_proj"])))
    with pytest.raises(ValueError, match="mixed batches"):
        sparse(tiny.llama()).eval()(IDS, adapter_names=["default", "__base__"])


def test_untold_positions_are_no_places():
    """A config that was read, with no tensors to go with it, does not add anything anywhere in silence."""
    plain = tiny.llama()
    name = "model.layers.0.self_attn.q_proj.weight"
    model = get_peft_model(plain, SparseConfig(counts={name: 3}, shapes={name: [32, 32]}))
    with pytest.raises((IndexError, RuntimeError)):
        model(IDS)


def test_taking_one_of_two_off():
    plain = tiny.llama()
    model = sparse(copy.deepcopy(plain), chosen(plain, names=["q_proj", "k_proj"])).eval()
    alone = model(IDS).logits
    add(model, "other", SparseConfig(selection=chosen(plain, names=["k_proj", "v_proj"], seed=1), init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert not torch.equal(model(IDS).logits, alone)
    model.delete_adapter("other")
    model.base_model.set_adapter(["default"])
    assert torch.equal(model(IDS).logits, alone)
    assert isinstance(model.base_model.model.model.layers[0].self_attn.v_proj, nn.Module)
    assert model.get_model_status().active_adapters == ["default"]
    assert "sparse.SparseLayer" in repr(model)


def test_export_of_any_density_is_exact(tmp_path):
    """From one entry of a weight to all of them, whatever its shape: the parts together are the adapter."""
    plain = tiny.llama()
    names = [n for n, _ in plain.named_parameters() if "proj" in n]
    g, indices = torch.Generator().manual_seed(0), {}
    shapes = {n: tuple(plain.get_parameter(n).shape) for n in names}
    for i, n in enumerate(names):
        size = torch.Size(shapes[n]).numel()
        k = size if i == 0 else max(1, size * i // (2 * len(names)))
        indices[n] = torch.randperm(size, generator=g)[: 1 if i == 1 else k].sort().values
    model = sparse(copy.deepcopy(plain), Selection(indices, shapes), scale=0.5).eval()
    form = export_stock(model, tmp_path / "out")
    rest = [p for p in form.parts if p]
    stock: Any = PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "out"))
    for part in rest:
        stock.load_adapter(str(tmp_path / "out"), part, subfolder=part)
    stock.base_model.set_adapter(["default", *rest])
    assert torch.equal(stock.eval()(IDS).logits, model(IDS).logits)
    assert sum(v.numel() for _, t in form.parts.values() for n, v in t.items() if "weight" in n) == round(
        form.padding * sum(map(len, indices.values()))
    )
    for wrong, words in ((plain, "no sparse adapter 'default'"), (sparse(gpt2()), "SHiRA adapts nothing else")):
        with pytest.raises(UserError, match=words):
            export_stock(wrong, tmp_path / "none")
    with pytest.raises(UserError, match="not empty"):
        export_stock(model, tmp_path / "out")
    assert not (tmp_path / "none").exists()
