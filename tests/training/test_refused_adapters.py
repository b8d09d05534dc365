"""Adapters and bases that would be trained untruthfully are refused before the first step, by what they do."""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from peft_unlearn import UnlearnConfig
from peft_unlearn.errors import Errors, UserError
from peft_unlearn.training import adapt
from peft_unlearn.training.adapt import check_causal, get_forget_model

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "eva"])
def test_starts_that_rewrite_the_base_are_refused_by_name(start):
    with pytest.raises(UserError, match=f"init_lora_weights='{start}.*no longer"):
        get_forget_model(tiny.llama(), {"init_lora_weights": start})


def test_whatever_rewrites_the_base_is_found_even_where_no_list_knows_it(monkeypatch):
    monkeypatch.setattr(adapt, "changes_base", lambda config: None)
    with pytest.raises(UserError, match=r"changed .* of the base's own tensors"):
        get_forget_model(tiny.llama(), {"init_lora_weights": "olora"})
    get_forget_model(tiny.llama(), {"init_lora_weights": "gaussian"})


@pytest.mark.parametrize(
    "spec, wanted",
    [
        ({"target_modules": ["q_proj", "vproj"]}, r"no module is called 'vproj'\. Did you mean 'v_proj'"),
        ({"exclude_modules": ["lm_haed"]}, r"no module is called 'lm_haed'\. Did you mean 'lm_head'"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 70]},
            r"there is no block 70: the base has blocks 0 to",
        ),
        ({"rank_pattern": {"^q_proj": 8}}, r"rank_pattern: '\^q_proj' matches no module\. Did you mean 'q_proj'"),
        ({"alpha_pattern": {"layers.99.self_attn.q_proj": 64}}, "alpha_pattern: .* matches no module"),
        ({"alpha_pattern": {"(": 64}}, "alpha_pattern: .* matches no module"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_nearest_name(spec, wanted):
    with pytest.raises(UserError, match=wanted):
        get_forget_model(tiny.llama(), {"r": 4, **spec})


def test_all_linear_in_some_layers():
    model = get_forget_model(tiny.llama(), {"r": 2, "layers_to_transform": [1]})
    on = model.base_model.targeted_module_names
    assert on and all(".1." in n for n in on) and {"q_proj", "down_proj"} <= {n.rpartition(".")[2] for n in on}


def test_a_base_that_is_not_causal_is_refused():
    torch.manual_seed(0)
    bert = BertLMHeadModel(BertConfig(**SMALL)).eval()
    with pytest.raises(UserError, match="is not causal"):
        get_forget_model(bert, LoraConfig(r=2, target_modules=["query"], task_type="CAUSAL_LM"))
    bert = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).eval()
    check_causal(bert)
    check_causal(tiny.llama().to(torch.bfloat16))


def test_an_encoder_decoder_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="encoder-decoder"):
        get_forget_model(t5, LoraConfig(r=2, target_modules=["q"]))


def test_noise_on_embeddings_is_refused(tmp_path):
    with pytest.raises(UserError, match="neftune_noise_alpha is refused"):
        UnlearnConfig(str(tmp_path), neftune_noise_alpha=5)


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    config, errors = UnlearnConfig(str(tmp_path)), Errors()
    monkeypatch.setenv("WORLD_SIZE", "2")
    config._check_world(errors)
    assert "2 processes were started and this one trains as 1" in errors.messages[0]


def test_without_an_accelerator_the_cpu_is_taken_and_bf16_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *a, **k: False)
    assert UnlearnConfig(str(tmp_path), bf16=True).use_cpu
