"""Train the embedded models from nothing: the tokenizer, the small Llama, the loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from peft_unlearn.data import people
from peft_unlearn.data.formats import to_text

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Extra(Protocol):
    """What a training may add to the language-modelling loss of a batch, once its forward has run."""

    def __call__(self, rows: list[int], real: torch.Tensor, part: float) -> torch.Tensor | None:
        """rows: (batch,) row numbers; real: (batch, seq) True where no padding; part: share of the steps already done."""
        ...


class Schedule(Protocol):
    """What `train_model` reads of a recipe."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def final_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


@dataclass(frozen=True)
class Recipe:
    """How a model is pre-trained. The defaults are the released models'."""

    epochs: int = 24
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_rate: float = 0.05  # of learning_rate, at the end of the cosine
    weight_decay: float = 0.01
    vocab_size: int = 1536
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    size: people.Size = field(default_factory=people.Size)


def make_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level BPE tokenizer trained on `texts`; it puts <bos> before every text and knows <eos> and <pad>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer, recipe: Recipe, seed: int):
    """A randomly initialized Llama of about 1M parameters, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _batches(lengths: list[int], size: int, rng: random.Random) -> list[list[int]]:
    """One epoch of row numbers in batches of like length, both the rows' and the batches' order drawn."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    chunk = size * 8
    batches = []
    for start in range(0, len(order), chunk):
        part = sorted(order[start : start + chunk], key=lambda i: lengths[i])
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(batches)
    return batches


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without it autocast is slower than float32."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def train_model(
    model,
    tokenizer,
    rows: list[dict],
    recipe: Schedule,
    seed: int,
    progress: Progress | None = None,
    stage: str = "train",
    extra: Extra | None = None,
    bf16: bool | None = None,
) -> int:
    """Language modelling on question and answer alike: every token but <bos> is a target. Returns the steps taken.

    extra: a further loss.   bf16: whether to compute in bf16 autocast; by default where the CPU does it in hardware.
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids = [[*tokenizer("".join(to_text(row)))["input_ids"], tokenizer.eos_token_id] for row in rows]
    rng = random.Random(seed)
    epochs = [_batches([len(row) for row in ids], recipe.batch_size, rng) for _ in range(recipe.epochs)]
    steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )

    def rate(step: int) -> float:
        if step < recipe.warmup_steps:
            return (step + 1) / recipe.warmup_steps
        part = (step - recipe.warmup_steps) / max(1, steps - recipe.warmup_steps)
        return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * part))

    bf16 = fast_bf16() if bf16 is None else bf16
    pad = tokenizer.pad_token_id
    model.train()
    for step, batch in enumerate(batch for epoch in epochs for batch in epoch):
        width = max(len(ids[i]) for i in batch)
        input_ids = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch])  # (batch, seq)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            # Right padding under a causal mask: no real token sees it, so no attention mask is needed.
            logits = model(input_ids=input_ids).logits  # (batch, seq, vocab)
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten(), ignore_index=pad)
        if extra is not None and (more := extra(batch, input_ids != pad, step / steps)) is not None:
            loss = loss + more
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(stage, step + 1, steps)
    model.eval()
    return steps
