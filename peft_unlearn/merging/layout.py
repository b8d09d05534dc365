"""Where a weight of the model in memory lies in the checkpoint's files, and its delta in the files' layout.

Loading may rename, concatenate, stack and permute what is on disk: one fused tensor of experts in memory is often two files
entries per expert. No family is named here. The base is built on the meta device (no weights), transformers is asked for
the transforms that it would load this model by (`conversion_mapping`), each name on disk is passed through them, and the
delta goes back through their own reverse. What is sent back is not the delta but its left factor: renaming, stacking,
cutting and permuting rows do the same to L as to L @ R, so that memory stays bounded whatever the weight's size. Transforms
that also touch columns get the dense delta of one expert, or one weight. Every transform is checked to be undone by its own
forward direction; names for which that fails are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..folder.base import load_config, on_meta
from ..folder.safetensors_io import TensorEntry

Product = tuple[Tensor, Tensor | None]
"""(L, R): the delta is L @ R, or L itself where R is None. float32, rows by columns."""
Unit = tuple[str, int | None]
"""(weight in memory, expert), the expert None for a weight that is no stack of experts."""
Factors = Callable[[str, int | None], Product | None]
"""(weight, expert) -> the delta in memory, None if there is none."""
_ROWS = {"MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split", "Interleave", "PermuteForRope"}
_KEPT = 4


@dataclass(frozen=True)
class Slab:
    """A part of a tensor on disk that one weight, or one expert of it, gives the delta of.

    index: along the first dimension of the tensor on disk; None: the whole tensor. unit: in memory, the row of the table that
    it counts for.
    """

    index: int | None
    unit: Unit


@dataclass
class _Group:
    """What is on disk for one weight, or several that are converted together. sources: pattern -> names, in order."""

    first: str
    targets: list[str]
    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)


class Layout:
    """Of the checkpoint in `base_dir`, whose tensors are `entries`. `model`: the base on the meta device."""

    def __init__(self, base_dir: Path, entries: Mapping[str, TensorEntry], fits: Iterable[str] = ()) -> None:
        self.entries = entries
        self.model = meta_model(base_dir, fits)
        self.memory: dict[str, str] = {}  # name on disk -> (first) name in memory
        self._groups: dict[str, _Group] = {}
        self._products: OrderedDict[Any, dict[str, Product]] = OrderedDict()
        self._read_names()

    def slabs(self, weight: str, experts: list[int | None]) -> dict[str, list[Slab]]:
        """Name on disk -> the slabs of it that `weight` (of fused experts: these) gives a delta to.

        Raises:
            LookupError: the way back from memory to disk is not known; with the reason.
        """
        group = self._groups.get(weight)
        if group is None:
            raise LookupError("no tensor on disk is loaded into it")
        if any(t not in self._groups for t in group.targets):
            raise LookupError(f"what {_ops(group.converter)} makes has names that are not in the model")
        shape = self._shape(weight)
        fused = len(shape) == 3
        names = [n for ns in group.sources.values() for n in ns]
        if group.converter is None:
            if len(names) > 1:
                raise LookupError(f"{names[0]} and {names[1]} are both loaded into it")
            if self.entries[names[0]].shape != shape:
                raise LookupError(f"it is {list(shape)} in memory and {list(self.entries[names[0]].shape)} on disk")
            return {names[0]: [Slab(e, (weight, e)) for e in experts] if fused else [Slab(None, (weight, None))]}
        per_expert = self._per_expert(group, shape) if fused else None
        if per_expert is None:
            if fused:
                raise LookupError(f"its experts are mixed by {_ops(group.converter)}")
            if any(len(ns) != 1 for ns in group.sources.values()):
                raise LookupError(f"{_ops(group.converter)} joins a list of tensors into it")
            return {ns[0]: [Slab(None, (weight, None))] for ns in group.sources.values()}
        out: dict[str, list[Slab]] = {}
        for ns in group.sources.values():
            for e in (e for e in experts if e is not None):
                name, index = (ns[e], None) if per_expert == "listed" else (ns[0], e)
                out.setdefault(name, []).append(Slab(index, (weight, e)))
        return out

    def product(self, name: str, unit: Unit, factors: Factors) -> Product:
        """The delta of a slab in the layout on disk."""
        weight, expert = unit
        group = self._groups[weight]
        if group.converter is None:
            found = factors(weight, expert)
            assert found is not None
            return found
        key = (group.first, expert)
        if key not in self._products:
            self._products[key] = self._back(group, expert, factors)
            while len(self._products) > _KEPT:
                self._products.popitem(last=False)
        self._products.move_to_end(key)
        pattern = next(p for p, names in group.sources.items() if name in names)
        return self._products[key][pattern]

    def clear(self) -> None:
        """Forget the deltas kept for the next call."""
        self._products.clear()

    # --- names --------------------------------------------------------------------------------------------------------

    def _read_names(self) -> None:
        """As transformers' loader goes through a checkpoint, without its tensors."""
        from transformers import conversion_mapping
        from transformers import core_model_loading as loading

        transforms = conversion_mapping.get_model_conversion_mapping(self.model)  # type: ignore[arg-type]
        renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        live = self.model.state_dict()
        prefix: str = self.model.base_model_prefix  # type: ignore[assignment]
        for name in sorted(self.entries, key=loading.dot_natural_key):
            found, pattern = loading.rename_source_key(name, renamings, converters, prefix, live)
            if found not in live and name in live:
                found, pattern = loading.rename_source_key(name, [], [], prefix, live)
            if found not in live:
                continue  # the class does not load it: copied as it is
            self.memory[name] = found
            if found not in self._groups:
                group = _group(found, None if pattern is None else by_pattern[pattern])
                self._groups |= dict.fromkeys(
                    group.targets if all(t in live for t in group.targets) else [found], group
                )
            self._groups[found].sources.setdefault(pattern or name, []).append(name)

    def _shape(self, weight: str) -> tuple[int, ...]:
        return tuple(self.model.get_parameter(weight).shape)

    # --- transforms ---------------------------------------------------------------------------------------------------

    def _per_expert(self, group: _Group, shape: tuple[int, ...]) -> str | None:
        """ "listed": a tensor on disk for each expert; "fused": one for all; None: not expert by expert."""
        ops = group.converter.operations
        lists = [len(ns) for ns in group.sources.values()]
        merged = bool(ops) and type(ops[0]).__name__ == "MergeModulelist" and ops[0].dim == 0
        rest = ops[1:] if merged else ops
        dims = [d for op in rest for d in _dims(op)]
        if len(group.targets) > 1 or any(d is None or d < 1 for d in dims):
            return None
        if merged and all(n == shape[0] for n in lists):
            return "listed"
        return "fused" if not merged and all(n == 1 for n in lists) else None

    def _back(self, group: _Group, expert: int | None, factors: Factors) -> dict[str, Product]:
        """pattern on disk -> the delta there, by the converter's own reverse; checked by its own forward."""
        found = {t: factors(t, expert) for t in group.targets}
        shapes = {t: self._shape(t) if expert is None else self._shape(t)[1:] for t in found}
        factored = all(p is None or p[1] is not None for p in found.values())
        moved, right = (_left_factors if factored and self._moves_rows_alone(group) else _whole_deltas)(found, shapes)
        out = self._reverse(group, moved if expert is None else {t: x[None] for t, x in moved.items()})
        one = {p: x[0] if expert is not None and x.shape[0] == 1 and x.dim() == 3 else x for p, x in out.items()}
        return {p: (x.flatten(1), right) for p, x in one.items()}

    def _moves_rows_alone(self, group: _Group) -> bool:
        """Whether the converter does the same to a delta's left factor as to the delta itself."""
        rows = 1 if len(self._shape(group.first)) == 3 else 0
        return all(
            type(op).__name__ in _ROWS and all(d == rows for d in _dims(op, True)) for op in group.converter.operations
        )

    def _reverse(self, group: _Group, left: dict[str, Tensor]) -> dict[str, Tensor]:
        forward = group.converter
        reverse = forward.reverse_transform()
        given = {p: [left[t]] for p, t in zip(reverse.source_patterns, group.targets, strict=True)}
        out = self._run(reverse, {p: list(ts) for p, ts in given.items()}, group.first)
        by_pattern: dict[str, Tensor] = {}
        for pattern, name in zip(forward.source_patterns, reverse.target_patterns, strict=True):
            tensor = out.get(name, out.get(name.replace("*", "0")))
            if tensor is not None and pattern in group.sources:
                by_pattern[pattern] = tensor[0] if isinstance(tensor, list) else tensor
        if set(by_pattern) != set(group.sources):
            raise LookupError(f"{_ops(forward)} could not be reversed")
        again = self._run(forward, {p: [t.clone()] for p, t in by_pattern.items()}, group.first)
        for target, pattern in zip(group.targets, forward.target_patterns, strict=True):
            tensor = again.get(pattern)
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            if tensor is None or tensor.shape != left[target].shape or not torch.equal(tensor, left[target]):
                raise LookupError(f"reversing {_ops(forward)} and applying it again gave something else")
        return by_pattern

    def _run(self, transform: Any, tensors: dict[str, Any], first: str) -> dict[str, Any]:
        try:
            for op in transform.operations:
                tensors = op.convert(
                    tensors, source_patterns=transform.source_patterns, target_patterns=transform.target_patterns,
                    full_layer_name=first, model=self.model, config=self.model.config, missing_keys=None,
                )  # fmt: skip
        except Exception as e:  # not documented functions: whatever goes wrong in them, there is no way back
            raise LookupError(f"{_ops(transform)} failed ({type(e).__name__}: {e})") from None
        return tensors


