"""Where an attacker may write: a row's prompt with a slot right after the question, and the slot's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..data.collate import adds_special, encode
from ..data.formats import layout_of, to_text
from ..evaluation.measured import Array, Unmeasured
from ..head import held

_SLOT = "\ue000\ue001\ue000"  # private use: in nobody's text


@dataclass(frozen=True)
class Frame:
    """A prompt cut in two where the attacker's text goes, and the answer that it should yield.

    row: what is kept beside the texts (value, subject, ..).
    """

    left: str
    right: str
    answer: str
    row: Mapping[str, Any]

    def with_text(self, added: str) -> dict[str, Any]:
        """The row with `added` in its slot, in the prompt/completion layout, which every score reads."""
        kept = {k: self.row[k] for k in ("value", "subject") if k in self.row}
        return {"prompt": self.left + added + self.right, "completion": self.answer, **kept}


def frames(rows: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> list[Frame]:
    """One `Frame` for each row; the slot stands at the end of the question (of the last user message, or of the prompt).

    Raises:
        Unmeasured: rows of plain text, which ask nothing.
    """
    return [_frame(row, tokenizer, template) for row in rows]


def _frame(row: Mapping[str, Any], tokenizer: Any, template: str) -> Frame:
    layout = layout_of(row)
    if layout == "text":
        raise Unmeasured("the rows are plain text without a prompt: there is nothing an attacker could add to")
    if layout == "question/answer":
        row = {**row, "question": row["question"] + _SLOT}
    elif layout == "messages":
        messages = [dict(m) for m in row["messages"]]
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
        if asked is None:
            raise Unmeasured("the rows' messages have none of role 'user': there is nothing an attacker could add to")
        messages[asked]["content"] += _SLOT
        row = {**row, "messages": messages}
    prompt, answer = to_text(row, tokenizer, template)
    left, _, right = prompt.partition(_SLOT)
    return Frame(left, right, answer, row)


def means(scores: Mapping[str, Array]) -> dict[str, float | None]:
    """Measure -> mean over rows, None where it is not finite."""
    found = {m: float(v.mean()) for m, v in scores.items()}
    return {m: v if math.isfinite(v) else None for m, v in found.items()}


@dataclass(frozen=True)
class Slotted:
    """Tokens of a prompt and its answer; the slot's are ``input_ids[start:stop]``."""

    input_ids: list[int]
    labels: list[int]
    start: int
    stop: int

    def filled(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """The same with other tokens (as many) in the slot."""
        return {
            "input_ids": self.input_ids[: self.start] + list(ids) + self.input_ids[self.stop :],
            "labels": self.labels,
        }


def slotted(frame: Frame, added: str, tokenizer: Any) -> Slotted | None:
    """Tokens of the frame with `added` in its slot; None where a token reaches across the slot's borders."""
    prompt = frame.left + added + frame.right
    found = spans([(frame.left, added, frame.right + frame.answer)], tokenizer)[0]
    if found is None:
        return None
    row = encode(prompt, frame.answer, tokenizer)[0]
    start = len(found[0])
    return Slotted(row["input_ids"], row["labels"], start, start + len(found[1]))


def spans(texts: Sequence[tuple[str, str, str]], tokenizer: Any) -> list[tuple[list[int], list[int], list[int]] | None]:
    """(left, middle, right) texts -> their tokens when told in one go; None where a token crosses a border.

    Raises:
        Unmeasured: a tokenizer that does not say where its tokens come from.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Unmeasured("the tokenizer is not a fast one: it does not say which token stands for which part of a text")
    whole = ["".join(parts) for parts in texts]
    special = adds_special(whole[0], tokenizer) if whole else True
    told = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=special)
    out: list[tuple[list[int], list[int], list[int]] | None] = []
    for (left, middle, _), ids, offsets in zip(texts, told["input_ids"], told["offset_mapping"], strict=True):
        a, b = len(left), len(left) + len(middle)
        if any(start < a < end or start < b < end for start, end in offsets):
            out.append(None)
            continue
        # a token without text (BOS, the first byte of a character cut in two) goes with what stands before it
        i = next((k for k, (_, end) in enumerate(offsets) if end > a), len(ids))
        j = next((k for k, (_, end) in enumerate(offsets) if end > b), len(ids))
        out.append((list(ids[:i]), list(ids[i:j]), list(ids[j:])))
    return out


def placeholder(all_frames: Sequence[Frame], length: int, tokenizer: Any) -> tuple[list[int], str]:
    """(`length` tokens, their text) that keep their shape in every frame's slot: one harmless token, many times over.

    Raises:
        Unmeasured: none of the fillers tried does so with this tokenizer.
    """
    for filler in (" !", "!", " x", " *", " a", "x", " the"):
        text = filler * length
        found = [s and s[1] for s in spans([(f.left, text, f.right + f.answer) for f in all_frames], tokenizer)]
        if found and found[0] and len(found[0]) == length and all(ids == found[0] for ids in found):
            return found[0], text
    raise Unmeasured("no filler keeps its tokens after these questions with this tokenizer")


@contextmanager
def embeddings_at(model: Any, run: Sequence[int], vectors: Any, add: bool = False) -> Iterator[None]:
    """Inside, wherever the token ids `run` stand in the model's input their embeddings are `vectors` (len(run), hidden).

    add: added to the tokens' own embeddings instead. The last such run of each row counts. Gradients reach `vectors`.
    A forward hook on the input embeddings does it, so adapters, heads and generation (whose later steps do not hold the
    prompt and are left alone) work as always; it is gone afterwards, also after an exception.
    """
    import torch

    wanted = torch.tensor(list(run))
    m = len(wanted)

    def hook(module: Any, args: Any, output: Any) -> Any:
        ids = args[0]
        if ids.ndim != 2 or ids.shape[1] <= m:
            return None
        hit = (ids.unfold(1, m, 1) == wanted.to(ids.device)).all(-1)  # (batch, seq - m + 1)
        rows = hit.any(1).nonzero().squeeze(1)
        if not len(rows):
            return None
        last = hit.shape[1] - 1 - hit[rows].flip(1).int().argmax(1)
        where = last[:, None] + torch.arange(m, device=ids.device)  # (rows, m)
        put = vectors.to(output)[None].expand(len(rows), m, -1)
        return output.index_put((rows[:, None], where), put, accumulate=add)

    with held(model.get_input_embeddings().register_forward_hook(hook)):
        yield


def mean_nll(model: Any, rows: Sequence[Mapping[str, list[int]]], pad_id: int, token_budget: int = 4096) -> Any:
    """Mean token negative log-likelihood of each row's answer, (rows,) float32, differentiable where gradients are on.

    Length-sorted batches of at most `token_budget` padded tokens, no (batch, seq, vocab) tensor.
    """
    import torch

    from ..data.collate import pad
    from ..evaluation.teacher import batches
    from ..forward import Pass

    device = model.get_input_embeddings().weight.device
    parts: list[Any] = [None] * len(rows)
    for batch in batches([len(row["input_ids"]) for row in rows], token_budget):
        p = Pass(model, {k: v.to(device) for k, v in pad([rows[i] for i in batch], pad_id).items()})
        values = -p.per_sequence(p.logp) / p.lengths
        for k, i in enumerate(batch):
            parts[i] = values[k]
    return torch.stack(parts)
