"""`get_forget_model`: exactly the adapter that was asked for, or a refusal."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig, PromptEncoderConfig
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_unlearn.errors import UserError
from peft_unlearn.folder.card import TAGS
from peft_unlearn.training.adapt import adapted, describe, get_forget_model, peft_config

IDS = torch.arange(3, 9)[None]


def test_default_is_lora_on_all_linear_layers(capsys):
    model = get_forget_model(tiny.llama(), quiet=False)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.task_type) == (16, 32, "CAUSAL_LM")
    leaves = {n.rpartition(".")[2] for n in adapted(model)}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(("lora_" in n) == p.requires_grad for n, p in model.named_parameters())
    out = capsys.readouterr()
    assert out.out == "" and "adapted: down_proj x2" in out.err and "trainable of" in describe(model)
    assert torch.equal(model(input_ids=IDS).logits, tiny.llama()(input_ids=IDS).logits)


def test_a_second_adapter_on_a_frozen_one():
    model = tiny.lora(tiny.llama())
    before = model.eval()(input_ids=IDS).logits
    got = get_forget_model(model, {"r": 2, "target_modules": ["q_proj"]}, adapter_name="second")
    assert set(TAGS) <= set(model.get_base_model().model_tags)
    assert got is model and list(model.base_model.active_adapters) == ["default", "second"]
    assert all((".second." in n) == p.requires_grad for n, p in model.named_parameters())
    assert torch.equal(model(input_ids=IDS).logits, before)
    with pytest.raises(UserError, match="already has an adapter 'second'"):
        get_forget_model(model, {"r": 2}, adapter_name="second")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "lorra"}, "no PEFT type. Did you mean 'lora'?"),
        ({"rank": 4}, "lora has no 'rank'"),
        ({"target_module": "q_proj"}, "Did you mean 'target_modules'?"),
        ({"type": "prompt_tuning"}, "prompt_tuning needs num_virtual_tokens"),
        ({"type": "p_tuning", "num_virtual_tokens": 4}, "soft prompts come from a network"),
        ({"type": "adalora", "total_step": 10}, "adalora is refused"),
        ({"target_modules": ["no_such"]}, "no_such"),
        ({"target_modules": ["q_proj"], "r": 0}, "should be a positive integer"),
        ({"bias": "all"}, "bias 'all' is refused"),
        ({"target_modules": ["q_proj"], "r": "many"}, "adapter"),
        ([1], "settings are a mapping"),
    ],
    ids=str,
)
def test_refusals(spec, message):
    with pytest.raises(UserError) as e:
        get_forget_model(tiny.llama(), peft_config(spec))
    assert message in str(e.value)


def test_config_objects_are_checked_too():
    with pytest.raises(UserError, match="soft prompts"):
        get_forget_model(tiny.llama(), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UserError, match="bias"):
        get_forget_model(tiny.llama(), LoraConfig(bias="lora_only"))


def test_fused_experts_are_not_adapted_by_accident():
    torch.manual_seed(0)
    base = OlmoeForCausalLM(
        OlmoeConfig(vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_experts=4, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    with pytest.raises(UserError, match="every expert and the router"):
        get_forget_model(base)


def test_moe_attention_can_be_adapted():
    torch.manual_seed(0)
    base = OlmoeForCausalLM(
        OlmoeConfig(vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                    num_experts=4, num_experts_per_tok=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip
    assert len(adapted(get_forget_model(base, {"r": 2, "target_modules": ["q_proj", "v_proj"]}))) == 2
