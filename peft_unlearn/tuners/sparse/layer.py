"""The layer of the sparse tuner: a module of any kind, run with trained values added to chosen entries of its parameters.

Linear layers and Conv1D go through an autograd function that keeps the input and the base's own weight, and makes ``W + D`` once more
in backward; of every other module the parameters are exchanged for ``W + D`` during its forward, and what autograd would save of that
sum is made again in the same way. So no copy of a weight outlives a forward, and the base's weights get a gradient where they require
one. Either way the base layer itself is called: its hooks run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..peft_type import SPARSE_PREFIX
from ..selection import Selection
from .config import SparseConfig

VALUES, INDICES = f"{SPARSE_PREFIX}values", f"{SPARSE_PREFIX}indices"
SAMPLED = 0.25  # density from which on the gradient of a whole weight takes less time than that of the entries alone
Pair = tuple[Tensor, Tensor]  # flat positions (k,), and what is added there (k,)


class SparseLayer(nn.Module, BaseTunerLayer):
    """Per adapter one vector of values and one of positions: those of each adapted parameter, one parameter after the other."""

    adapter_layer_names = (VALUES,)
    other_param_names = ("scaling", "counts", INDICES)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: SparseConfig, parts: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, VALUES, nn.ParameterDict())
        setattr(self, INDICES, BufferDict(persistent=True))
        self.scaling: dict[str, float] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.merged_adapters: list[str] = []
        self._backup: list[tuple[str, Tensor, Tensor]] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, parts)

    def update_layer(self, adapter_name: str, config: SparseConfig, parts: Mapping[str, str]) -> None:
        """Add an adapter. parts: the module's parameter -> its name in the base, which `config` knows it by."""
        assert config.counts is not None
        self.scaling[adapter_name] = float(config.scale)
        self.place(adapter_name, {p: config.counts[n] for p, n in parts.items()}, _positions(config.chosen, parts))
        values = self.values(adapter_name)
        if not config.init_weights:
            nn.init.normal_(values, std=0.02)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def place(
        self, adapter: str, counts: Mapping[str, int], positions: Tensor | None, values: Tensor | None = None
    ) -> None:
        """Set the adapter's entries; without `positions` (an adapter that is about to be loaded) they are no places at all."""
        k, weights = sum(counts.values()), [self.parameter(p) for p in counts]
        device = weights[0].device
        wide = any(w.numel() >= 2**31 for w in weights)
        if positions is None:
            positions = torch.full((k,), -1)
        self.counts[adapter] = dict(counts)
        getattr(self, INDICES)[adapter] = positions.to(device, torch.int64 if wide else torch.int32)
        if values is None:
            values = torch.zeros(k, device=device, dtype=torch.promote_types(weights[0].dtype, torch.float32))
        getattr(self, VALUES)[adapter] = nn.Parameter(values)

    def values(self, adapter: str) -> Tensor:
        """(k,), float32 on a half-precision base too."""
        return getattr(self, VALUES)[adapter]

    def positions(self, adapter: str) -> Tensor:
        """(k,), flat positions in each of the adapted parameters."""
        return getattr(self, INDICES)[adapter]

    def parameter(self, name: str) -> Tensor:
        """A parameter of the base layer."""
        found = self.get_base_layer()._parameters[name]
        assert found is not None
        return found

    def entries(self, adapter: str) -> dict[str, Pair]:
        """Parameter -> (positions int64, values times scaling) of one adapter."""
        counts = self.counts[adapter]
        positions = self.positions(adapter).split(list(counts.values()))
        values = (self.values(adapter) * self.scaling[adapter]).split(list(counts.values()))
        return {n: (i.long(), v) for n, i, v in zip(counts, positions, values, strict=True)}

    def added(self, adapters: Iterable[str]) -> dict[str, list[Pair]]:
        """Parameter -> what the adapters add to it, in their order."""
        out: dict[str, list[Pair]] = {}
        for adapter in adapters:
            for name, pair in self.entries(adapter).items():
                out.setdefault(name, []).append(pair)
        return out

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer gives with the adapted parameters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        live = [] if self.disable_adapters or self.merged else [a for a in self.active_adapters if a in self.scaling]
        if not live:
            return self.base_layer(*args, **kwargs)
        added, base = self.added(live), self.base_layer
        linear = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in vars(base)
        if linear and list(added) == ["weight"]:
            return _with_forward(base, partial(_linear, base, added["weight"]))(*args, **kwargs)
        sums = {n: _Sum.apply(self.parameter(n), *sum(pairs, ())) for n, pairs in added.items()}
        again = [(s, partial(_sum, self.parameter(n), _detached(added[n]))) for n, s in sums.items()]
        with _made_again(again):
            return torch.func.functional_call(base, sums, args, kwargs)

    # --- merge -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters (default: the active ones) into the base's weights: the very numbers that a forward computes with."""
        for adapter in (n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling):
            new = []
            for name, (i, d) in self.entries(adapter).items():
                flat = self.parameter(name).data.view(-1)
                old = flat[i]
                new.append((name, i, old, _plus(old, d)))
                if safe_merge and not torch.isfinite(new[-1][3]).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            for name, i, old, value in new:
                self.parameter(name).data.view(-1)[i] = value
                self._backup.append((name, i, old))
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back, bit for bit, what `merge` wrote over."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, i, old in reversed(self._backup):
            self.parameter(name).data.view(-1)[i] = old
        self._backup.clear()
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str, parameter: str = "weight") -> Tensor:
        """What the adapter adds to a parameter, in its shape."""
        i, d = self.entries(adapter)[parameter]
        return d.new_zeros(self.parameter(parameter).numel()).index_copy(0, i, d).view(self.parameter(parameter).shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # of high rank

    def __repr__(self) -> str:
        return "sparse." + super().__repr__()


def _positions(chosen: Selection | None, parts: Mapping[str, str]) -> Tensor | None:
    return None if chosen is None else torch.cat([chosen.indices[n] for n in parts.values()])


# --- W + D -----------------------------------------------------------------------------------------------------------


def _plus(old: Tensor, d: Tensor) -> Tensor:
    """Entries with their delta, rounded once."""
    return (old.to(torch.promote_types(old.dtype, d.dtype)) + d).to(old.dtype)


def _sum(weight: Tensor, pairs: Iterable[Pair]) -> Tensor:
    """A new tensor: `weight` with each pair added, one after the other; as `merge` does it. IndexError for what is no place in it."""
    out = weight.detach().clone(memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for i, d in pairs:
        flat.index_copy_(0, i, _plus(flat.index_select(0, i), d.detach()))
    return out


def _detached(pairs: Iterable[Pair]) -> list[Pair]:
    return [(i, d.detach()) for i, d in pairs]


def _pairs(flat: tuple[Tensor, ...]) -> list[Pair]:
    return list(zip(flat[::2], flat[1::2], strict=True))


class _Sum(torch.autograd.Function):
    """(weight, positions, values, positions, values, ..) -> their sum."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *flat: Tensor) -> Tensor:
        ctx.save_for_backward(*flat[::2])
        ctx.kinds = [d.dtype for d in flat[1::2]]
        return _sum(weight, _pairs(flat))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        out: list[Tensor | None] = [g if ctx.needs_input_grad[0] else None]
        for n, (i, kind) in enumerate(zip(ctx.saved_tensors, ctx.kinds, strict=True)):
            out += [None, g.reshape(-1).index_select(0, i).to(kind) if ctx.needs_input_grad[2 * n + 2] else None]
        return tuple(out)


class _Linear(torch.autograd.Function):
    """x (.., in) times W + D, in `dtype`. transposed: W lies as (in, out) instead of (out, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, dtype: torch.dtype, *flat: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *flat)  # the base's own weight: no copy
        ctx.transposed, ctx.dtype, ctx.bias = transposed, dtype, None if bias is None else bias.dtype
        w = _sum(weight, _pairs(flat)).to(dtype)
        return F.linear(x.to(dtype), w.t() if transposed else w, None if bias is None else bias.to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight, *flat = ctx.saved_tensors
        needs, pairs = ctx.needs_input_grad, _pairs(tuple(flat))
        gx = gw = gb = None
        if needs[0]:
            w = _sum(weight, pairs).to(ctx.dtype)
            gx = (g @ (w.t() if ctx.transposed else w)).to(x.dtype)
        wanted = needs[6::2]
        g2 = g.reshape(-1, g.shape[-1])
        left, right = g2, x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        if ctx.transposed:
            left, right = right, left
        if needs[1]:
            gw = left.t() @ right
        if needs[2]:
            gb = g2.sum(0).to(ctx.bias)
        out: list[Any] = [gx, gw.to(weight.dtype) if gw is not None and needs[1] else None, gb, None, None]
        for (i, d), yes in zip(pairs, wanted, strict=True):
            out += [None, _picked(left, right, i, gw).to(d.dtype) if yes else None]
        return tuple(out)


def _picked(left: Tensor, right: Tensor, i: Tensor, whole: Tensor | None) -> Tensor:
    """The entries `i` (rising) of left^T right, (tokens, rows) and (tokens, columns); `whole` if it is there already."""
    rows, columns = left.shape[1], right.shape[1]
    if whole is None and len(i) < SAMPLED * rows * columns and _can_sample(left.device.type):
        begins = torch.searchsorted(i, torch.arange(rows + 1, device=i.device) * columns)
        zeros = torch.zeros(len(i), device=i.device)
        pattern = torch.sparse_csr_tensor(begins, i % columns, zeros, (rows, columns), check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, left.t().float(), right.float(), beta=0.0).values()
    whole = left.t() @ right if whole is None else whole
    return whole.reshape(-1).index_select(0, i)


@cache
def _can_sample(device: str) -> bool:
    """Whether torch works out single entries of a product there (on the CPU it takes MKL to)."""
    one = torch.ones(1, 1, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse CSR is in beta
            return bool(torch.sparse.sampled_addmm(one.to_sparse_csr(), one, one, beta=0.0).values() == 1)
    except (RuntimeError, NotImplementedError):
        return False


def _linear(base: Any, pairs: list[Pair], x: Tensor) -> Tensor:
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _Linear.apply(x, base.weight, base.bias, isinstance(base, Conv1D), dtype, *sum(pairs, ()))  # type: ignore[return-value]


def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """`module` (its parameters, hooks and flags) with another forward; the module itself stays as it is, for other threads too."""
    shown = object.__new__(type(module))
    shown.__dict__.update(module.__dict__, forward=forward)
    return shown


@contextmanager
def _made_again(sums: Iterable[tuple[Tensor, Callable[[], Tensor]]]) -> Iterator[None]:
    """Inside, autograd keeps of these tensors, and of views of them, only how they are made."""
    again = {s.untyped_storage().data_ptr(): (s.dtype, make) for s, make in sums}

    def pack(t: Tensor) -> Any:
        dtype, make = (
            again.get(t.untyped_storage().data_ptr(), (None, None)) if t.layout == torch.strided else (None, None)
        )
        return t if dtype != t.dtype else (make, t.shape, t.stride(), t.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        make, *view = packed
        return make().as_strided(*view)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
