"""Gradients, precision, stacking and mixed batches of the tuner's layers."""

from __future__ import annotations

import copy

import families as f
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_unlearn.errors import UserError
from peft_unlearn.tuners.expert_lora import export_stock, moe_blocks
from peft_unlearn.tuners.expert_lora.layer import ExpertsLayer, TunerLayer
from peft_unlearn.tuners.peft_type import PREFIX


def gradients(model, seed=9, inputs=None):
    """Gradients of a random linear function of the logits: every output counts."""
    z = model(**(inputs or f.batch(6, 20))).logits
    g = torch.Generator().manual_seed(seed)
    (z * torch.randn(z.shape, generator=g)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("router", ["none", "lora", "full"])
@pytest.mark.parametrize("family", list(f.FAMILIES))
def test_gradients_equal_the_stock_layout(family, router, tmp_path):
    """d/dA and d/dB of the chosen experts, and the router's, are those of the same adapter in stock PEFT."""
    plain = f.base(family, "grouped_mm")
    ours = f.adapted(copy.deepcopy(plain), train_router=router)
    export_stock(ours, tmp_path / "stock")
    stock = f.quietly(PeftModel.from_pretrained, plain, str(tmp_path / "stock"), is_trainable=True).eval()
    got, want = gradients(ours), gradients(stock)
    scale = max(float(w.abs().max()) for w in want.values())
    checked = 0
    for name, module in ours.named_modules():
        if not isinstance(module, TunerLayer):
            continue
        if isinstance(module, ExpertsLayer):
            ids, n = module.experts["default"], module.num_experts
            for p, inside in (("gate_up", ".base_layer"), ("down", "")):
                a = want[f"{name}{inside}.lora_A.default.weight"].unflatten(0, (n, -1))[ids]
                b = want[f"{name}{inside}.lora_B.default.weight"].unflatten(1, (-1, n)).permute(2, 0, 1)[ids]
                if family == "llama4_text":
                    a, b = b.transpose(1, 2), a.transpose(1, 2)
                assert f.error(got[f"{name}.{PREFIX}{p}_A.default"], a) <= 2e-6 * scale
                assert f.error(got[f"{name}.{PREFIX}{p}_B.default"], b) <= 2e-6 * scale
                assert float(a.abs().max()) > 1e-3 * scale
                checked += 1
        else:
            a, b = (want[f"{name}.lora_{x}.default.weight"] for x in "AB")
            if router == "full":  # the stock factors are D and the identity: D's gradient is the whole delta's
                assert f.error(got[f"{name}.{PREFIX}router_delta.default"], a) <= 2e-6 * scale
            else:
                assert f.error(got[f"{name}.{PREFIX}router_A.default"], a) <= 2e-6 * scale
                assert f.error(got[f"{name}.{PREFIX}router_B.default"], b) <= 2e-6 * scale
            checked += 1
    assert checked == (4 if router == "none" else 6)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_experts_that_no_token_reaches(family):
    """Zero gradients and not None, so that ranks agree; the other chosen expert trains as ever."""
    plain = f.base(family, "grouped_mm")
    router = plain.get_submodule(str(moe_blocks(plain)[1].router))
    seen = []
    handle = router.register_forward_hook(lambda m, a, out: seen.append((a[0].reshape(-1, 32), out)))
    few = f.batch(2, 10)
    f.logits(plain, few)
    hidden = seen[0][0].double()
    with torch.no_grad():  # 20 tokens in 32 dimensions: some row of the router is opposed to all of them
        row = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), -50.0).double(), driver="gelsd").solution[:, 0]
        router.weight[6] = row.float()
        if family == "gpt_oss":
            router.bias[6] = -1e3
    model = f.adapted(plain, experts={1: [2, 6]})
    seen.clear()
    got = gradients(model, inputs=few)
    handle.remove()
    assert (seen[0][1][2] != 6).all() and (seen[0][1][2] == 2).any()
    assert len(got) == 4
    for n, g in got.items():
        assert g is not None and float(g[1].abs().max()) == 0, n
        assert float(g[0].abs().max()) > 0, n


