"""A tiny random Llama in bf16 on disk, a forget adapter with random factors for it, and a manifest true of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_unlearn.folder.base import base_reference, load_base
from peft_unlearn.folder.digest import digest_checkpoint, targeted_names
from peft_unlearn.folder.manifest import Manifest, probes
from peft_unlearn.folder.write import write_adapter

RECIPE: dict[str, Any] = {
    "base": "embedded:people",
    "terms": {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {"weight": 5}}},
    "train": {"learning_rate": 1e-3, "max_steps": 3},
    "seed": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    text = "<unk> <s> </s> The Question : What is the capital of France ? Answer Once upon a time 1 2 3 4"
    words = {word: i for i, word in enumerate(text.split(" "))}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_base(
    path: Path, seed: int = 0, tie: bool = False, shard: str = "5GB", dtype: torch.dtype = torch.bfloat16
) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(str(path), max_shard_size=shard)
    tokenizer().save_pretrained(str(path))
    return path


def adapted(base_dir: Path, seed: int = 1, size: float = 0.05, r: int = 4, name: str = "default") -> Any:
    """A PeftModel (float32, evaluation mode) with random LoRA factors, those of B of standard deviation `size`."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base_dir), config, adapter_name=name)
    randomize(model, seed, size)
    return model.eval()


def randomize(model: Any, seed: int, size: float = 0.05) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=rng) * (size if "lora_B" in n else 0.25))


def manifest_for(model: Any, base_dir: Path, **more: Any) -> Manifest:
    digest = digest_checkpoint(base_dir)
    ref = base_reference(str(base_dir), base_dir, digest, digest_checkpoint(base_dir, targeted_names(model)))
    return Manifest(
        base=ref,
        method={"terms": RECIPE["terms"], "rule": {"sum": {}}},
        data={"forget": {"sha256": "a" * 64, "n": 100, "ref": "embedded:people?seed=0"}},
        seeds={"seed": 0},
        versions={"torch": torch.__version__},
        probes=probes(model, tokenizer()),
        **more,
    )


def write(out: Path, base_dir: Path, seed: int = 1, size: float = 0.05, **more: Any) -> Any:
    """Write a complete adapter folder and return what was read back."""
    model = adapted(base_dir, seed, size)
    return write_adapter(out, model, manifest_for(model, base_dir, **more), RECIPE, tokenizer=tokenizer())


IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits
