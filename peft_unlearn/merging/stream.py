"""Merging from safetensors shards into safetensors shards, a block of rows at a time, without building the model.

Each shard is read once from front to back and written under its own name. Tensors that no adapter touches are copied byte
for byte, or cast where another dtype was asked for; to the others their delta is added (`rounding.Adder`). What is read and
what is written is hashed on the way, so that the base's digest is that of the very bytes that went into the sum. Memory holds
some blocks of a few MB and the factors of a few weights, whatever the checkpoint's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UserError
from ..folder.safetensors_io import TORCH_NAMES, TensorEntry
from ..tuners.delta import Deltas
from .layout import Layout, Product, Slab, Unit
from .pipeline import SIZE, Pipeline, Ring
from .rounding import Adder, Overflow, Sums, blocks, cast_block, generator

if TYPE_CHECKING:
    from ..tuners.forget_vector.delta import VectorDeltas
    from ..tuners.sparse.delta import SparseDeltas

_FLOATS = {"F64", "F32", "F16", "BF16"}
_SAFE = {v: k for k, v in TORCH_NAMES.items()}


class Overlay:
    """The sum of several adapters' deltas, each times its scale, by weight and expert."""

    def __init__(self, parts: Sequence[tuple[Deltas | SparseDeltas | VectorDeltas, float]]) -> None:
        self.parts = [(d, s) for d, s in parts if s != 0]

    def units(self) -> dict[str, list[int | None]]:
        """weight -> its experts with a delta, [None] for a weight that is no stack of experts; [] where every delta is zero."""
        found: dict[str, set[int | None]] = {}
        for deltas, _ in self.parts:
            for weight, row in deltas.adapted.items():
                touched = deltas.touched(weight)
                found.setdefault(weight, set()).update(touched if row.fused else [None] * len(touched))
        return {w: sorted(e, key=lambda i: i or 0) for w, e in found.items()}

    def product(self, weight: str, expert: int | None) -> Product | None:
        found = [(d.product(weight, expert), scale) for d, scale in self.parts if weight in d]
        if not found:
            return None
        pairs = [(left * scale, right) for (left, right), scale in found]
        rights = [right for _, right in pairs if right is not None]
        if len(rights) < len(pairs):  # a sparse adapter among them
            return torch.stack([left if right is None else left @ right for left, right in pairs]).sum(0), None
        return torch.cat([left for left, _ in pairs], dim=1), torch.cat(rights)

    def refuse_tied(self, model: nn.Module) -> None:
        """Raise `UserError` where an adapted weight is the same tensor as another."""
        same: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            same.setdefault(id(parameter), []).append(name)
        names = {n: names for names in same.values() for n in names if len(names) > 1}
        for weight in (w for deltas, _ in self.parts for w in deltas if w in names):
            other = next(n for n in names[weight] if n != weight)
            raise UserError(
                f"The adapted weight {weight} is tied to {other}: merging into one would change both. Serve the adapter "
                "unmerged, or untie the two in a copy of the base and train there."
            )


def empty_table(units: Mapping[str, Sequence[int | None]]) -> dict[Unit, Sums]:
    """A row for every unit, and one for each weight that has none."""
    return {(weight, expert): Sums() for weight, experts in units.items() for expert in experts or [None]}


