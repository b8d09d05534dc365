"""One tiny randomly initialised model of any causal family of transformers, vision-language wrappers included."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

# What the families call the same few sizes; of these each config takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "sliding_window": 16,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "lru_width": 32, "embedding_size": 32, "embed_dim": 32,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "d_ff": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 4,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "image_size": 28, "patch_size": 14, "out_hidden_size": 32, "projection_dim": 32, "vision_output_dim": 32,
    "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8, "global_head_dim": 8, "num_kv_shared_layers": 0,
}  # fmt: skip
_MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
}
OWN: dict[str, dict[str, Any]] = {  # what else a family needs
    "qwen2_vl": _MROPE, "qwen2_5_vl": _MROPE,
    "paligemma": {"text_config": {"use_bidirectional_attention": False}},
}  # fmt: skip


def tiny_config(kind: str, **over: Any) -> Any:
    """The configuration of family `kind` with `SIZES`, in its parts as well, and with `over`."""
    cls, over = CONFIG_MAPPING[kind], {**OWN.get(kind, {}), **over}
    have = cls()
    given: dict[str, Any] = {k: v for k, v in SIZES.items() if _settable(have, k)}
    if "kv_lora_rank" in given and "num_key_value_heads" in given:  # latent attention has a key for every head
        given["num_key_value_heads"] = given["num_attention_heads"]
    for name in getattr(cls, "sub_configs", None) or {}:
        part = getattr(have, name, None)
        if part is not None:
            given[name] = tiny_config(part.model_type, **over.pop(name, {})).to_dict()
    return cls(**{**given, **over})


def _settable(config: Any, name: str) -> bool:
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        return getattr(config, name, None) is not None
    except Exception:  # Gemma 4: a value for every layer
        return True


def tiny_model(kind: str, sees: bool = False, seed: int = 0, **over: Any) -> Any:
    """sees: the class around it that takes images as well."""
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model = auto.from_config(tiny_config(kind, **over), dtype=torch.float32).eval()
    with torch.no_grad():  # gates that start at nothing would let no gradient through
        for p in model.parameters():
            if p.dim() > 1 and not p.any():
                p.normal_(std=0.1)
    return model
