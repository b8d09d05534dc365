"""Where an attacker may write: a row's prompt with a slot right after the question, and the slot's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..data.chat import Template
from ..data.collate import adds_special, encode, pad
from ..data.formats import layout_of, to_text
from ..evaluation.measured import Unmeasured
from ..evaluation.teacher import batches
from ..forward import Pass
from ..head import held
from .case import Case, Rows, chosen

_MARK = "\ue000\ue001\ue000"  # private use: in nobody's text


@dataclass(frozen=True)
class SlotTokens:
    """Tokens of a prompt and its answer; the slot's are ``input_ids[start:stop]``."""

    input_ids: list[int]
    labels: list[int]
    start: int
    stop: int

    def filled(self, ids: Sequence[int]) -> dict[str, list[int]]:
        """The same with other tokens (as many) in the slot."""
        whole = self.input_ids[: self.start] + list(ids) + self.input_ids[self.stop :]
        return {"input_ids": whole, "labels": self.labels}


@dataclass(frozen=True)
class PromptSlot:
    """A prompt cut in two where the attacker's text goes, and the answer that it should yield.

    row: what is kept beside the texts (value, subject, ..).
    """

    left: str
    right: str
    answer: str
    row: Mapping[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any], tokenizer: Any, template: Template) -> PromptSlot:
        """The slot at the end of a row's question (of the last user message, or of the prompt).

        Raises:
            Unmeasured: a row of plain text, which asks nothing.
        """
        layout = layout_of(row)
        if layout == "text":
            raise Unmeasured("the rows are plain text without a prompt: there is nothing an attacker could add to")
        if layout == "question/answer":
            row = {**row, "question": row["question"] + _MARK}
        elif layout == "messages":
            messages = [dict(m) for m in row["messages"]]
            last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
            if last is None:
                raise Unmeasured(
                    "the rows' messages have none of role 'user': there is nothing an attacker could add to"
                )
            messages[last]["content"] += _MARK
            row = {**row, "messages": messages}
        prompt, answer = to_text(row, tokenizer, template)
        left, _, right = prompt.partition(_MARK)
        return cls(left, right, answer, row)

    def with_text(self, added: str) -> dict[str, Any]:
        """The row with `added` in its slot, in the prompt/completion layout, which every score reads."""
        kept = {k: self.row[k] for k in ("value", "subject") if k in self.row}
        return {"prompt": self.left + added + self.right, "completion": self.answer, **kept}

    def parts(self, added: str) -> tuple[str, str, str]:
        """Before, in and after the slot, answer included; see `spans`."""
        return self.left, added, self.right + self.answer

    def tokens(self, added: str, tokenizer: Any) -> SlotTokens | None:
        """Tokens with `added` in the slot; None where a token reaches across the slot's borders."""
        found = spans([self.parts(added)], tokenizer)[0]
        if found is None:
            return None
        row = encode(self.left + added + self.right, self.answer, tokenizer)[0]
        start = len(found[0])
        return SlotTokens(row["input_ids"], row["labels"], start, start + len(found[1]))


def training_slots(case: Case, most: int, what: str) -> tuple[Rows, list[PromptSlot], list[PromptSlot]]:
    """(at most `most` shown rows, their slots, the scored rows' slots).

    Raises:
        Unmeasured: no row is shown to do `what` on.
    """
    if not case.shown:
        raise Unmeasured(f"no forget rows were shown to the attacker: there is nothing to {what} on")
    train = chosen(case.shown, most, case.seed)
    slots, scored = ([PromptSlot.of(r, case.tokenizer, case.template) for r in rows] for rows in (train, case.rows))
    return train, slots, scored


def spans(texts: Sequence[tuple[str, str, str]], tokenizer: Any) -> list[tuple[list[int], list[int], list[int]] | None]:
    """(left, middle, right) texts -> their tokens when encoded in one go; None where a token crosses a border.

    Raises:
        Unmeasured: a tokenizer that does not give the place in the text of each token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Unmeasured("the tokenizer is not a fast one: it does not say which token stands for which part of a text")
    whole = ["".join(parts) for parts in texts]
    special = adds_special(whole[0], tokenizer) if whole else True
    encoded = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=special)
    out: list[tuple[list[int], list[int], list[int]] | None] = []
    for (left, middle, _), ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        a, b = len(left), len(left) + len(middle)
        if any(start < a < end or start < b < end for start, end in offsets):
            out.append(None)
            continue
        # a token without text (BOS, the first byte of a character cut in two) goes with what stands before it
        i = next((k for k, (_, end) in enumerate(offsets) if end > a), len(ids))
        j = next((k for k, (_, end) in enumerate(offsets) if end > b), len(ids))
        out.append((list(ids[:i]), list(ids[i:j]), list(ids[j:])))
    return out


def placeholder(slots: Sequence[PromptSlot], length: int, tokenizer: Any) -> tuple[list[int], str]:
    """(`length` tokens, their text) that keep their shape in every slot: one harmless token, many times over.

    Raises:
        Unmeasured: none of the fillers tried does so with this tokenizer.
    """
    for filler in (" !", "!", " x", " *", " a", "x", " the"):
        text = filler * length
        found = [s and s[1] for s in spans([slot.parts(text) for slot in slots], tokenizer)]
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


def passes(
    model: Any, rows: Sequence[Mapping[str, list[int]]], pad_id: int, **settings: Any
) -> Iterator[tuple[list[int], Pass]]:
    """(numbers of the rows, their `Pass`) in batches of like length, at most 4096 padded tokens each."""
    device = model.get_input_embeddings().weight.device
    for batch in batches([len(row["input_ids"]) for row in rows], 4096):
        yield (
            batch,
            Pass(model, {k: v.to(device) for k, v in pad([rows[i] for i in batch], pad_id).items()}, **settings),
        )


def mean_nll(model: Any, rows: Sequence[Mapping[str, list[int]]], pad_id: int) -> Any:
    """Mean token negative log-likelihood of each row's answer, (rows,) float32, differentiable where gradients are on."""
    parts: list[Any] = [None] * len(rows)
    for batch, p in passes(model, rows, pad_id):
        for i, value in zip(batch, -p.per_sequence(p.logp) / p.lengths, strict=True):
            parts[i] = value
    return torch.stack(parts)
