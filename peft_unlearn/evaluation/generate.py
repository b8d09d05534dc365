"""Answers of a model, many at a time. Besides `Pass` this is the one place that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..data.collate import prompt_ids
from ..errors import UserError
from .teacher import evaluating, pad_id_of


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """The base's own generation_config (repetition penalties, forced and suppressed tokens, sampling) out of the way but for its
    special tokens: greedy is the arg-max at every position, as teacher forcing sees it, and sampling is what was asked for."""
    from transformers import GenerationConfig

    bare = getattr(model, "get_base_model", lambda: model)()
    own = getattr(bare, "generation_config", None)
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    bare.generation_config = GenerationConfig(**{k: getattr(own, k, None) for k in special})
    try:
        yield
    finally:
        bare.generation_config = own


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's EOS and the model's own (chat models have several)."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ids = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def bare_ids(prompt: str, model: Any, tokenizer: Any) -> list[int]:
    """Tokens of a prompt as generation starts from it, without the EOS that some tokenizers close every text with."""
    ids = prompt_ids(prompt, tokenizer)
    return ids[:-1] if ids and ids[-1] in end_ids(model, tokenizer) else ids


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings, without blanks around it; blanks before a stop string count."""
    ends = [k for mark in stop if (k := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def new_ids(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """One batch of continuations: the new token ids of each prompt, cut before its first end-of-sequence token.

    settings: of `generate` (sampling, logits processors). The model is in evaluation mode already.
    """
    import torch

    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    device, width = model.get_input_embeddings().weight.device, max(map(len, prompts))
    # Padded by hand: the side is then a fact of this function and the tokenizer is never touched.
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)  # (batch, width)
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    plain = {"do_sample": False, "temperature": None, "num_beams": 1, "top_p": None, "top_k": None, "use_cache": True}
    with torch.no_grad(), plain_generation(model):
        out = model.generate(
            input_ids=ids, attention_mask=real, max_new_tokens=max_new_tokens, pad_token_id=pad,
            eos_token_id=sorted(ends) or None, **{**plain, **settings},
        )  # fmt: skip
    new = out[:, width:].tolist()
    return [row[: next((k for k, token in enumerate(row) if token in ends), len(row))] for row in new]


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    done: Callable[[int, str], bool] | None = None,
    **settings: Any,
) -> list[str]:
    """The most probable continuation of every prompt, token by token; in the order of `prompts`, without prompt, special tokens and
    blanks around it.

    Args:
        model: any causal language model, PEFT-wrapped or not, on the device where it shall run; its train/eval mode and the
            tokenizer's padding side are as before afterwards, also after an error.
        prompts: texts as `data.formats.to_text` makes them; the tokenizer adds its own BOS.
        max_new_tokens: longest answer, in tokens; it also ends at any of the model's end-of-sequence tokens.
        batch_size: prompts per generate call; prompts of like length go together, so little is padding.
        progress: called as progress(done, total) after every batch.
        done: (number of a prompt, its answer so far) -> whether more of it is not wanted; not asked where `settings` are given.
        settings: other settings of ``model.generate``, e.g. for sampling.
    """
    import torch

    from .cache import Wanted, cacheable, starts

    ids = [bare_ids(prompt, model, tokenizer) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)

    def told(new: list[int]) -> str:
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    def wanted(i: int) -> Wanted:
        return Wanted(max_new_tokens, lambda new: done is not None and done(i, told(new)))

    longest = 2 * max(map(len, ids), default=0) + max_new_tokens
    with torch.no_grad(), evaluating(model):
        cached = not settings and all(ids) and max_new_tokens > 0 and cacheable(model, longest)
        begin = starts(model, ids, pad_id_of(tokenizer), end_ids(model, tokenizer)) if cached else None
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            if begin is None:
                new = new_ids(model, tokenizer, [ids[i] for i in batch], max_new_tokens, **settings)
            else:
                new = begin(batch, [wanted(i) for i in batch])
            for i, row in zip(batch, new, strict=True):
                answers[i] = told(row)
            if progress is not None:
                progress(start + len(batch), len(order))
    return answers


def other_answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], seed: int = 0, tries: int = 8
) -> list[str]:
    """For every prompt an answer of the model's own that is not `answers`: the winners of AltPO.

    Sampled, hotter at every try (temperature 1, 1.25, ..), since a model that knows the answer well keeps giving it. The published
    method asks an instruction-tuned model for an alternative instead; write such answers into the rows' field ``alternate`` to use them.

    Raises:
        UserError: rows for which the model gave nothing else in `tries` tries.
    """
    import torch

    left, found = list(range(len(prompts))), [""] * len(prompts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for k in range(tries):
            sampling = {"do_sample": True, "temperature": 1.0 + 0.25 * k}
            given = greedy(model, tokenizer, [prompts[i] for i in left], 48, **sampling)
            for i, text in zip(left, given, strict=True):
                if text and text.casefold() != answers[i].strip().casefold():
                    found[i] = text
            left = [i for i in left if not found[i]]
            if not left:
                return found
    raise UserError(
        f"for {len(left)} rows (first {left[0]}) the model gives no other answer than the true one in {tries} tries; write winner "
        "answers into the field 'alternate'"
    )
