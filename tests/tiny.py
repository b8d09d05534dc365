"""Tiny models, a tiny tokenizer and tiny data for tests of training."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
"""Of a small model of any family, for `AutoConfig.for_model`."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the test words, with bos, eos and pad."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator([f"Question: {' '.join(WORDS)}\nAnswer: {' '.join(WORDS)}"], trainer)
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    from tokenizers import decoders

    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def llama(seed: int = 0, **over: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**shape, **over})).eval()


def lora(model: Any, moved: bool = True, seed: int = 1, **over: Any) -> Any:
    """`model` with a LoRA adapter; `moved` makes B non-zero, so that every factor has a gradient."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **over})
    model = get_peft_model(model, config)
    if moved:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_(std=0.05)
    return model


def rows(n: int, tag: str, seed: int = 0) -> list[dict[str, str]]:
    """n question/answer rows of unequal lengths, disjoint between tags."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        k = int(torch.randint(1, 7, (1,), generator=g))
        words = [WORDS[int(j)] for j in torch.randint(0, len(WORDS), (k,), generator=g)]
        out.append({"question": f"{tag} {i} {words[0]}?", "answer": " ".join(words)})
    return out