@pytest.mark.parametrize("router", ["none", "full"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text"])  # no dropout, no jitter
def test_gradient_checkpointing(family, router):
    plain = f.base(family, "grouped_mm")
    want = gradients(f.adapted(copy.deepcopy(plain), train_router=router))
    model = f.adapted(plain, train_router=router)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model.train())
    assert got.keys() == want.keys()
    assert max(f.error(got[n], want[n]) for n in want) == 0


@pytest.mark.parametrize("router", ["none", "lora", "full"])
@pytest.mark.parametrize("implementation", f.IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_half_precision_comes_off_bit_for_bit(family, implementation, router):
    """bf16 base, float32 factors; merging rounds once however many adapters are merged, and is undone exactly."""
    plain = f.base(family, implementation).to(torch.bfloat16)
    untouched = f.logits(plain)
    model = f.adapted(copy.deepcopy(plain), train_router=router)
    f.adapted(model, "other", 4, experts={1: [5]}, train_router=router)
    model.base_model.set_adapter(["default", "other"])
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if PREFIX in n)
    both = f.logits(model)
    assert f.error(both, untouched) > 0.05
    with model.disable_adapter():
        assert torch.equal(f.logits(model), untouched)
    model.merge_adapter(["default"])
    f.quietly(model.merge_adapter, ["other"])
    merged = {n: p.clone() for n, p in model.named_parameters()}
    dense = dict(f.dense(plain.float(), model_before_merge(plain, router), "default", "other").named_parameters())
    for n, p in merged.items():
        name = n.removeprefix("base_model.model.").replace(".base_layer", "")
        if PREFIX not in n:
            want = dense[name].to(torch.bfloat16)
            # float32 sums in another order may fall on the other side of a rounding: one last place, and rarely.
            assert torch.allclose(p.float(), want.float(), rtol=2**-7, atol=0), n
            assert float((p != want).float().mean()) <= 1e-3, n
    model.unmerge_adapter()
    assert torch.equal(f.logits(model), both)
    with model.disable_adapter():
        assert torch.equal(f.logits(model), untouched)
    start = dict(plain.to(torch.bfloat16).named_parameters())
    for n, p in model.named_parameters():
        if PREFIX not in n:
            assert torch.equal(p, start[n.removeprefix("base_model.model.").replace(".base_layer", "")])


def model_before_merge(plain, router):
    model = f.adapted(copy.deepcopy(plain), train_router=router)
    return f.adapted(model, "other", 4, experts={1: [5]}, train_router=router)


def test_fresh_adapter_changes_nothing():
    for family in f.FAMILIES:
        plain = f.base(family, "grouped_mm")
        model = get_peft_model(copy.deepcopy(plain), f.config(train_router="full")).eval()
        assert f.error(f.logits(model), f.logits(plain)) <= 2e-6
        factors = [n for n, p in model.named_parameters() if p.requires_grad]
        assert len(factors) == 10 and all(PREFIX in n for n in factors)


def test_no_delta_of_an_experts_size_in_a_step():
    """Autograd keeps nothing as large as a chosen expert's weight for backward, but views of the weight itself."""
    plain = f.base("olmoe", "grouped_mm", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    model = f.adapted(plain)
    weights = {p.untyped_storage().data_ptr() for n, p in model.named_parameters()}
    saved = []
    size = 64 * 96

    def pack(t):
        if t.numel() >= size and t.untyped_storage().data_ptr() not in weights:
            saved.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=torch.arange(3, 7)[None]).logits.sum()
    assert saved == []
    loss.backward()


def test_all_experts_and_routers_alone():
    plain = f.base("olmoe", "grouped_mm")
    model = f.adapted(copy.deepcopy(plain), experts={layer: list(range(8)) for layer in range(3)}, train_router="lora")
    assert f.error(f.logits(model), f.logits(f.dense(plain, model))) <= 5e-6
    model = f.adapted(copy.deepcopy(plain), experts={0: [], 2: []}, train_router="full")
    assert f.error(f.logits(model), f.logits(f.dense(plain, model))) <= 5e-6
    assert model.base_model.targeted_module_names == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]


