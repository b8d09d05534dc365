"""What a recipe would cost, before any weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..data.collate import IGNORE, share_of
from ..folder.base import load_tokenizer, on_meta
from ..gradients.vector import Space
from ..reporting.result import Result
from ..reporting.text import size
from ..tuners.expert_lora.blocks import moe_blocks
from .adapt import adapted, get_forget_model, leaves
from .recipe import Run, notes, prepare


@dataclass
class Plan(Result):
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
    notes: list[str]  # on the data, see `data.advice`
    samples: dict[str, str]  # the first row of each set as the model reads it, its targets between double brackets
    host_copy_bytes: int = 0  # smoothing in space base: the weights under adapters, saved once in host memory

    @property
    def total_bytes(self) -> int:
        device = self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes
        return device + self.activation_bytes + self.host_copy_bytes

    def remarks(self) -> list[str]:
        return self.notes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.base_parameters)
        rows = ", ".join(f"{s} {n:,} (longest {self.tokens_longest[s]} tokens)" for s, n in self.rows.items())
        copied = f"{size(self.host_copy_bytes)}: smoothing shifts the base's weights and puts them back"
        table = {
            "base": f"{self.base_parameters:,} parameters, never changed",
            "trained": f"{self.trainable:,} parameters ({share:.2f} % of the base) in {len(self.adapted)} modules",
            "adapted": leaves(self.adapted),
            "rows": rows,
            "run": f"{self.steps:,} steps of {self.rows_per_step:,} anchor rows",
            "base in memory": size(self.base_bytes),
            "adapter": size(self.adapter_bytes),
            "gradients": size(self.gradient_bytes),
            "optimizer": size(self.optimizer_bytes),
            "activations": f"about {size(self.activation_bytes)}",
            **({"host copy": copied} if self.host_copy_bytes else {}),
            "together": f"about {size(self.total_bytes)}",
        }
        rows_seen = [f"  a {s} row, [[targets]]: {text}" for s, text in self.samples.items()]
        return "\n".join([f"plan for {self.base}", *(f"  {k:<14}  {v}" for k, v in table.items()), *rows_seen])


def plan(recipe: Mapping[str, Any], out: str | Path = "out", base: str | None = None, data: str | None = None) -> Plan:
    """Trainable parameters, memory and steps of a recipe, from the base's configuration alone: no weights are read."""
    run = prepare(recipe, out, base, data)
    model, tokenizer, c = _empty_model(run), load_tokenizer(run.base_dir), run.config
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    rows = {s: run.data.encode(s, tokenizer, c.max_length, c.on_overflow) for s in c.sets}
    longest = {s: max(len(r["input_ids"]) for r in encoded) for s, encoded in rows.items()}
    shares = {s: 1 if s == c.anchor else share_of(c.per_anchor, s) for s in c.sets}
    in_batch = max(math.ceil(c.train_batch_size * shares[s]) * longest[s] for s in c.sets)
    under = Space.under_adapters(model).params if c.smoothing_space == "base" else []
    width = 2 if c.bf16 else 4
    return Plan(
        base=run.base,
        base_parameters=frozen,
        trainable=trainable,
        adapted=adapted(model),
        rows={s: len(r) for s, r in rows.items()},
        tokens_longest=longest,
        steps=c.steps_over(len(rows[c.anchor])),
        rows_per_step=c.rows_per_step,
        base_bytes=frozen * width,
        adapter_bytes=4 * trainable,
        gradient_bytes=4 * trainable * (len({t.gradient for t in c.term_list}) + 1),
        optimizer_bytes=8 * trainable,
        activation_bytes=width * in_batch * activation_floats(model.config, c.activation_checkpointing),
        notes=notes(run),
        samples={s: _marked(r[0], tokenizer) for s, r in rows.items()},
        host_copy_bytes=width * sum(p.numel() for p in under),
    )


def _marked(row: Mapping[str, list[int]], tokenizer: Any) -> str:
    """A row's text on one line, with double brackets around the tokens that are targets."""
    pieces = []
    for target, run in groupby(zip(row["input_ids"], row["labels"], strict=True), key=lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([i for i, _ in run])
        pieces.append(f"[[{text}]]" if target else text)
    return "".join(pieces).replace("\n", "\\n")


def _empty_model(run: Run) -> Any:
    """The adapted model without storage for its weights."""
    base = on_meta(run.base_dir)
    with torch.device("meta"):
        if run.auto is not None:  # attribution chooses which experts; how many is known
            n = run.auto.get("top", run.auto.get("per_layer", 1))
            blocks = [k for k in moe_blocks(base) if k in run.auto.get("layers", [k])]
            blocks = blocks[: 1 if "top" in run.auto else None]
            run.adapter = replace(run.adapter, experts={k: list(range(n)) for k in blocks})
        if run.selecting is not None:
            run.adapter = run.selecting.planned(base)
        return get_forget_model(base, run.adapter)


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
