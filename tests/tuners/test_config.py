"""What is refused, and in which words."""

from __future__ import annotations

import copy
import json

import families
import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_unlearn.tuners.expert_lora import ExpertLoraConfig, moe_blocks


def test_json_round_trip(tmp_path):
    config = ExpertLoraConfig(experts={12: [41, 3], np.int64(2): np.array([7])}, r=4, lora_alpha=2.5, router_r=None)
    assert config.experts == {"2": [7], "12": [3, 41]} and list(config.experts) == ["2", "12"]
    assert config.chosen == {2: [7], 12: [3, 41]}
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, ExpertLoraConfig) and again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PEFT_UNLEARN_EXPERT_LORA"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"experts": None}, "at least one layer"),
        ({"experts": {}}, "at least one layer"),
        ({"experts": [3]}, "expected {layer: [expert ids]}"),
        ({"experts": {"one": [3]}}, "layer 'one' is no index"),
        ({"experts": {-1: [3]}}, "layer -1 is no index"),
        ({"experts": {1: []}}, "the list is empty and train_router is 'none'"),
        ({"experts": {1: 3}}, "expected a list of expert ids, found 3"),
        ({"experts": {1: "3"}}, "expected a list of expert ids"),
        ({"experts": {1: [3, 3]}}, "[3] named twice"),
        ({"experts": {1: [0], "1": [2]}}, "layer 1 is named twice"),
        ({"experts": {1: [-2, 0.5]}}, "-2, 0.5 is no expert id"),
        ({"experts": {1: [0]}, "r": 0}, "r 0: expected a whole number from 1"),
        ({"experts": {1: [0]}, "lora_alpha": 0}, "lora_alpha 0: expected a positive number"),
        ({"experts": {1: [0]}, "train_router": "yes"}, "train_router 'yes': expected one of none, lora, full"),
        ({"experts": {1: [0]}, "router_r": 2}, "router_r is for train_router='lora'"),
        ({"experts": {1: [0]}, "router_r": 0, "train_router": "lora"}, "router_r 0"),
    ],
)
def test_wrong_configurations(given, words):
    with pytest.raises(ValueError) as e:
        ExpertLoraConfig(**given)
    assert words in str(e.value)


def test_every_mistake_at_once():
    with pytest.raises(ValueError, match=r"layer 'x'.*r -1.*lora_alpha nan.*train_router 'all'"):
        ExpertLoraConfig(experts={"x": [1], 2: [1]}, r=-1, lora_alpha=float("nan"), train_router="all")


def refused(model, words, **over):
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError) as e:
        get_peft_model(model, families.config(**over))
    assert words in str(e.value)
    assert [n for n, _ in model.named_modules()] == names  # nothing was put in before it was refused


def test_wrong_bases():
    refused(tiny.llama(), "LlamaForCausalLM is a dense model")
    refused(families.base("deepseek_v2"), "layer 0 has no experts (layers that have: 1-2)", experts={0: [1]})
    refused(families.base("olmoe"), "layer 9 has no experts (layers that have: 0-2)", experts={9: [1], 1: [1]})
    refused(families.base("olmoe"), "layer 1 has experts 0 to 7, not 8, 64", experts={1: [2, 8, 64]})
    refused(families.base("olmoe"), "router_r 9 is more than the 8", train_router="lora", router_r=9)
    parallel = families.base("olmoe")
    parallel.model.layers[1].mlp.experts._is_expert_parallel = True
    refused(parallel, "expert parallel")
    refused(parallel, "expert parallel", experts={1: [0], 2: [0]})
    quantized = families.base("olmoe")
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    refused(quantized, "the base is quantized")
    eight_bit = families.base("olmoe")
    experts = eight_bit.model.layers[1].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e4m3fn), False)
    refused(eight_bit, "they are quantized (torch.float8_e4m3fn)")
    kernels = families.base("olmoe")
    kernels._use_kernels = True
    if getattr(kernels, "use_kernels", False):
        refused(kernels, "use_kernels=False")
    foreign = families.base("olmoe")
    foreign.model.layers[1].mlp.experts.has_post_expert_norm = True
    refused(foreign, "normalizes every expert's output")
    routerless = families.base("olmoe")
    routerless.model.layers[1].mlp.gate = torch.nn.Identity()
    refused(routerless, "layer 1: no router was found", train_router="full")


def test_several_reasons_at_once():
    with pytest.raises(ValueError, match=r"layer 0 has no experts.*layer 1 has experts 0 to 7, not 9"):
        get_peft_model(families.base("deepseek_v3"), families.config(experts={0: [1], 1: [9]}))


def test_wrong_expert_count_on_load(tmp_path):
    families.adapted(families.base("olmoe")).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts"] == {"1": 8, "2": 8}
    other = families.base("olmoe", num_experts=16)
    words = "layer 1: the adapter was made for a base with 8 experts there, and this one has 16"
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(copy.deepcopy(other), str(tmp_path))
    with pytest.raises(ValueError, match=words):
        other.load_adapter(str(tmp_path))


def test_stock_expert_adapter_underneath():
    """The recomputed expert would not have the other adapter's delta: refused instead of silently wrong."""
    model = families.base("olmoe")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    stock = LoraConfig(r=2, target_modules=[], target_parameters=[name])
    families.quietly(model.add_adapter, stock, "stock")
    with pytest.raises(ValueError, match="already carries an adapter of another type"):
        model.add_adapter(families.config(), "expert")
    model = families.base("olmoe")
    model.add_adapter(families.config(), "expert")
    with pytest.raises(ValueError, match="not a valid target"):
        families.quietly(model.add_adapter, stock, "stock")


def test_blocks():
    for family in families.FAMILIES:
        blocks = moe_blocks(families.base(family))
        assert list(blocks) == ([1, 2] if family.startswith("deepseek") else [0, 1, 2])
        assert all(b.num_experts == 8 and b.unsupported is None and b.router for b in blocks.values()), family
    assert moe_blocks(tiny.llama()) == {}
    plain = moe_blocks(families.base("olmoe"))
    assert moe_blocks(families.adapted(families.base("olmoe"), train_router="full")) == plain