def meta_model(base_dir: Path, fits: Iterable[str] = ()) -> nn.Module:
    """As `load_base`, without the weights. Raises `UserError` for quantized files."""
    quantized = getattr(load_config(base_dir), "quantization_config", None)
    if quantized is None:
        return on_meta(base_dir, fits).eval()
    kind = (
        quantized.get("quant_method", "?") if isinstance(quantized, dict) else getattr(quantized, "quant_method", "?")
    )
    raise UserError(
        f"base {base_dir}: its files are quantized ({kind}), and a sum needs weights that are plain numbers. Merge into the "
        "model that was quantized and quantize the result; or load this one dequantized, save it, and merge with --onto."
    )


def _dims(op: Any, rows: bool = False) -> list[int | None]:
    """The dimensions that an operation rearranges; None: not known. rows: leave out those of stacking, checked before."""
    kind = type(op).__name__
    if kind in ("MergeModulelist", "SplitModulelist") and rows:
        return []
    if kind == "PermuteForRope":
        return [0]
    if kind == "Transpose":
        return [op.dim0, op.dim1]
    return [getattr(op, "dim", None)]


def _group(found: str, converter: Any) -> _Group:
    """What `converter` (None: nothing) makes of files for the weight `found` and others made together with it."""
    patterns = [found] if converter is None else converter.target_patterns
    return _Group(found, [found.replace(patterns[0], t) for t in patterns], converter)


def _left_factors(
    found: Mapping[str, Product | None], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each delta's left factor in columns of its own, and all right factors below each other: their products are the deltas."""
    rights = [p[1] for p in found.values() if p is not None and p[1] is not None]
    moved = {t: torch.zeros(shape[0], sum(len(r) for r in rights)) for t, shape in shapes.items()}
    at = 0
    for target, product in found.items():
        if product is not None:
            width = product[0].shape[1]
            moved[target][:, at : at + width] = product[0]
            at += width
    return moved, torch.cat(rights)


def _whole_deltas(
    found: Mapping[str, Product | None], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The deltas themselves, zero where there is none."""
    dense = {t: None if p is None else p[0] if p[1] is None else p[0] @ p[1] for t, p in found.items()}
    return {t: torch.zeros(shapes[t]) if d is None else d.reshape(shapes[t]) for t, d in dense.items()}, None


def _ops(transform: Any) -> str:
    return " + ".join(type(op).__name__ for op in transform.operations)
