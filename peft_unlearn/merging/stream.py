"""Merging from safetensors shards into safetensors shards, a block of rows at a time, without building the model.

Each shard is read once from front to back and written under its own name. Tensors that no adapter touches are copied byte
for byte, or cast where another dtype was asked for; the others go through `rounding.merge_block`. What is read and what is
written is hashed on the way, so that the base's digest is that of the very bytes that went into the sum. Memory holds some
blocks of a few MB and the factors of a few weights, whatever the checkpoint's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..folder.safetensors_io import TORCH_NAMES, TensorEntry
from .delta import Deltas
from .layout import Layout, Product, Slab
from .pipeline import SIZE, Buffers, Pipeline
from .rounding import Adder, Overflow, Sums, blocks, cast_block, generator

Unit = tuple[str, int | None]
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SAFE = {v: k for k, v in TORCH_NAMES.items()}


class Overlay:
    """The sum of several adapters' deltas, each times its scale, by weight and expert."""

    def __init__(self, parts: Sequence[tuple[Deltas, float]]) -> None:
        self.parts = [(d, s) for d, s in parts if s != 0]

    def units(self) -> dict[str, list[int]]:
        """weight -> its experts with a delta ([0] for a weight that is none); [] where every delta is zero."""
        found: dict[str, set[int]] = {}
        for deltas, _ in self.parts:
            for weight in deltas:
                found.setdefault(weight, set()).update(deltas.touched(weight))
        return {w: sorted(e) for w, e in found.items()}

    def product(self, weight: str, expert: int | None) -> Product | None:
        lefts, rights = [], []
        for deltas, scale in self.parts:
            if weight in deltas:
                left, right = deltas.product(weight, expert)
                lefts.append(left * scale)
                rights.append(right)
        if not lefts:
            return None
        return torch.cat(lefts, dim=1), torch.cat(rights)


