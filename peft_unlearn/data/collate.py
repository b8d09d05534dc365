"""Tokens of rows, padded batches, and which forget row meets which retain row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import UserError
from .chat import end_tokens

IGNORE = -100  # transformers' label of a position without a target
Tokens = tuple[list[int], list[int]]  # ids, and where each ends in the text


def tokens_of(pairs: Sequence[tuple[str, str]], tokenizer: Any) -> list[Tokens] | None:
    """Tokens of many (prompt, answer) for `encode`, in one call of a fast tokenizer; None for a slow one."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    texts = [prompt + answer for prompt, answer in pairs]
    out: list[Tokens | None] = [None] * len(texts)
    special = [adds_special(text, tokenizer) for text in texts]
    for wanted in {*special}:
        mine = [i for i, s in enumerate(special) if s == wanted]
        enc = tokenizer([texts[i] for i in mine], return_offsets_mapping=True, add_special_tokens=wanted)
        for i, ids, offsets in zip(mine, enc["input_ids"], enc["offset_mapping"], strict=True):
            out[i] = list(ids), [end for _, end in offsets]
    return [tokens for tokens in out if tokens is not None]


def encode(
    prompt: str,
    answer: str,
    tokenizer: Any,
    max_length: int | None = None,
    on_overflow: str = "error",
    tokens: Tokens | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> list[dict[str, list[int]]]:
    """Tokens and labels of one (prompt, answer); the end-of-sequence token is a target, the prompt is not.

    Prompt and answer are tokenized in one go, since tokenizers may merge across the boundary; a token that reaches into
    the answer counts as answer. A list is returned because `on_overflow="chunk"` cuts a long answer into several rows.

    Args:
        on_overflow: beyond `max_length` tokens: "error", "truncate" (cut the end), or "chunk" (cut the answer into
            rows that each keep the prompt).
        tokens: of ``prompt + answer``, where `tokens_of` has them already.
        spans: character ranges of the answer whose tokens alone are targets; default all of it and the end token.

    Raises:
        UserError: too long with "error", or no target left.
    """
    text = prompt + answer
    special = adds_special(text, tokenizer)
    known = tokens or next(iter(tokens_of([(prompt, answer)], tokenizer) or []), None)
    if known is not None:
        ids, ends = list(known[0]), known[1]
        first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        first = min(len(prompt_ids(prompt, tokenizer)), len(ids)) if prompt else 0
    eos = tokenizer.eos_token_id
    if eos is not None and (
        not ids or ids[-1] not in end_tokens(tokenizer)
    ):  # a chat template's own end of turn is the end
        ids.append(eos)
    labels = list(ids) if spans is None else _within(ids, known, len(prompt), spans)
    if max_length is None or len(ids) <= max_length:
        return [_labelled(ids, first, labels)]
    if on_overflow == "error":
        raise UserError(
            f"has {len(ids)} tokens, more than max_length {max_length}; raise max_length or set on_overflow to truncate or chunk"
        )
    if max(first, 1) >= max_length:
        raise UserError(f"has a prompt of {first} tokens, which leaves no target within max_length {max_length}")
    if on_overflow == "truncate":
        return [_labelled(ids[:max_length], first, labels)]
    if first == 0:  # nothing stands before the text: each piece begins with the last token of the one before
        step = max_length - 1
        return [_labelled(ids[i : i + max_length], 0, labels[i:]) for i in range(0, len(ids) - 1, step)]
    room = max_length - first
    starts = list(range(first, len(ids), room))
    if room > 1 and len(starts) > 1 and starts[-1] == len(ids) - 1:  # an end token alone says nothing of the answer
        starts[-1] -= 1
    pieces = [(ids[:first] + ids[i:j], labels[:first] + labels[i:j]) for i, j in pairwise([*starts, len(ids)])]
    whole = spans is None  # where the value alone is looked at, pieces without it say nothing
    return [_labelled(p, first, own) for p, own in pieces if whole or any(x != IGNORE for x in own[max(first, 1) :])]


def _within(ids: list[int], tokens: Tokens | None, start: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Labels of the tokens that reach into a character range of the answer, which begins at `start`."""
    if tokens is None:
        raise UserError("needs a fast tokenizer: a slow one does not say which tokens a value stands in (data.target)")
    begins, ends = [0, *tokens[1][:-1]], tokens[1]
    inside = [
        any(e > start + i and b < start + j and e > b for i, j in spans) for b, e in zip(begins, ends, strict=True)
    ]
    inside += [False] * (len(ids) - len(inside))  # the end token
    return [x if there else IGNORE for x, there in zip(ids, inside, strict=True)]


def adds_special(text: str, tokenizer: Any) -> bool:
    """Chat templates write the beginning-of-sequence token out; the tokenizer must not add a second one."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt alone, as generation starts from it."""
    ids = list(tokenizer(prompt, add_special_tokens=adds_special(prompt, tokenizer))["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # added after any text by some tokenizers (ByT5): an answer follows here
    return ids


def padding_id(tokenizer: Any) -> int:
    """The token that pads batches: the tokenizer's own, else its end-of-sequence token (padding is masked anyway)."""
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))  # an image processor has none
    return next((i for i in ids if i is not None), 0)


def _labelled(ids: list[int], first: int, labels: Sequence[int]) -> dict[str, list[int]]:
    # Position 0 is never a target: nothing comes before it that could predict it.
    first = max(first, 1)
    own = [IGNORE] * first + list(labels[first : len(ids)])
    if all(x == IGNORE for x in own):
        raise UserError(
            "has no target token: the answer, or the value in it, is empty after tokenization, or was cut off"
        )
    return {"input_ids": ids, "labels": own}


def pad(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors (batch, seq) of encoded rows; extra per-token float lists (e.g. ``ref_logp``, one value per
    target) are padded into (batch, seq-1) at their targets' positions; ``ref_head`` (targets of the row, hidden) is put end to end.
    Rows of images are stacked: ``pixel_values`` (batch, channels, height, width) and ``labels`` (batch, 2): a sequence of one target each.
    """
    if rows and "pixel_values" in rows[0]:
        labels = torch.tensor([[IGNORE, r["labels"]] for r in rows])
        return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": labels}
    width = max(len(r["input_ids"]) for r in rows)
    out = {
        "input_ids": torch.full((len(rows), width), pad_id, dtype=torch.long),  # (batch, seq)
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE, dtype=torch.long),
    }
    for i, r in enumerate(rows):
        n = len(r["input_ids"])
        out["input_ids"][i, :n] = torch.as_tensor(r["input_ids"])
        out["attention_mask"][i, :n] = 1
        out["labels"][i, :n] = torch.as_tensor(r["labels"])
    if all("ref_logp" in r for r in rows):
        ref = torch.zeros((len(rows), width - 1))
        ref[out["labels"][:, 1:] != IGNORE] = torch.cat([torch.as_tensor(r["ref_logp"]).float() for r in rows])
        out["ref_logp"] = ref  # (batch, seq-1)
    if all("ref_head" in r for r in rows):
        out["ref_head"] = torch.cat([r["ref_head"] for r in rows])
    return out


def collate(items: Sequence[Mapping[str, list[dict[str, Any]]]], pad_id: int) -> dict[str, Any]:
    """Items of `PairedRows` into ``{"forget": batch, "retain": batch}``; winner answers go to ``batch["alternate"]``."""
    out: dict[str, Any] = {}
    for name in items[0]:
        rows = [row for item in items for row in item[name]]
        if not rows:  # a set with a small share has no row in every micro-batch
            continue
        batch: dict[str, Any] = pad(rows, pad_id)
        if all("alternate" in r for r in rows):
            batch["alternate"] = pad([r["alternate"] for r in rows], pad_id)
        out[name] = batch
    return out


def share_of(per_anchor: float | Mapping[str, float], name: str) -> float:
    """Rows of a set with each anchor row; 1 where its own number is not given."""
    return per_anchor.get(name, 1) if isinstance(per_anchor, Mapping) else per_anchor


def _whole(x: float) -> int:
    return math.floor(x + 1e-9)  # 10 * 0.3 is 3


class PairedRows(Dataset):
    """Forget and retain rows that meet in one optimizer step: a pure function of (seed, epoch, row).

    The anchor set is walked through in one permutation per epoch; each anchor row brings `per_anchor` rows of every other set (one
    number, or one per set: 0.5 is a row with every second anchor row), dealt from permutations of that set, so that every row is used
    equally often (a uniform draw with replacement, the usual choice, leaves one row in e unused per pass). An index is a *stream
    position* ``epoch * len + i``: resume, workers and ranks see the same pairs whatever they did before.
    """

    def __init__(
        self,
        sets: Mapping[str, list[dict[str, Any]]],
        anchor: str,
        per_anchor: float | Mapping[str, float] = 1,
        seed: int = 0,
    ) -> None:
        self.sets, self.anchor, self.per_anchor, self.seed = dict(sets), anchor, per_anchor, seed
        self._order: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.sets[self.anchor])

    def _deal(self, which: int, n: int, position: int) -> int:
        """Row at `position` of the endless stream of permutations of range(n) that belongs to set number `which`."""
        epoch, i = divmod(position, n)
        if (which, epoch) not in self._order:
            # Two epochs of one set are the most that neighbouring positions touch.
            for old in [k for k in self._order if k[0] == which and k[1] < epoch - 1]:
                del self._order[old]
            self._order[which, epoch] = np.random.Generator(np.random.PCG64([self.seed, which, epoch])).permutation(n)
        return int(self._order[which, epoch][i])

    def __getitem__(self, position: int) -> dict[str, list[dict[str, Any]]]:
        item = {}
        for which, (name, rows) in enumerate(self.sets.items()):
            share = 1 if name == self.anchor else share_of(self.per_anchor, name)
            dealt = range(_whole(position * share), _whole((position + 1) * share))
            item[name] = [rows[self._deal(which, len(rows), k)] for k in dealt]
        return item


class StreamSampler(Sampler[int]):
    """Stream positions of one epoch, rounded up to whole optimizer steps.

    The last window of an epoch is filled with the next pass's first rows instead of being short or, on several ranks,
    padded with repeats: so a step never depends on how many processes or micro-batches share it.
    """

    def __init__(self, n_rows: int, rows_per_step: int) -> None:
        self.length = -(-n_rows // rows_per_step) * rows_per_step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.length
        return iter(range(start, start + self.length))
