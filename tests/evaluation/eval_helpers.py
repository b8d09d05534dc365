"""What the tests of this folder build by hand: rows and tiny random models."""

from __future__ import annotations

from typing import Any

import torch

CITIES = ["Paris", "Rome", "Oslo", "Bergen", "Lima", "Cairo", "Porto", "Turku"]


def qa(i: int, kind: str) -> dict[str, Any]:
    city = CITIES[i % len(CITIES)]
    return {
        "question": f"Where was {kind} person {i} born?",
        "answer": f"{kind} person {i} was born in {city}.",
        "value": city,
        "paraphrased_answer": f"The birthplace is {city}.",
        "perturbed_answer": [f"The birthplace is {c}." for c in CITIES if c != city][:3],
    }


def tiny(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():  # far enough from uniform that arg-max and probabilities differ between rows
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else None
    return model


def byte_tokenizer() -> Any:
    """Byte-level, no merges: every text can be told, nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