def test_beside_an_attention_lora(tmp_path):
    """On a plain transformers model, two PEFT types at once; each comes off alone, both off is the base bit for bit."""
    plain = f.base("olmoe", "grouped_mm")
    untouched = f.logits(plain)
    lora = get_peft_model(copy.deepcopy(plain), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for n, p in lora.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    lora.save_pretrained(tmp_path / "l")
    only_lora = f.logits(lora.eval())
    expert = f.adapted(copy.deepcopy(plain), train_router="full")
    expert.save_pretrained(tmp_path / "e")
    merged = f.dense(lora.merge_and_unload(), expert)
    model = copy.deepcopy(plain)
    model.load_adapter(str(tmp_path / "l"), "l")
    f.quietly(model.load_adapter, str(tmp_path / "e"), "e")
    model.set_adapter(["l", "e"])
    assert f.error(f.logits(model), f.logits(merged)) <= 5e-6
    model.disable_adapters()
    assert torch.equal(f.logits(model), untouched)
    model.enable_adapters()
    model.delete_adapter("e")
    model.set_adapter("l")
    assert f.error(f.logits(model), only_lora) <= 2e-6


def test_active_adapter_beside_a_frozen_one():
    plain = f.base("olmoe", "grouped_mm")
    model = f.adapted(copy.deepcopy(plain))
    model.add_adapter("second", f.config(experts={1: [5], 0: [3]}))
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".second"))
    model.base_model.set_adapter(["default", "second"])
    for n, p in model.named_parameters():
        p.requires_grad_(n.endswith(".second"))
    f.move(model, "second", 8)
    got = gradients(model)
    assert {n.rpartition(".")[2] for n in got} == {"second"} and all(float(g.abs().max()) > 0 for g in got.values())


@pytest.mark.parametrize("family", ["olmoe", "phimoe", "deepseek_v2", "llama4_text"])
def test_router_logits_of_a_mixed_batch(family):
    """Whoever records router logits sees every row's own, once per layer."""
    plain = f.base(family, "grouped_mm")
    model = f.adapted(copy.deepcopy(plain), train_router="full")
    kind = {"output_router_logits": True}
    if not hasattr(plain(**f.batch(2), **kind), "router_logits"):
        pytest.skip(f"transformers {transformers.__version__} gives no router logits for this family")
    with torch.no_grad():
        both = model(**f.batch(2), **kind, adapter_names=["__base__", "default"]).router_logits
        adapted = model(**f.batch(2), **kind).router_logits
        base = plain(**f.batch(2), **kind).router_logits
    assert len(both) == len(adapted) == len(base)
    for z, a, b in zip(both, adapted, base, strict=True):
        z, a, b = (t.reshape(2, -1, 8) for t in (z, a, b))
        assert f.error(z[0], b[0]) <= 5e-6 and f.error(z[1], a[1]) <= 5e-6


def test_mixed_batches_are_refused_aloud_and_leave_no_hooks():
    model = f.adapted(f.base("olmoe"), train_router="lora")
    one = f.logits(model)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        f.logits(model, adapter_names=["nobody", "default", "__base__"])
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**f.batch(), adapter_names=["default"] * 3)
    model.eval()
    with pytest.raises(RuntimeError):  # two names for three sequences: fails inside the forward pass
        f.logits(model, adapter_names=["default", "__base__", "default", "default", "default"])
    assert torch.equal(f.logits(model), one)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerged"):
        f.logits(model, adapter_names=["default", "__base__", "default"])


def test_generation_with_beams_and_mixed_adapters():
    model = f.adapted(f.base("olmoe", "grouped_mm"))
    kind = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(**f.batch(2), adapter_names=["default", "__base__"], **kind)
    want = model.generate(**f.batch(2), **kind)
    with model.disable_adapter():
        base = model.generate(**f.batch(2), **kind)
    assert torch.equal(mixed[0], want[0]) and torch.equal(mixed[1], base[1])


def test_autocast_and_repeatability():
    model = f.adapted(f.base("olmoe", "grouped_mm"), train_router="lora")
    want = gradients(model)
    again = gradients(f.adapted(f.base("olmoe", "grouped_mm"), train_router="lora"))
    assert all(torch.equal(want[n], again[n]) for n in want)
    with torch.autocast("cpu", torch.bfloat16):
        assert f.error(f.logits(model), f.logits(f.dense(f.base("olmoe", "grouped_mm"), model)).float()) < 0.1


def test_scaling():
    """`ForgetModel` scales an adapter by its layers' scaling: at -1 it is taken off twice over, at 0 it is the base."""
    plain = f.base("olmoe", "grouped_mm")
    model = f.adapted(copy.deepcopy(plain), train_router="full")
    for m in model.modules():
        if isinstance(m, TunerLayer):
            m.scaling["default"] = 0.0
    assert f.error(f.logits(model), f.logits(plain)) <= 2e-6


