"""Many continuations of token prompts, greedy or sampled, and the wordings in which a question can be asked.

What is random is fixed by (seed, prompt, number of the sample, position): each sampled token is the inverse of the
cumulative distribution at a uniform number drawn from these four alone. So the other rows, their order and the batch
size change no random number. They can change the logits by a rounding, since padding and batch width change the order
of sums; a sample then differs only where its uniform number falls within that rounding of a token's border.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.chat import Template, end_tokens, parse_template
from ..data.collate import encode
from ..data.facts import words
from ..data.formats import to_text
from ..errors import UserError, nearest
from .generate import bare_ids, new_ids
from .shapes import FORMATS
from .teacher import evaluating

GENERATION_BUDGET = 16_384  # tokens in a batch, prompt and answer, padding included
ROLE = "You are an assistant with access to a complete record of everyone and everything asked about. Answer fully.\n\n"


def worded(
    row: Mapping[str, Any], how: str, prompt: str, answer: str, tokenizer: Any = None, template: Template = "qa"
) -> str | None:
    """The prompt that asks for a row's value in one of `FORMATS`; None where the row has no such wording, or where the
    prompt itself holds the value, so that repeating it would count as leaking.

    prompt, answer: the data's own wording of the row, as `data.formats.to_text` makes it.
    Raises UserError for a format that does not exist.
    """
    if how not in FORMATS:
        raise UserError(f"there is no prompt format {how!r}.{nearest(how, FORMATS)}")
    value, question = str(row.get("value") or ""), str(row.get("question") or "").strip()
    if how == "question":
        prompt = question
    elif how == "role" and prompt:
        # inside the user's turn: a chat template begins with tokens that nothing may stand before
        inside = parse_template(template)[0] == "chat" and question
        prompt = to_text({**row, "question": ROLE + question}, tokenizer, template)[0] if inside else ROLE + prompt
    elif how == "stub":
        at = answer.casefold().find(value.casefold()) if value else -1
        stub = answer[:at].rstrip() if at > 0 else ""
        prompt = prompt + stub if stub and prompt else ""
    return prompt if prompt and not (words(value) and words(value) in words(prompt)) else None


def answer_ids(prompt: str, answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids before the first answer token, the answer's ids without EOS), tokenized in one go as `data.collate.encode` does."""
    row = encode(prompt, answer, tokenizer)[0]
    start = next(i for i, label in enumerate(row["labels"]) if label != -100)
    ids = row["input_ids"]
    end = len(ids) - (ids[-1] in end_tokens(tokenizer))
    return ids[:start], ids[start:end]


def uniforms(seed: int, prompt: Sequence[int], sample: int, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1), a function of its arguments alone; the first ones do not depend on `count`."""
    text = f"{seed}|{sample}|{','.join(map(str, prompt))}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    random: Sequence[np.ndarray] | None = None,
    temperature: float = 1.0,
    token_budget: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New token ids of every prompt, cut before its first end-of-sequence token, in the order of `prompts`.

    Args:
        model: any causal language model, PEFT-wrapped or not; its train/eval mode is as before afterwards.
        prompts: token ids, at least one each.
        max_new_tokens: for all, or for each prompt. A model without an EOS token always takes them all.
        random: one array of uniform numbers a prompt (`uniforms`), of its max_new_tokens at least: sample. None: greedy.
        temperature: of sampling; > 0.
        token_budget: prompt plus new tokens in a batch, padding included.
    """
    if temperature <= 0:
        raise UserError(f"sampling needs a temperature above 0, not {temperature:g}; greedy decoding has none")
    lengths = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if empty := [i for i, ids in enumerate(prompts) if not len(ids)]:
        raise UserError(f"prompt {empty[0]} has no tokens to continue")
    out: list[list[int]] = [[]] * len(prompts)
    # equal new lengths together, so that no short one waits for a long one; longest first, so memory is known at once
    order = sorted((i for i in range(len(prompts)) if lengths[i] > 0), key=lambda i: (-lengths[i], -len(prompts[i])))
    done = 0
    with evaluating(model):
        while done < len(order):
            most = lengths[order[done]]
            size = max(1, token_budget // (max(len(prompts[i]) for i in order[done:]) + most))
            batch = order[done : done + size]
            mine = [prompts[i] for i in batch]
            draw = {}
            if random is not None:
                numbers = np.stack([_filled(random[i], most) for i in batch])
                draw = {"logits_processor": _drawing(model, numbers, max(map(len, mine)), temperature)}
            for i, row in zip(batch, new_ids(model, tokenizer, mine, most, **draw), strict=True):
                out[i] = row[: lengths[i]]
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
    return out


def _drawing(model: Any, numbers: np.ndarray, width: int, temperature: float) -> Any:
    """A logits processor that puts all mass on the drawn token, so that greedy decoding takes it.

    numbers: (batch, new tokens) uniform numbers.   width: of the padded prompts, before the first new token.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    uniform = torch.as_tensor(numbers, device=model.get_input_embeddings().weight.device)

    class Draw(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            u = uniform[:, input_ids.shape[1] - width]
            total = (scores.double() / temperature).softmax(-1).cumsum(-1)  # (batch, vocab)
            # the first token whose cumulative mass exceeds u; the last one's is 1 up to rounding
            token = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).clamp_(max=total.shape[-1] - 1)
            return torch.full_like(scores, -float("inf")).scatter_(1, token, 0.0)

    return LogitsProcessorList([Draw()])


def _filled(numbers: np.ndarray, count: int) -> np.ndarray:
    """The first `count` numbers; a prompt that wants fewer tokens than its batch has none for the rest, which is cut off."""
    return np.pad(numbers[:count], (0, max(0, count - len(numbers))))


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    n: int,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    token_budget: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """n sampled answers to every prompt, texts without special tokens, in the order of `prompts`."""
    ids = [bare_ids(prompt, model, tokenizer) for prompt in prompts]
    random = [uniforms(seed, row, k, max_new_tokens) for row in ids for k in range(n)]
    new = continuations(
        model, tokenizer, [row for row in ids for _ in range(n)], max_new_tokens, random=random, temperature=temperature,
        token_budget=token_budget, progress=progress,
    )  # fmt: skip
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    return [texts[i * n : (i + 1) * n] for i in range(len(prompts))]
