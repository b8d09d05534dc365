"""What all-linear stands for: plain linear layers that text passes through."""

from __future__ import annotations

import pytest
import tiny
from zoo import tiny_model

from peft_unlearn.training.adapt import adapted, check_causal, get_forget_model
from peft_unlearn.tuners.linear import linear_modules


def leaves(model):
    return {n.rpartition(".")[2] for n in adapted(model)}


def test_a_plain_base_keeps_pefts_own():
    model = tiny.llama()
    found = linear_modules(model, check_causal(model))
    assert found.everything and found.names == linear_modules(model).names
    assert found.names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_on_a_stack_it_is_the_bases_layers():
    stack = tiny.lora(tiny.llama(), target_modules=["q_proj"])
    assert linear_modules(stack, check_causal(stack)) == linear_modules(tiny.llama())


@pytest.mark.parametrize(
    ("kind", "router"), [("phimoe", "router"), ("llama4_text", "router"), ("deepseek_v4", "o_a_proj")]
)
def test_linears_that_compute_something_else_are_left_out(kind, router):
    base = tiny_model(kind)
    assert any(n.rpartition(".")[2] == router for n, _ in base.named_modules())
    model = get_forget_model(base)
    assert leaves(model) and router not in leaves(model)
    model(input_ids=tiny.torch.arange(3, 9)[None], use_cache=False)  # which died there


def test_a_subclass_that_is_a_linear_map_is_kept():
    base = tiny_model("falcon")
    assert type(base.transformer.h[0].mlp.dense_4h_to_h).__name__ == "FalconLinear"
    assert {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"} == leaves(get_forget_model(base))


def test_towers_and_cross_attention_are_left_out():
    """Their layers are called as those of the text are, so whole names are needed."""
    model = get_forget_model(tiny_model("llava", sees=True))
    assert all("language_model" in n for n in adapted(model)) and len(adapted(model)) == 14
    model = get_forget_model(tiny_model("bart"))
    assert not any("encoder_attn" in n for n in adapted(model)) and {"q_proj", "fc1"} <= leaves(model)