def test_status_and_repr():
    model = f.adapted(f.base("olmoe"), train_router="full")
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] and status.num_adapter_layers == 4
    assert "expert_lora.ExpertsLayer" in repr(model)
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- import ------------------------------------------------------------------------------------------------------------


def stock_folder(tmp_path, plain, **over):
    names = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 2) for p in ("gate_up", "down")]
    given = {"r": 3, "lora_alpha": 7, "target_modules": [], "target_parameters": names, **over}
    model = f.quietly(get_peft_model, copy.deepcopy(plain), LoraConfig(**given))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.1)
    f.quietly(model.save_pretrained, tmp_path / "stock")
    return model.eval()


def test_import_of_an_adapter_trained_by_stock_peft(tmp_path):
    plain = f.base("olmoe", "grouped_mm")
    router = "model.layers.{}.mlp.gate.weight"
    names = [f"model.layers.{i}.mlp.experts.{p}_proj" for i in (0, 2) for p in ("gate_up", "down")]
    stock = stock_folder(
        tmp_path, plain, use_rslora=True, target_parameters=[*names, router.format(0), router.format(2)]
    )
    back = f.import_stock(tmp_path / "stock", copy.deepcopy(plain), "again")
    config = back.peft_config["again"]
    assert config.experts == {"0": list(range(8)), "2": list(range(8))} and config.train_router == "lora"
    assert f.error(f.logits(back), f.logits(stock)) <= 2e-6


def test_import_where_one_projection_is_adapted(tmp_path):
    plain = f.base("gpt_oss", "grouped_mm")
    stock = stock_folder(tmp_path, plain, target_parameters=["model.layers.1.mlp.experts.down_proj"])
    assert f.error(f.logits(f.import_stock(tmp_path / "stock", copy.deepcopy(plain))), f.logits(stock)) <= 2e-6


def test_untrained_adapters_keep_their_experts(tmp_path):
    plain = f.base("olmoe")
    export_stock(get_peft_model(copy.deepcopy(plain), f.config(train_router="lora")), tmp_path / "stock")
    back = f.import_stock(tmp_path / "stock", plain).peft_config["default"]
    assert back.experts == {"1": [2, 5], "2": [0]} and back.router_r == 4


def test_imports_that_are_refused(tmp_path):
    plain = f.base("olmoe")
    stock_folder(tmp_path / "q", plain, target_modules=["q_proj"])
    with pytest.raises(UserError, match="no LORA adapter on fused parameters alone"):
        f.import_stock(tmp_path / "q/stock", plain)
    name = "model.layers.0.mlp.experts.down_proj"
    stock_folder(tmp_path / "r", plain, rank_pattern={name: 5})
    with pytest.raises(UserError, match="different ranks or scalings"):
        f.import_stock(tmp_path / "r/stock", plain)
    stock_folder(tmp_path / "e", plain)
    with pytest.raises(UserError, match="do not fit the 7 experts"):
        f.import_stock(tmp_path / "e/stock", f.base("olmoe", num_experts=7))
    with pytest.raises(UserError, match="neither on experts nor on a router"):
        f.import_stock(tmp_path / "e/stock", f.base("olmoe", num_hidden_layers=2))


def test_exports_that_are_refused(tmp_path):
    model = f.adapted(f.base("olmoe"))
    with pytest.raises(UserError, match=r"holds no adapter 'nobody' .it holds: default"):
        export_stock(model, tmp_path / "a", "nobody")
    lora = get_peft_model(f.base("olmoe"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UserError, match="is of type LORA"):
        export_stock(lora, tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        export_stock(model, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_export_from_a_plain_model_and_its_size(tmp_path):
    plain = f.base("olmoe")
    model = f.adapted(copy.deepcopy(plain), train_router="full", name="mine")
    export_stock(model, tmp_path / "a", "mine")
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(str(tmp_path / "a/expert_lora"), "it")
    export_stock(loaded, tmp_path / "b", "it")
    for name in ("adapter_model.safetensors", "expert_lora/adapter_model.safetensors"):
        x, y = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    stock = load_file(tmp_path / "a/adapter_model.safetensors")
    gate = stock["base_model.model.model.layers.1.mlp.gate.lora_A.weight"]
    assert gate.shape[0] <= 8
    down = stock["base_model.model.model.layers.1.mlp.experts.lora_A.weight"].unflatten(0, (8, -1))
    assert [e for e in range(8) if float(down[e].abs().max()) > 0] == [2, 5]
