"""What an adapter adds, from its files alone, is what PEFT adds."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stacks import delta
from tinyfolder import adapted, randomize
from torch import nn

from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import AdapterFolder, read_adapter
from peft_unlearn.tuners.delta import Deltas


def folder_of(model: Any, path: Path) -> AdapterFolder:
    """Just the two files; the manifest plays no part here."""
    import json

    model.save_pretrained(path)
    config = json.loads((path / "adapter_config.json").read_text())
    return AdapterFolder(path, None, {}, config, None)  # type: ignore[arg-type]


def layers(model: Any) -> dict[str, Any]:
    return {
        n.removeprefix("base_model.model."): m
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")
    }


def check(model: Any, plain: Any, path: Path) -> Deltas:
    """Every form against PEFT's own delta, with the model and (where it can be) without."""
    folder = folder_of(model, path)
    deltas = Deltas(folder, plain)
    bare = Deltas(folder)
    seen = set()
    for name, layer in layers(model).items():
        parameter = getattr(layer, "parameter_name", "weight")
        weight = f"{name.replace('.base_layer', '')}.{parameter}"
        wanted = layer.get_delta_weight("default").detach()
        assert wanted.any()
        assert torch.allclose(delta(deltas, weight), wanted, atol=1e-6, rtol=1e-5), weight
        assert delta(deltas, weight).shape == layer.get_base_layer().get_parameter(parameter).shape
        if not bare.adapted[weight].fused:
            assert torch.equal(delta(bare, weight), delta(deltas, weight))
        seen.add(weight)
    assert seen == set(deltas) == set(bare)
    return deltas


class Forms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.lin, self.lin2 = nn.Linear(6, 10), nn.Linear(10, 4, bias=False)
        self.emb = nn.Embedding(12, 6)
        self.conv = nn.Conv2d(3, 5, 3)


class Transposed(nn.Module):
    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.config = {"model_type": "custom"}
        self.c_attn = Conv1D(12, 6)


@pytest.mark.parametrize("over", [{}, {"use_rslora": True}, {"rank_pattern": {"lin": 3}, "alpha_pattern": {"lin2": 5}}])
def test_dense_forms(over: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=7, target_modules=["lin", "lin2", "emb", "conv"], **over)
    model = get_peft_model(Forms(), config)  # type: ignore[arg-type]
    randomize(model, 0, 0.3)
    deltas = check(model, Forms(), tmp_path)
    assert deltas.adapted["lin.weight"].rank == (3 if "rank_pattern" in over else 2)


def test_conv1d(tmp_path: Path) -> None:
    model = get_peft_model(Transposed(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))  # type: ignore[arg-type]
    randomize(model, 0, 0.3)
    check(model, Transposed(), tmp_path)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe", "llama4_text", "phimoe"])
def test_fused_experts_and_routers(family: str, tmp_path: Path) -> None:
    """PEFT's layout A (experts major) and B (rank major), nested wrappers, experts that lie the other way round."""
    plain = families.base(family)
    blocks = families.moe_blocks(plain)
    block = blocks[max(blocks)]
    targets = [f"{block.experts}.{p}" for p in ("gate_up_proj", "down_proj")] + [f"{block.router}.weight"]
    config = LoraConfig(
        r=3, lora_alpha=4, target_modules=["q_proj"], target_parameters=targets, rank_pattern={targets[0]: 2},
        alpha_pattern={targets[1]: 9},
    )  # fmt: skip
    model = families.quietly(get_peft_model, families.base(family), config)
    randomize(model, 1, 0.2)
    deltas = check(model, plain, tmp_path)
    row = deltas.adapted[targets[0]]
    assert (row.rank, row.scaling, row.experts) == (2, 2.0, 8) and deltas.adapted[targets[1]].scaling == 3.0
    assert row.transposed == (family == "gpt_oss") and deltas.touched(targets[0]) == list(range(8))
    with pytest.raises(ValueError, match="not known without the model"):
        delta(Deltas(deltas.folder), targets[0])


def test_an_expert_adapters_stock_form(tmp_path: Path) -> None:
    """What this package writes for chosen experts: only they are touched, and the sum is the dense model's."""
    from peft_unlearn.tuners.expert_lora.export import export_stock

    plain = families.base("qwen3_moe")
    model = families.adapted(families.base("qwen3_moe"), train_router="full")
    export_stock(model, tmp_path / "stock")
    import json

    config = json.loads((tmp_path / "stock" / "adapter_config.json").read_text())
    deltas = Deltas(AdapterFolder(tmp_path / "stock", None, {}, config, None), plain)  # type: ignore[arg-type]
    wanted = dict(families.dense(plain, model).named_parameters())
    for name, parameter in plain.named_parameters():
        if name in deltas:
            assert torch.allclose(parameter + delta(deltas, name), wanted[name], atol=1e-6), name
        else:
            assert torch.equal(parameter, wanted[name])
    assert deltas.touched("model.layers.1.mlp.experts.gate_up_proj") == [2, 5]


def test_a_shape_that_does_not_fit(base_dir: Path, tmp_path: Path) -> None:
    model = adapted(base_dir)
    folder = folder_of(model, tmp_path / "a")
    path = folder.path / "adapter_model.safetensors"
    good = load_file(path)
    name = next(n for n in good if n.endswith("q_proj.lora_B.weight"))
    plain = model.unload()

    def damaged(change: dict[str, torch.Tensor], drop: str = "") -> Deltas:
        save_file({n: t for n, t in {**good, **change}.items() if n != drop}, path)
        return Deltas(folder, plain)

    with pytest.raises(UserError, match="adapter's delta for it is"):
        damaged({name: good[name][:-1].contiguous()})
    with pytest.raises(UserError, match="do not fit the rank"):
        damaged({name: good[name][:, :-1].contiguous()})
    with pytest.raises(UserError, match="not the other factor"):
        damaged({}, drop=name)
    with pytest.raises(UserError, match="no such module"):
        lost = name.replace(".layers.", ".layers.7")
        damaged({lost: good[name].clone(), lost.replace("_B", "_A"): good[name.replace("_B", "_A")].clone()})
    with pytest.raises(UserError, match="not the factors"):
        damaged({"base_model.model.lm_head.weight": torch.ones(2, 2)})


def test_only_what_moved_counts(base_dir: Path, adapter_dir: Path) -> None:
    deltas = Deltas(read_adapter(adapter_dir))
    assert len(deltas) == 4 and all(deltas.touched(n) == [0] for n in deltas)
    a, b, s = deltas.factors("model.layers.0.self_attn.q_proj.weight")
    assert s == 2.0 and torch.equal(delta(deltas, "model.layers.0.self_attn.q_proj.weight"), (b * s) @ a)
