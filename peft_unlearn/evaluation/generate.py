"""Answers of a model, many at a time. Besides `Pass` this is the one place that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..data.collate import prompt_ids
from ..errors import UserError


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The most probable continuation of every prompt, token by token.

    Args: model: any causal language model, PEFT-wrapped or not, on the device where it shall run. tokenizer: its
        tokenizer; its padding side and the model's train/eval mode are as before afterwards, also after an error.
        prompts: texts as `data.formats.to_text` makes them; the tokenizer adds its own BOS. max_new_tokens: longest
        answer, in tokens; an answer also ends at any of the model's end-of-sequence tokens. batch_size: prompts per
        generate call; prompts of like length go together, so little is padding. progress: called as progress(done,
        total) after every batch.

    Returns: One str per prompt, in the order of `prompts`, without the prompt, without special tokens, without blanks
        around it.
    """
    return _answers(
        model, tokenizer, prompts, max_new_tokens, batch_size, progress, {"do_sample": False, "temperature": None}
    )


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
            said = _answers(model, tokenizer, [prompts[i] for i in left], 48, 64, None, sampling)
            for i, text in zip(left, said, strict=True):
                if text and text.casefold() != answers[i].strip().casefold():
                    found[i] = text
            left = [i for i in left if not found[i]]
            if not left:
                return found
    raise UserError(
        f"for {len(left)} rows (first {left[0]}) the model gives no other answer than the true one in {tries} tries; write winner "
        "answers into the field 'alternate'"
    )


def _answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    sampling: dict[str, Any],
) -> list[str]:
    """Generated continuations, length-sorted batches, in the order of `prompts`."""
    import torch

    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    ids = [row[:-1] if row and row[-1] in ends else row for row in ids]  # some tokenizers close every text with EOS
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    device = model.get_input_embeddings().weight.device
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(ids[batch[-1]])
            # Padded by hand: the side is then a fact of this function and the tokenizer is never touched.
            input_ids = torch.tensor([[pad] * (width - len(ids[i])) + ids[i] for i in batch], device=device)
            real = [[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in batch]
            with torch.no_grad():
                out = model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.tensor(real, device=device),
                    max_new_tokens=max_new_tokens,
                    **sampling,
                    num_beams=1,
                    top_p=None,
                    top_k=None,
                    use_cache=True,
                    pad_token_id=pad,
                    eos_token_id=sorted(ends) or None,
                )
            for i, new in zip(batch, out[:, width:].tolist(), strict=True):
                cut = next((k for k, token in enumerate(new) if token in ends), len(new))
                answers[i] = tokenizer.decode(new[:cut], skip_special_tokens=True).strip()
            if progress is not None:
                progress(min(start + batch_size, len(order)), len(order))
    finally:
        model.train(was_training)
    return answers


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that ends an answer: the tokenizer's EOS and the model's own (chat models have several)."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    ids = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])
    return ids | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
