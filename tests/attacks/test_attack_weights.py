"""Weights are opened for an attack with the adapter in them, and every bit comes back."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from eval_helpers import tiny as llama
from peft import LoraConfig, get_peft_model

from peft_unlearn.attacks import weights
from peft_unlearn.attacks.weights import base_parameters, linears, opened, restored
from peft_unlearn.folder.digest import digest_live

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])


def lora(model: Any, **over: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **over}
    model = get_peft_model(model, LoraConfig(**config)).eval()
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)
        p.requires_grad_(False)
    return model


def moe(kind: str, **over: Any) -> Any:
    """A tiny mixture of experts under an adapter of our own type, or of stock target_parameters."""
    base = families.base("olmoe", **over)
    if kind == "stock":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return lora(base, target_modules=[], target_parameters=names)
    from peft_unlearn.tuners.expert_lora import ExpertLoraConfig

    config = ExpertLoraConfig(r=2, lora_alpha=4, experts={1: [0, 3], 2: [1]}, init_weights=False)
    model = get_peft_model(base, config).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return model


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def say(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


MERGED = {
    "lora": lambda: lora(llama()),
    "two of lora's targets": lambda: lora(llama(), target_modules=["q_proj", "down_proj"]),
    "experts": lambda: moe("own"),
    "experts by target_parameters": lambda: moe("stock"),
}
LIVE = {
    "dora": lambda: lora(llama(), use_dora=True),
    "a fully trained module": lambda: lora(llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", [*MERGED, *LIVE])
def test_the_same_model_inside_and_the_same_bits_after(kind):
    model = {**MERGED, **LIVE}[kind]()
    before, spoken = bits(model), say(model)
    flags = [p.requires_grad for p in model.parameters()]
    with opened(model, base_parameters(model)) as adapter:
        assert adapter == ("merged" if kind in MERGED else "live")
        assert torch.allclose(say(model), spoken, atol=1e-4)
        assert same(bits(model), before) is (kind in LIVE)
        with torch.no_grad():
            for p in base_parameters(model).values():
                p.add_(1.0)
                p.requires_grad_(True)
    assert same(bits(model), before) and torch.equal(say(model), spoken)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(getattr(m, "merged_adapters", None) for m in model.modules())


def test_a_tied_and_adapted_weight_stays_live():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = lora(LlamaForCausalLM(config).eval(), target_modules=["embed_tokens", "q_proj"])
    spoken = say(model)
    with opened(model, base_parameters(model)) as adapter:
        assert adapter == "live" and torch.allclose(say(model), spoken, atol=1e-5)


def test_off_stays_off_and_a_plain_model_has_none():
    model = lora(llama())
    with model.disable_adapter():
        spoken = say(model)
        with opened(model, base_parameters(model)) as adapter:
            assert adapter == "off" and torch.equal(say(model), spoken)
    plain = llama()
    with opened(plain, base_parameters(plain)) as adapter:
        assert adapter == "none"


def test_bits_come_back_after_an_error():
    model = lora(llama())
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), opened(model, base_parameters(model)):
        next(iter(base_parameters(model).values())).data.fill_(7.0)
        raise KeyboardInterrupt
    assert same(bits(model), before)
    assert not any(getattr(m, "merged_adapters", None) for m in model.modules())


def test_a_merge_that_fails_half_way_leaves_nothing(monkeypatch):
    model = lora(llama())
    last = [m for m in model.modules() if hasattr(m, "lora_A")][-1]
    monkeypatch.setattr(type(last), "merge", _failing(type(last).merge, last))
    before, spoken = bits(model), say(model)
    with opened(model, base_parameters(model)) as adapter:
        assert adapter == "live" and same(bits(model), before) and torch.equal(say(model), spoken)


def _failing(merge: Any, at: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        if self is at:
            raise ValueError("cannot")
        merge(self, *args, **kwargs)

    return wrapped


def test_a_large_base_comes_back_from_its_files(tmp_path, monkeypatch):
    """Beyond KEEP_BYTES only what differs from the files is copied; proved by the digest of the files."""
    llama().bfloat16().save_pretrained(tmp_path)
    from peft_unlearn.folder.base import load_base

    model = lora(load_base(tmp_path))
    odd = "model.layers.0.mlp.up_proj.weight"
    base_parameters(model)[odd].data[0, 0] += 1.0  # as a base that is not what its files say
    before = bits(model)
    copied: list[tuple[int, ...]] = []
    to = torch.Tensor.to
    monkeypatch.setattr(weights, "KEEP_BYTES", 0)
    monkeypatch.setattr(torch.Tensor, "to", _noting(to, copied))
    with restored(base_parameters(model), tmp_path):
        monkeypatch.setattr(torch.Tensor, "to", to)
        assert copied == [(48, 32)]
        for p in base_parameters(model).values():
            p.data.fill_(3.0)
    assert same(bits(model), before)
    base_parameters(model)[odd].data[0, 0] -= 1.0
    with opened(model, base_parameters(model), tmp_path):
        for p in base_parameters(model).values():
            p.data.mul_(2.0)
        assert digest_live(model, tmp_path).verdict == "changed"
    assert digest_live(model, tmp_path).verdict == "same"


def _noting(to: Any, copied: list[tuple[int, ...]]) -> Any:
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("copy"):
            copied.append(tuple(self.shape))
        return to(self, *args, **kwargs)

    return wrapped


# --- which weights a quantizer takes ----------------------------------------------------------------------------------


def test_linears_of_a_dense_model_under_an_adapter():
    found = linears(lora(llama()))
    assert len(found) == 14 and not any(w.transposed for w in found)
    assert {w.name.split(".")[-2] for w in found} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama4_text"])
def test_matrices_are_views_that_compute_what_the_experts_compute(family):
    """Scaling one output row of one expert's matrix to zero is seen in the weight, at the right place."""
    model = families.base(family)
    fused = [w for w in linears(model) if w.weight.ndim == 3]
    assert {w.name.rpartition(".")[2] for w in fused} == {"gate_up_proj", "down_proj"}
    down = next(w for w in fused if w.name.endswith("down_proj"))
    hidden = model.config.get_text_config().hidden_size
    for matrix in down.matrices():
        assert matrix.shape[0] == hidden  # (out, in)
    with torch.no_grad():
        list(down.matrices())[2][5].zero_()
    weight = down.weight.detach()
    assert not (weight[2][:, 5] if down.transposed else weight[2][5]).any()


def test_linears_of_gpt2_lie_the_other_way():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    found = linears(model)
    assert len(found) == 4 and all(w.transposed for w in found)
    attention = next(w for w in found if w.name.endswith("c_attn.weight"))
    assert next(attention.matrices()).shape == (96, 32)
