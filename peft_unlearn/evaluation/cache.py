"""What a model keeps of what it has read, so that no beginning is read twice and decoding goes on where reading ended.

Only for models that keep keys and values of every token and take positions as an argument (`cacheable`): there a slot that is masked
out is as if it had never been. Others are read and decoded as before, row by row from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.collate import pad
from ..forward import Pass
from ..head import causal_lm
from ..prefix import cacheable, common


@dataclass
class Cached:
    """Rows as a model has read them.

    past: its keys and values.   mask: (rows, slots), 1 where a slot holds a token of its row.   next: (rows,) position of the next one.
    """

    past: Any
    mask: Tensor
    next: Tensor

    @classmethod
    def nothing(cls, model: Any, rows: int = 1) -> Cached:
        from transformers.cache_utils import DynamicCache

        bare: Any = causal_lm(model)
        numbers = torch.zeros(rows, 1, dtype=torch.long, device=bare.get_input_embeddings().weight.device)
        return cls(DynamicCache(config=bare.config), numbers[:, :0], numbers[:, 0])

    def of(self, rows: Sequence[int], model: Any) -> Cached:
        """These rows, in this order; one may come several times. A copy."""
        out = Cached.nothing(model, len(rows))
        index = torch.tensor(rows, device=self.mask.device)
        for k, layer in enumerate(self.past.layers):
            if layer.is_initialized:  # layers that share the keys of others have none of their own
                out.past.update(layer.keys[index], layer.values[index], k)
        out.mask, out.next = self.mask[index], self.next[index]
        return out


def read(
    model: Any, before: Cached, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None, pad_id: int
) -> tuple[Pass, Cached]:
    """(the pass over these tokens, each row after what `before` holds of it; what is read then). Fills `before.past`."""
    width, device = max(map(len, ids)), before.mask.device

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

    real = padded([[1] * len(row) for row in ids], 0)
    mask = torch.cat([before.mask, real], 1)
    positions = before.next[:, None] + (real.cumsum(1) - 1).clamp_(min=0)  # a table of positions may end with the row
    batch = {
        "input_ids": padded(ids, pad_id), "attention_mask": mask, "past_key_values": before.past, "position_ids": positions,
        "labels": padded(labels or [[-100] * len(row) for row in ids], -100),
    }  # fmt: skip
    return Pass(model, batch), Cached(before.past, mask, before.next + real.sum(1))


@dataclass(frozen=True)
class Wanted:
    """A greedy answer: of at most `room` tokens, ended where `done` says of its tokens that nothing more can matter."""

    room: int
    done: Callable[[list[int]], bool] = lambda _: False


def go_on(
    model: Any, cached: Cached, first: Sequence[list[int]], wanted: Sequence[Wanted], ends: set[int]
) -> list[list[int]]:
    """Greedy continuations of rows; cut before the first end token. Rows that are finished are computed no further.

    first: the tokens decoded of each row so far, of which `cached` holds all but the last.
    """
    out = [list(tokens) for tokens in first]

    def alive(i: int) -> bool:
        return out[i][-1] not in ends and len(out[i]) < wanted[i].room and not wanted[i].done(out[i])

    rows = list(range(len(out)))
    while left := [k for k, i in enumerate(rows) if alive(i)]:
        if len(left) < len(rows):
            cached, rows = cached.of(left, model), [rows[k] for k in left]
        token = torch.tensor([out[i][-1:] for i in rows], device=cached.mask.device)
        for i, best in zip(rows, step(model, cached, token, cached.next[:, None]), strict=True):
            out[i].append(best)
    return [row[: next((k for k, t in enumerate(row) if t in ends), len(row))] for row in out]


def step(model: Any, cached: Cached, ids: Tensor, positions: Tensor, real: Tensor | None = None) -> list[int]:
    """Read (rows, n) tokens, `real` of them no padding; the likeliest next token of each row. `cached` moves on."""
    real = torch.ones_like(ids) if real is None else real
    cached.mask = torch.cat([cached.mask, real], 1)
    cached.next = cached.next + real.sum(1)
    logits = model(
        input_ids=ids, attention_mask=cached.mask, position_ids=positions, past_key_values=cached.past, use_cache=True,
        logits_to_keep=1,
    ).logits  # fmt: skip
    return logits[:, -1].argmax(-1).tolist()


def starts(
    model: Any, prompts: Sequence[Sequence[int]], pad_id: int, ends: set[int]
) -> Callable[[Sequence[int], Sequence[Wanted]], list[list[int]]]:
    """A function (numbers of prompts, what is wanted of each) -> their greedy answers, as of `go_on`; what all begin with is read once."""
    n = common([row[:-1] for row in prompts])
    lead = Cached.nothing(model)
    if n:
        p, lead = read(model, lead, [prompts[0][:n]], None, pad_id)
        p.run()
    device = lead.mask.device

    def begin(batch: Sequence[int], wanted: Sequence[Wanted]) -> list[list[int]]:
        rows, cached = [prompts[i][n:] for i in batch], lead.of([0] * len(batch), model)
        width = max(map(len, rows))  # padded on the left, so that the last token is everybody's last
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in rows], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=device)
        positions = (cached.next[:, None] + real.cumsum(1) - 1).clamp_(min=0)
        first = step(model, cached, ids, positions, real)
        return go_on(model, cached, [[t] for t in first], wanted, ends)

    return begin


# -- answers that are known, and decoded from where the model left them ------------------------------------------------


class Reader:
    """Batches of encoded rows (`data.collate.encode`), what they share read once.

    decode: row -> the greedy answer that is wanted of it; the row's own answer is the draft: what the model would have said too is not
    decoded. greedy: row -> what came of it, tokens without the end token.
    """

    def __init__(
        self, model: Any, encoded: Sequence[Mapping[str, list[int]]], rows: Sequence[int], pad_id: int,
        decode: Mapping[int, Wanted], ends: set[int],
    ) -> None:  # fmt: skip
        self.model, self.encoded, self.pad_id, self.decode, self.ends = model, encoded, pad_id, decode, ends
        self.start = {i: next(k for k, y in enumerate(encoded[i]["labels"]) if k and y != -100) for i in rows}
        self.greedy: dict[int, list[int]] = {}
        self.device = model.get_input_embeddings().weight.device
        most = max((w.room for w in decode.values()), default=0)
        longest = max((self.start[i] for i in rows), default=0) + most
        longest += max((len(encoded[i]["labels"]) - self.start[i] for i in rows), default=0)
        self.usable = bool(rows) and cacheable(model, longest)
        heads = [encoded[i]["input_ids"][: self.start[i] - 1] for i in rows]
        self.lead = common(heads) if self.usable else 0
        self._lead: Cached | None = None

    def batches(self, token_budget: int) -> Iterator[list[int]]:
        """All rows, in batches of at most `token_budget` padded tokens (or one row), longest first; where parts are shared, rows of one
        prompt beside each other, and those whose wanted answers are equally long."""
        size = {i: len(self.encoded[i]["input_ids"]) for i in self.start}
        key: dict[int, Any] = {i: -n for i, n in size.items()}
        if self.usable:
            prompt = {i: tuple(self.encoded[i]["input_ids"][: self.start[i]]) for i in self.start}
            most: dict[Any, list[int]] = {}
            for i, p in prompt.items():
                room = self.decode[i].room if i in self.decode else 0
                most[p] = [max(a, b) for a, b in zip(most.get(p, [0, 0]), (room, size[i]), strict=True)]
            key = {i: (-most[p][0], -most[p][1], p) for i, p in prompt.items()}
        batch: list[int] = []
        for i in sorted(self.start, key=lambda i: key[i]):
            if batch and (len(batch) + 1) * max(size[k] for k in (*batch, i)) > token_budget:
                yield batch
                batch = []
            batch = [*batch, i]
        if batch:
            yield batch

    def read(self, rows: Sequence[int]) -> tuple[Pass, Callable[[Any], None]]:
        """(the pass over a batch's answers, what is to be called with (targets of each row right?, likeliest tokens) afterwards)."""
        ids = [self.encoded[i]["input_ids"] for i in rows]
        if not self.usable:
            batch = {k: v.to(self.device) for k, v in pad([self.encoded[i] for i in rows], self.pad_id).items()}
            return Pass(self.model, batch), lambda found: self._decode(rows, found)
        if self._lead is None:
            self._lead = Cached.nothing(self.model)
            if self.lead:
                p, self._lead = read(self.model, self._lead, [ids[0][: self.lead]], None, self.pad_id)
                p.run()
        heads = [tuple(row[self.lead : self.start[i] - 1]) for i, row in zip(rows, ids, strict=True)]
        distinct = list(dict.fromkeys(heads))
        tails = [len(row) - self.start[i] + 1 for i, row in zip(rows, ids, strict=True)]
        whole = len(rows) * (max(map(len, ids)) - self.lead)
        parts = len(distinct) * max(map(len, distinct)) + len(rows) * max(tails)
        if parts < 0.9 * whole and (self.lead or all(distinct)) and any(distinct):
            p, known = read(self.model, self._lead.of([0] * len(distinct), self.model), distinct, None, self.pad_id)
            p.run()
            where = {head: k for k, head in enumerate(distinct)}
            before, begin_at = known.of([where[h] for h in heads], self.model), [self.start[i] - 1 for i in rows]
        else:
            before, begin_at = self._lead.of([0] * len(rows), self.model), [self.lead] * len(rows)
        slots = before.mask.shape[1]
        labels = [self.encoded[i]["labels"][k:] for i, k in zip(rows, begin_at, strict=True)]
        p, after = read(
            self.model, before, [row[k:] for row, k in zip(ids, begin_at, strict=True)], labels, self.pad_id
        )

        def go(found: Sequence[tuple[Any, Any]]) -> None:
            """found: of each row (which targets are right, the likeliest token at each)."""
            self._decode(rows, found, after, [slots - k for k in begin_at])

        return p, go

    def _decode(
        self,
        rows: Sequence[int],
        found: Sequence[tuple[Any, Any]],
        after: Cached | None = None,
        shift: Sequence[int] = (),
    ) -> None:
        """shift: what a token's position in its row differs by from its slot. Without `after` only answers that are the row's own."""
        going: list[int] = []
        first: list[list[int]] = []
        for k, (i, (right, best)) in enumerate(zip(rows, found, strict=True)):
            targets = self.encoded[i]["input_ids"][self.start[i] :]
            if i not in self.decode or len(targets) != len(right):
                continue
            n = next((j for j, ok in enumerate(right) if ok != 1.0), len(right))
            if n == len(right) and targets[-1] in self.ends:
                said = cut(targets, self.decode[i], self.ends)
                self.greedy[i] = said[:-1] if said[-1] in self.ends else said
            if (
                n == len(right) or after is None
            ):  # where the row's end is no end token the model would go on, and nothing says how
                continue
            going.append(k)
            first.append([*targets[:n], int(best[n])])
            after.mask[k, self.start[i] + n + shift[k] :] = 0
            after.next[k] = self.start[i] + n
        if going and after is not None:
            wanted = [self.decode[rows[k]] for k in going]
            first = [cut(tokens, w, self.ends) for tokens, w in zip(first, wanted, strict=True)]
            said = go_on(self.model, after.of(going, self.model), first, wanted, self.ends)
            self.greedy.update({rows[k]: tokens for k, tokens in zip(going, said, strict=True)})


def cut(tokens: list[int], wanted: Wanted, ends: set[int]) -> list[int]:
    """The tokens up to the first end token (with it), at most as many as are wanted."""
    stop = next((k + 1 for k, t in enumerate(tokens) if t in ends), len(tokens))
    return tokens[: min(stop, wanted.room)]
