"""Names in memory and on disk differ by family (fused experts, prefixes); the verdict must not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint, digest_live

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "GPTNeoX": {},
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_same_and_changed_in_every_layout(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path)
    for adapt in (False, True):
        model = load_base(tmp_path)
        plain = dict(model.named_parameters())
        if adapt:
            target = "query_key_value" if family == "GPTNeoX" else "q_proj"
            model = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
        got = digest_live(model, tmp_path)
        assert (got.verdict, got.digest) == ("same", digest_checkpoint(tmp_path)), got.reason
        # One value of the largest tensor of the last block: an expert's, where there are experts.
        block = {n: p for n, p in plain.items() if ".layers.1." in n}
        weight = max(block.values(), key=lambda p: p.numel())
        weight.data.view(-1)[-1] += 1
        changed = digest_live(model, tmp_path)
        assert changed.verdict == "changed" and len(changed.changed) == 1 and ".layers.1." in changed.changed[0]


def test_old_gpt2_files_without_prefix_and_with_unused_masks(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(str(path)).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(4)}, str(path), metadata={"format": "pt"})
    model = load_base(tmp_path)
    assert digest_live(model, tmp_path).digest == digest_checkpoint(tmp_path)
    model.transformer.h[1].attn.c_attn.weight.data[0, 0] += 1
    assert digest_live(model, tmp_path).changed == ["h.1.attn.c_attn.weight"]
