"""Ten tiny mixture-of-experts models, random weights, and the dense weights that an expert adapter stands for."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from peft_unlearn.folder.read import AdapterFolder
from peft_unlearn.tuners.expert_lora import ExpertLoraConfig, moe_blocks
from peft_unlearn.tuners.expert_lora.blocks import is_transposed
from peft_unlearn.tuners.expert_lora.export import fill, read_stock
from peft_unlearn.tuners.peft_type import PREFIX

logging.set_verbosity_error()

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
MLA: dict[str, Any] = {
    "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v2": dict(MLA),
    "deepseek_v3": dict(MLA, norm_topk_prob=True, n_group=2, topk_group=1),
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 32},
    "granitemoe": {"num_local_experts": 8},
    "phimoe": {"num_local_experts": 8},
    "llama4_text": {"num_local_experts": 8, "intermediate_size_mlp": 24, "head_dim": 8, "interleave_moe_layer_step": 1,
                        "num_experts_per_tok": 1, "attention_chunk_size": 32},
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def base(family: str, implementation: str = "eager", seed: int = 0, **over: Any) -> Any:
    """A model with weights large enough that experts, routers and biases all matter."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **over})
    kind = {} if family == "llama4_text" else {"experts_implementation": implementation}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **kind).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and "bias" not in name and "sinks" not in name:
                continue  # norms
            router = name.endswith(("gate.weight", "router.weight"))
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 if router else 0.15))
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
    return model


def batch(rows: int = 3, length: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 64, (rows, length), generator=g)}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> torch.Tensor:
    return model(**(inputs or batch()), **kwargs).logits


def config(experts: dict[int, list[int]] | None = None, **over: Any) -> ExpertLoraConfig:
    given: dict[str, Any] = {
        "experts": experts or {1: [2, 5], 2: [0]},
        "r": 4,
        "lora_alpha": 6,
        "task_type": "CAUSAL_LM",
        "train_router": "none",
    }
    return ExpertLoraConfig(**{**given, **over})  # type: ignore[arg-type]


def adapted(model: Any, name: str = "default", seed: int = 3, **over: Any) -> Any:
    """`model` (or the PeftModel it already is) with an expert adapter whose every factor is non-zero."""
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config(**over))
    else:
        model = get_peft_model(model, config(**over), adapter_name=name)
    move(model, name, seed)
    return model.eval()


@torch.no_grad()
def move(model: Any, name: str = "default", seed: int = 3, std: float = 0.15) -> None:
    g = torch.Generator().manual_seed(seed)
    for n, p in model.named_parameters():
        if PREFIX in n and n.endswith(f".{name}"):
            p.copy_(torch.randn(p.shape, generator=g) * std)


@torch.no_grad()
def dense(plain: Any, model: Any, *names: str) -> Any:
    """A copy of `plain` with the adapters' deltas written into its weights: worked out here, from the tensors alone."""
    out = copy.deepcopy(plain)
    tensors = dict(model.named_parameters())
    blocks = moe_blocks(plain)
    for name in names or ("default",):
        cfg = model.peft_config[name]
        for layer, ids in cfg.chosen.items():
            block = blocks[layer]
            lead = f"base_model.model.{block.experts}.{PREFIX}"
            experts = out.get_submodule(block.experts)
            for j, e in enumerate(ids):
                for p in ("gate_up", "down"):
                    a, b = (tensors[f"{lead}{p}_{f}.{name}"][j].double() for f in "AB")
                    d = b @ a * (cfg.lora_alpha / cfg.r)
                    w = getattr(experts, f"{p}_proj")[e]
                    w += (d.T if is_transposed(experts) else d).to(w.dtype)
            lead = f"base_model.model.{block.router}.{PREFIX}router_"
            w = out.get_submodule(str(block.router)).weight
            if cfg.train_router == "full":
                w += tensors[f"{lead}delta.{name}"]
            elif cfg.train_router == "lora":
                w += tensors[f"{lead}B.{name}"] @ tensors[f"{lead}A.{name}"] * (cfg.lora_alpha / cfg.router_r)
    return out


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def quietly(fn: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def import_stock(folder: Path, base: Any, name: str = "default") -> Any:
    """`base` with the compact form of the stock adapter in `folder`."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found, values = read_stock(AdapterFolder(folder, None, {}, config, None), base)  # type: ignore[arg-type]
    model = get_peft_model(base, found, adapter_name=name)
    fill(model, name, values)
    return model
