"""The beginning that all rows share, read once: same values and gradients, fewer tokens; left alone where it would not be exact."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_unlearn.forward import Pass, Reference
from peft_unlearn.prefix import shared

FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "gemma3_text": ({"sliding_window": 40}, True),
    "gemma2": ({"sliding_window": 12}, False),  # the rows are longer than the window
    "gpt2": ({"n_positions": 24, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, True),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 96}, True),
    "mamba": ({"state_size": 4}, False),  # a state, not tokens
}


def made(family: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**tiny.SHAPE, **FAMILIES[family][0]})
    eager: dict[str, Any] = {"experts_implementation": "eager"} if "moe" in family or "oss" in family else {}
    model: Any = AutoModelForCausalLM.from_config(config, **eager)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.ndim > 1 and "sinks" not in n and family != "mamba":
                p.copy_(torch.randn(p.shape) * 0.3)
    targets = {"gpt2": ["c_attn"], "mamba": ["in_proj"]}.get(family, ["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    )
    return model.double()


def rows(first: int = 12) -> dict[str, torch.Tensor]:
    """Four rows of 14 to 20 tokens that begin alike; the targets begin 1 to 5 tokens after what they share."""
    g = torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(4, 20, dtype=torch.long), torch.zeros(4, 20, dtype=torch.long)
    labels = torch.full((4, 20), -100)
    for i, n in enumerate((20, 14, 17, 16)):
        ids[i, :n] = torch.cat([torch.arange(5, 5 + first), torch.randint(20, 60, (n - first,), generator=g)])
        mask[i, :n] = 1
        labels[i, first + 1 + i % 2 : n] = ids[i, first + 1 + i % 2 : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read(model: Any, batch: dict[str, torch.Tensor], share: bool) -> tuple[torch.Tensor, torch.Tensor, list[Any], int]:
    """(log-probabilities, the reference's, gradients, tokens that went through the model with gradient)"""
    tokens = 0

    def count(m: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        n = kwargs["input_ids"].numel()
        tokens += n * (torch.is_grad_enabled() and n > 1)  # one token: the head is looked at

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    p = Pass(model, batch, reference=Reference("base"), share=share)
    values = p.logp
    trained = [q for q in model.parameters() if q.requires_grad]
    gradients = torch.autograd.grad((values * torch.arange(1, len(values) + 1)).sum(), trained)
    ref = p.ref_logp
    handle.remove()
    return values.detach(), ref, list(gradients), tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_same(family: str) -> None:
    model, batch = made(family), rows()
    plain, shares = read(model, batch, False), read(model, batch, True)
    assert (plain[3], shares[3]) == (80, 12 + 4 * 8 if FAMILIES[family][1] else 80)
    torch.testing.assert_close(shares[0], plain[0], atol=1e-6, rtol=1e-6)  # logits are float32
    torch.testing.assert_close(shares[1], plain[1], atol=1e-6, rtol=1e-6)
    assert any(g.abs().max() > 0.1 for g in plain[2])
    for a, b in zip(shares[2], plain[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_where_it_pays_and_may() -> None:
    model = made("llama")
    assert shared(model, rows()) == 12
    assert shared(model, rows(first=7)) == 0  # too few to be worth a forward
    assert shared(model, {k: v[:1] for k, v in rows().items()}) == 0
    early = rows()
    early["labels"][2, 10:] = early["input_ids"][2, 10:]  # token 9 predicts the first target
    assert shared(model, early) == 9
    masked = rows()
    masked["attention_mask"][3, :4] = 0  # padded on the left
    assert shared(model, masked) == 0
    model.get_base_model().gradient_checkpointing_enable()
    assert shared(model, rows()) == 0


def test_rows_drop_for_themselves() -> None:
    model = made("llama", dropout=0.5).train()
    assert read(model, rows(), True)[3] == 80
    assert read(model.eval(), rows(), True)[3] == 44


def test_hidden_states_are_of_whole_rows() -> None:
    model, batch = made("llama"), rows()
    assert Pass(model, batch, layers=[0], share=True).hidden(0).shape == (4, 20, 32)
