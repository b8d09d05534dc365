"""What a recipe would cost, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..folder.base import load_tokenizer
from ..gradients.vector import Space
from ..tuners.expert_lora.blocks import moe_blocks
from .adapt import adapted, get_forget_model
from .recipe import prepare


@dataclass
class Plan:
    """What a recipe would cost. Bytes; `activations` is an estimate, the others are counts."""

    base: str
    base_parameters: int
    trainable: int
    adapted: list[str]
    rows: dict[str, int]
    tokens_longest: dict[str, int]
    steps: int
    rows_per_step: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    host_copy_bytes: int = 0  # smoothing in space base: the weights under adapters, saved once in host memory

    @property
    def total_bytes(self) -> int:
        device = self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes
        return device + self.activation_bytes + self.host_copy_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan(recipe: Mapping[str, Any], out: str | Path = "out", base: str | None = None, data: str | None = None) -> Plan:
    """Trainable parameters, memory and steps of a recipe, from the base's configuration alone: no weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    run = prepare(recipe, out, base, data)
    config = AutoConfig.from_pretrained(str(run.base_dir))
    with torch.device("meta"):
        base_model = AutoModelForCausalLM.from_config(config)
        if run.auto is not None:  # which experts is for attribution to say; how many is known
            n = run.auto.get("top", run.auto.get("per_layer", 1))
            blocks = [k for k in moe_blocks(base_model) if k in run.auto.get("layers", [k])][
                : 1 if "top" in run.auto else None
            ]
            run.adapter = replace(run.adapter, experts={k: list(range(n)) for k in blocks})
        model = get_forget_model(base_model, run.adapter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tokenizer, c = load_tokenizer(run.base_dir), run.config
    needed = sorted({t.batch for t in c.term_list} | {c.anchor})
    rows = {s: run.data.encode(s, tokenizer, c.max_length, c.on_overflow) for s in needed}
    longest = {s: max(len(r["input_ids"]) for r in encoded) for s, encoded in rows.items()}
    per_step = c.train_batch_size * c.gradient_accumulation_steps * c.world_size
    steps = c.max_steps if c.max_steps > 0 else int(-(-len(rows[c.anchor]) // per_step) * c.num_train_epochs)
    width = 2 if c.bf16 else 4
    in_batch = {s: c.train_batch_size * (1 if s == c.anchor else c.per_anchor) * longest[s] for s in needed}
    vectors = len({t.gradient for t in c.term_list}) + 1
    return Plan(
        base=run.base,
        base_parameters=total - trainable,
        trainable=trainable,
        adapted=adapted(model),
        rows={s: len(r) for s, r in rows.items()},
        tokens_longest=longest,
        steps=steps,
        rows_per_step=per_step,
        base_bytes=(total - trainable) * width,
        adapter_bytes=4 * trainable,
        gradient_bytes=4 * trainable * vectors,
        optimizer_bytes=8 * trainable,
        activation_bytes=width * max(in_batch.values()) * activation_floats(config, c.activation_checkpointing),
        host_copy_bytes=width * sum(p.numel() for p in Space.under_adapters(model).params)
        if c.smoothing_space == "base"
        else 0,
    )


def activation_floats(config: Any, checkpointing: bool | None) -> int:
    """Floats that autograd keeps per token of one batch (estimate): inputs of norms, projections and the MLP of each block.

    Attention weights are not counted (sdpa keeps none); only one batch's graph lives at a time.
    """
    text = config.get_text_config()
    h, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * h
    heads = text.num_attention_heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * (getattr(text, "head_dim", None) or h // heads)
    block = int(1.1 * (6 * h + 2 * kv + 4 * inner))
    return h * layers + block if checkpointing else layers * block