class Stream:
    """One merge, into tensors of `dtype` (by torch's name). units: what gets a delta; wide: patterns of what stays float32.

    Raises:
        UserError: a weight whose way back to the files is not known, or quantized tensors.
    """

    def __init__(self, layout: Layout, overlay: Overlay, dtype: str, rounding: str = "nearest", seed: int = 0) -> None:
        self.layout, self.overlay = layout, overlay
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.seed = seed if rounding == "stochastic" else None
        self.wide = wide_patterns(layout.model, self.dtype)
        self.units = overlay.units()
        self.slabs: dict[str, list[Slab]] = {}
        self._rings = Ring(), Ring()
        self._adders: dict[torch.dtype, Adder] = {}
        lost: dict[str, str] = {}
        for weight, experts in self.units.items():
            try:
                for name, slabs in layout.slabs(weight, experts).items() if experts else ():
                    self.slabs.setdefault(name, []).extend(slabs)
                    self._try(name, slabs[0])
            except LookupError as e:
                lost[weight] = str(e)
        layout.clear()
        if lost:
            first, why = next(iter(lost.items()))
            raise UserError(
                f"{len(lost)} adapted weights cannot be found in the base's files in the layout that transformers loads "
                f"them by ({', '.join(list(lost)[:4])}; {first}: {why}). Merge with --in-memory, which builds the model."
            )
        if odd := [n for n in self.slabs if layout.entries[n].dtype not in _FLOATS]:
            raise UserError(
                f"The base holds {odd[0]!r} as {layout.entries[odd[0]].dtype}, which is quantized; a sum needs plain "
                "numbers. Merge into the model that was quantized, and quantize the result."
            )

    def _product(self, name: str, slab: Slab) -> Product:
        return self.layout.product(name, slab.unit, self.overlay.product)

    def _try(self, name: str, slab: Slab) -> None:
        """One slab's way to disk and its shape there, before anything is written."""
        left, right = self._product(name, slab)
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

    def size(self, entry: TensorEntry) -> int:
        """Bytes of a tensor in the output."""
        kind = getattr(torch, TORCH_NAMES.get(self.out_dtype(entry), ""), None)
        return entry.end - entry.begin if kind is None else math.prod(entry.shape) * kind.itemsize

    def write(self, entries: Sequence[TensorEntry], out: Path) -> dict[str, Any]:
        """Write one shard; its record: {"tensors": {name: {dtype, shape, in, out}}, "sums": [[weight, expert, ..]]}."""
        order = sorted(entries, key=lambda e: e.begin)
        if any(self.out_dtype(e) != e.dtype for e in order):  # as the format's own writer: every tensor aligned
            order.sort(key=lambda e: -(self.size(e) // max(1, math.prod(e.shape))))
        rows: dict[str, dict[str, Any]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for e in order:
            rows[e.name] = {"dtype": self.out_dtype(e), "shape": list(e.shape)}
            header[e.name] = {**rows[e.name], "data_offsets": [at, at := at + self.size(e)]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        sums: dict[Unit, Sums] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            source = stack.enter_context(open(order[0].file, "rb", buffering=0))
            target = stack.enter_context(open(out, "wb", buffering=0))
            pipe = stack.enter_context(Pipeline(source, target, self._rings))
            target.write(len(text).to_bytes(8, "little") + text)
            hashes = []
            for e in order:
                source.seek(e.begin)
                hashes.append(self._send(e, pipe, sums))
            pipe.finish()
        for e, (read, written) in zip(order, hashes, strict=True):
            rows[e.name] |= {"in": read.hexdigest(), "out": written.hexdigest()}
        return {"tensors": rows, "sums": [[w, x, *vars(s).values()] for (w, x), s in sums.items()]}

    def _send(self, entry: TensorEntry, pipe: Pipeline, sums: dict[Unit, Sums]) -> tuple[Any, Any]:
        """Send one tensor on its way; (hash of what is read, hash of what is written), complete once the pipe is finished."""
        target, touched = self.out_dtype(entry), entry.name in self.slabs
        if not touched and target == entry.dtype:
            sha = pipe.copy(entry)
            return sha, sha
        dtype = getattr(torch, TORCH_NAMES[target])
        adder = self._adders.setdefault(dtype, Adder(dtype))
        rng = None if self.seed is None or not touched else generator(self.seed, entry.name)
        tensor = _Passing(entry, dtype, pipe)
        try:
            for shape, slab in self._pieces(entry):
                product = None if slab is None else self._product(entry.name, slab)
                for rows, w, out in tensor.blocks(shape):
                    if slab is None or product is None:
                        cast_block(w, out)
                    else:
                        kept = adder(w, product[0][rows], product[1], out, rng)
                        sums.setdefault(slab.unit, Sums()).add(kept)
        except Overflow:
            what, kind = "the merged weight" if touched else "the base's weight", TORCH_NAMES[target]
            raise UserError(f"{entry.name}: {what} does not fit {kind}; use float32.") from None
        return tensor.read, tensor.written

    def _pieces(self, entry: TensorEntry) -> Iterator[tuple[Sequence[int], Slab | None]]:
        """The tensor from front to back in pieces of one delta each: (shape, slab), or (shape, None) where nothing is added."""
        slabs = self.slabs.get(entry.name)
        if slabs is None:
            yield (math.prod(entry.shape),), None
        elif slabs[0].index is None:
            yield entry.shape, slabs[0]
        else:
            by_index = {s.index: s for s in slabs}
            for i in range(entry.shape[0]):
                yield entry.shape[1:], by_index.get(i)


class _Passing:
    """A tensor that passes through the pipe: what is read of it and what is written. read, written: their hashes."""

    def __init__(self, entry: TensorEntry, dtype: torch.dtype, pipe: Pipeline) -> None:
        self.entry, self.pipe = entry, pipe
        self.kinds: tuple[torch.dtype, torch.dtype] = getattr(torch, TORCH_NAMES[entry.dtype]), dtype
        self.read, self.written = hashlib.sha256(), hashlib.sha256()

    def blocks(self, shape: Sequence[int]) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """The next piece as (rows, their values (n, columns), room to fill (n, columns)), block after block."""
        rows, columns = shape[0], math.prod(shape[1:])
        (old, new), entry, pipe = self.kinds, self.entry, self.pipe
        step = max(1, SIZE // max(1, columns * max(old.itemsize, new.itemsize)))
        for top in range(0, rows, step):
            n = min(step, rows - top)
            raw, done = pipe.take(entry, self.read, n * columns * old.itemsize), pipe.room(n * columns * new.itemsize)
            w, out = raw.view(old).view(n, columns), done.view(new).view(n, columns)
            for part in blocks(n, columns):
                yield slice(top + part.start, top + part.stop), w[part], out[part]
            pipe.write(self.written, done)


def wide_patterns(model: Any, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """What the model's class keeps in float32 when it is loaded as `dtype` (a router's bias, say)."""
    plan = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    return [re.compile(name.replace("*", ".*")) for name, kind in plan.items() if kind == torch.float32]


def shards(entries: Iterable[TensorEntry]) -> dict[Path, list[TensorEntry]]:
    """Shard -> its tensors, as the index has them."""
    out: dict[Path, list[TensorEntry]] = {}
    for e in entries:
        out.setdefault(Path(e.file), []).append(e)
    return out
