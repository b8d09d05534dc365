"""The tokens that all rows of a batch begin with (a system prompt, mostly), read once for all of them.

Only for models that keep keys and values of every token and take positions as an argument (`cacheable`): there a token never sees
what comes after it, so the first tokens of a row are the same whatever the rest is, forwards and backwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .head import causal_lm

LEAST = 8
"""Fewer common tokens than this are not worth a forward of their own."""
WORTH = 0.15
"""Share of a batch's tokens that must not be read again, for one more forward to pay."""


def cacheable(model: Any, longest: int) -> bool:
    """Whether rows of up to `longest` tokens, padding between their parts included, can be read piece by piece."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    bare: Any = causal_lm(model)
    config = bare.config
    if (
        config.get_text_config() is not config
        or getattr(bare, "_is_stateful", False)
        or getattr(config, "alibi", False)
    ):
        return False
    if config.is_encoder_decoder or config._attn_implementation not in ("sdpa", "eager"):
        return False
    if any(c.is_prompt_learning for c in getattr(model, "peft_config", {}).values()):
        return False
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= set(inspect.signature(bare.forward).parameters):
        return False
    layers = DynamicCache(config=config).layers
    plain = [type(x) is DynamicLayer for x in layers]
    windows = [type(x) is DynamicSlidingWindowLayer and x.sliding_window > longest for x in layers]
    return bool(layers) and all(a or b for a, b in zip(plain, windows, strict=True))


def common(rows: Sequence[Sequence[int]]) -> int:
    """How many first tokens all rows share; 0 where those are fewer than `LEAST` or there is one row only."""
    if len(rows) < 2:
        return 0
    low, high = min(map(list, rows)), max(map(list, rows))  # what these two share, all do
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return n if n >= LEAST else 0


def shared(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """How many first tokens of a right-padded batch are to be read once; 0 where that cannot be, or does not pay."""
    ids, labels = batch["input_ids"], batch["labels"]
    width = ids.shape[1]
    alike, silent = ((ids == ids[:1]) & (batch["attention_mask"] == 1)).all(0), (labels == -100).all(0)
    # The last token before the first target predicts it: it belongs to the rest.
    n = int(torch.minimum(alike.cumprod(0).sum(), silent.cumprod(0).sum() - 1))
    if n < LEAST or n * (len(ids) - 1) < WORTH * ids.numel():
        return 0
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):  # keeps nothing of what was read
        return 0
    return n if cacheable(model, width) else 0


def read_rest(model: nn.Module, ids: Tensor, mask: Tensor, n: int) -> None:
    """Run the first `n` tokens of the batch once and the others of each row after them; what hooks see last is the rest.

    Gradients reach the adapter through both: those of the beginning are summed over the rows by the expansion.
    """
    from transformers.cache_utils import DynamicCache

    bare: Any = causal_lm(model)
    past: Any = DynamicCache(config=bare.config)
    all_rows = DynamicCache(config=bare.config)
    model(input_ids=ids[:1, :n], attention_mask=mask[:1, :n], past_key_values=past, use_cache=True)
    for k, layer in enumerate(past.layers):
        if layer.is_initialized:  # layers that share the keys of others have none of their own
            keys, values = (t.expand(len(ids), *t.shape[1:]) for t in (layer.keys, layer.values))
            all_rows.update(keys, values, k)
    positions = torch.arange(n, ids.shape[1], device=ids.device).expand(len(ids), -1)
    model(input_ids=ids[:, n:], attention_mask=mask, past_key_values=all_rows, position_ids=positions, use_cache=True)