class Stream:
    """One merge. dtype: of the output, by torch's name; keep: names in memory that stay float32 (patterns)."""

    def __init__(self, layout: Layout, overlay: Overlay, dtype: str, rounding: str = "nearest", seed: int = 0) -> None:
        self.layout, self.overlay = layout, overlay
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.seed = seed if rounding == "stochastic" else None
        self._buffers = Buffers()
        self._adders: dict[torch.dtype, Adder] = {}
        self.wide = wide_patterns(layout.model, self.dtype)
        self.slabs: dict[str, list[Slab]] = {}
        self.units: dict[Unit, Sums] = {}
        lost: dict[str, str] = {}
        for weight, experts in overlay.units().items():
            fused = any(deltas.adapted[weight].fused for deltas, _ in overlay.parts if weight in deltas)
            if not experts:
                self.units[weight, None] = Sums()
                continue
            try:
                for name, slabs in layout.slabs(weight, experts).items():
                    self.slabs.setdefault(name, []).extend(slabs)
                    self._try(name, slabs[0])
            except LookupError as e:
                lost[weight] = str(e)
            for e in experts:
                self.units[weight, e if fused else None] = Sums()
        layout.clear()
        if lost:
            first, why = next(iter(lost.items()))
            raise UserError(
                f"{len(lost)} adapted weights cannot be found in the base's files in the layout that transformers loads "
                f"them by ({', '.join(list(lost)[:4])}; {first}: {why}). Merge with --in-memory, which builds the model."
            )
        odd = [n for n in self.slabs if layout.entries[n].dtype not in _FLOATS]
        if odd:
            raise UserError(
                f"The base holds {odd[0]!r} as {layout.entries[odd[0]].dtype}, which is quantized; a sum needs plain "
                "numbers. Merge into the model that was quantized, and quantize the result."
            )

    def _try(self, name: str, slab: Slab) -> None:
        """One slab's way to disk and its shape there, before anything is written."""
        left, right = self.layout.product(name, slab.unit, self.overlay.product)
        shape = self.layout.entries[name].shape
        shape = shape if slab.index is None else shape[1:]
        columns = left.shape[1] if right is None else right.shape[1]
        if (left.shape[0], columns) != (shape[0], math.prod(shape[1:])):
            raise LookupError(f"its delta is {[left.shape[0], columns]} on disk, where {name} is {list(shape)}")

    def out_dtype(self, entry: TensorEntry) -> str:
        """The output's dtype of a tensor, as safetensors spells it: integers and booleans stay what they are."""
        if entry.dtype not in _FLOATS:
            return entry.dtype
        memory = self.layout.memory.get(entry.name, entry.name)
        wide = any(p.search(memory) for p in self.wide)
        return "F32" if wide else _SAFE[str(self.dtype).removeprefix("torch.")]

    def shard_bytes(self, entries: Sequence[TensorEntry]) -> int:
        return sum(self._size(e) for e in entries)

    def _size(self, entry: TensorEntry) -> int:
        kind = getattr(torch, TORCH_NAMES.get(self.out_dtype(entry), ""), None)
        return entry.end - entry.begin if kind is None else math.prod(entry.shape) * kind.itemsize

    def write(self, entries: Sequence[TensorEntry], out: Path) -> dict[str, Any]:
        """Write one shard; its record: {"tensors": {name: {dtype, shape, in, out}}, "sums": [[weight, expert, ..]]}."""
        source = entries[0].file
        order = sorted(entries, key=lambda e: e.begin)
        if any(self.out_dtype(e) != e.dtype for e in order):  # as the format's own writer: every tensor aligned
            order.sort(key=lambda e: -(self._size(e) // max(1, math.prod(e.shape))))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for e in order:
            header[e.name] = {
                "dtype": self.out_dtype(e),
                "shape": list(e.shape),
                "data_offsets": [at, at + self._size(e)],
            }
            at += self._size(e)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        sums: dict[Unit, Sums] = {}
        rows: dict[str, dict[str, Any]] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            f = stack.enter_context(open(source, "rb", buffering=0))
            g = stack.enter_context(open(out, "wb", buffering=0))
            pipe = stack.enter_context(Pipeline(f, g, self._buffers))
            g.write(len(text).to_bytes(8, "little") + text)
            shas = {e.name: self._tensor(e, f, pipe, sums) for e in order}
            pipe.finish()
        for e in order:
            a, b = shas[e.name]
            rows[e.name] = {
                "dtype": header[e.name]["dtype"],
                "shape": list(e.shape),
                "in": a.hexdigest(),
                "out": b.hexdigest(),
            }
        return {"tensors": rows, "sums": [[w, x, *vars(s).values()] for (w, x), s in sums.items()]}

    def _tensor(self, entry: TensorEntry, f: Any, pipe: Pipeline, sums: dict[Unit, Sums]) -> tuple[Any, Any]:
        """Send one tensor on its way; (hash of what was read, hash of what is written)."""
        target = self.out_dtype(entry)
        slabs = self.slabs.get(entry.name)
        f.seek(entry.begin)
        if slabs is None and target == entry.dtype:
            sha = pipe.copy(entry)
            return sha, sha
        read, written = hashlib.sha256(), hashlib.sha256()
        kind, dtype = getattr(torch, TORCH_NAMES[entry.dtype]), getattr(torch, TORCH_NAMES[target])
        adder = self._adders.setdefault(dtype, Adder(dtype))
        rng = None if self.seed is None or slabs is None else generator(self.seed, entry.name)

        def through(shape: Sequence[int], product: Product | None, unit: Unit | None) -> None:
            rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)
            step = max(1, SIZE // max(1, columns * max(kind.itemsize, dtype.itemsize)))
            for top in range(0, rows, step):
                n = min(step, rows - top) * columns
                raw, done = pipe.take(n * kind.itemsize, users=2), pipe.take(n * dtype.itemsize, users=2)
                pipe.read(entry, raw.bytes)
                pipe.hash_read(read, raw)
                w, out = raw.bytes.view(kind).view(-1, columns), done.bytes.view(dtype).view(-1, columns)
                for part in blocks(w.shape[0], columns):
                    if product is None or unit is None:
                        cast_block(w[part], out[part])
                    else:
                        left = product[0][top + part.start : top + part.stop]
                        sums.setdefault(unit, Sums()).add(adder(w[part], left, product[1], out[part], rng))
                raw.release()
                pipe.write(written, done)

        try:
            if slabs is None:
                through([math.prod(entry.shape)] if entry.shape else [], None, None)
            elif slabs[0].index is None:
                through(
                    entry.shape, self.layout.product(entry.name, slabs[0].unit, self.overlay.product), slabs[0].unit
                )
            else:
                by_index = {s.index: s.unit for s in slabs}
                for i in range(entry.shape[0]):
                    unit = by_index.get(i)
                    found = None if unit is None else self.layout.product(entry.name, unit, self.overlay.product)
                    through(entry.shape[1:], found, unit)
        except Overflow:
            what = "the merged weight" if slabs else "the base's weight"
            raise UserError(
                f"{entry.name}: {what} does not fit {str(dtype).removeprefix('torch.')}; use float32."
            ) from None
        return read, written


def wide_patterns(model: Any, dtype: torch.dtype) -> list[Any]:
    """What the model's class keeps in float32 when it is loaded as `dtype` (a router's bias, say)."""
    import re

    plan = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return [re.compile(name.replace("*", ".*")) for name, kind in plan.items() if kind == torch.float32]


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder) if hasattr(os, "statvfs") else None
    return math.inf if found is None else found.f_bavail * found.f_frsize  # type: ignore[return-value]


def shards(entries: Mapping[str, TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Shard path -> its tensors, as the index has them."""
    out: dict[str, list[TensorEntry]] = {}
    for e in entries.values():
        out.setdefault(str(e.file), []).append(e)
    return out
