"""The two layers of the tuner: experts with low-rank factors on some of them, and a router with a trained delta.

Route split: the wrapped experts run as they are, in whatever implementation the user chose, with the routing weights of
the chosen experts set to zero; each chosen expert then runs once on the tokens routed to it, factors inside, and is added
with its true routing weight. No delta of an expert's size exists outside `merge`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..peft_type import PREFIX
from .blocks import innermost, is_llama4, is_transposed
from .config import ExpertLoraConfig

PROJECTIONS = ("gate_up", "down")
Group = tuple[list[str], Tensor | None]  # adapters applied together, and the rows (tokens,) they apply to; None: all


class TunerLayer(nn.Module, BaseTunerLayer):
    """What both layers share: which adapters act on which rows, and merging with a backup instead of a subtraction."""

    other_param_names: tuple[str, ...] = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._backup: dict[Any, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def _factors(self, name: str) -> Any:
        return getattr(self, PREFIX + name)

    def _add(self, name: str, adapter: str, value: Tensor) -> None:
        self._factors(name)[adapter] = nn.Parameter(value)

    def groups(self, adapter_names: Sequence[str] | None, tokens: int) -> list[Group]:
        """Which adapters to apply to which of `tokens` rows; empty when the base alone is wanted.

        adapter_names: one per sequence of the batch ("__base__": none), or None for the active ones on every row.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if self.merged:
            if adapter_names is not None:
                raise ValueError("mixed batches need unmerged adapters; call unmerge_adapter() first")
            return []
        if adapter_names is None:
            live = [a for a in self.active_adapters if a in self.scaling]
            return [(live, None)] if live else []
        out: list[Group] = []
        for name in dict.fromkeys(adapter_names):
            if name in self.scaling:
                rows = torch.tensor([n == name for n in adapter_names])
                out.append(([name], rows.repeat_interleave(tokens // len(adapter_names))))
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters (default: the active ones) into the base's weights, with one rounding for all of them."""
        added = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]
        if not added:
            return
        with torch.no_grad():
            merged = [*self.merged_adapters, *added]
            new = {}
            for key in self._touched(merged):
                start = self._backup.get(key, self._place(key))
                new[key] = self._merged(key, start, merged)
                if safe_merge and not torch.isfinite(new[key]).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {added[-1]} seems to be broken")
            for key, value in new.items():
                self._backup.setdefault(key, self._place(key).clone())
                self._place(key).copy_(value)
        self.merged_adapters.extend(added)

    def unmerge(self) -> None:
        """Put back, bit for bit, what `merge` wrote over."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            for key, value in self._backup.items():
                self._place(key).copy_(value)
        self._backup.clear()
        self.merged_adapters.clear()

    def _touched(self, adapters: Iterable[str]) -> list[Any]:
        """Keys of the parts of the base's weights that the adapters change."""
        raise NotImplementedError

    def _place(self, key: Any) -> Tensor:
        """The part itself, as a view."""
        raise NotImplementedError

    def _merged(self, key: Any, start: Tensor, adapters: Iterable[str]) -> Tensor:
        """`start` plus the adapters' deltas, in the dtype of `start`."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return "expert_lora." + super().__repr__()


class ExpertsLayer(TunerLayer):
    """A fused experts module; per adapter ``A (n, r, in)`` and ``B (n, out, r)`` of both projections, n chosen experts."""

    adapter_layer_names = tuple(f"{PREFIX}{p}_{f}" for p in PROJECTIONS for f in "AB")
    other_param_names = ("scaling", "experts")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ExpertLoraConfig, ids: Sequence[int]) -> None:
        super().__init__(base_layer, adapter_name)
        self.experts: dict[str, list[int]] = {}
        self.update_layer(adapter_name, config, ids)

    def update_layer(self, adapter_name: str, config: ExpertLoraConfig, ids: Sequence[int]) -> None:
        """Add an adapter on the experts `ids`; its factors are float32 also on a half-precision base."""
        self.experts[adapter_name] = list(ids)
        self.scaling[adapter_name] = config.lora_alpha / config.r
        for p in PROJECTIONS:
            inputs, outputs = self.shape(p)
            place = {"device": self.weight_of(p).device, "dtype": factor_dtype(self.weight_of(p))}
            a = torch.empty(len(ids), config.r, inputs, **place)
            nn.init.uniform_(a, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))  # kaiming's, as stock LoRA has it
            b = torch.zeros(len(ids), outputs, config.r, **place)
            self._add(f"{p}_A", adapter_name, a)
            self._add(f"{p}_B", adapter_name, b if config.init_weights else nn.init.normal_(b, std=0.02))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # --- geometry --------------------------------------------------------------------------------------------------

    def weight_of(self, projection: str) -> Tensor:
        """(experts, out, in), or (experts, in, out) where `is_transposed`."""
        return getattr(self.get_base_layer(), f"{projection}_proj")

    def shape(self, projection: str) -> tuple[int, int]:
        """(in, out) of one expert's projection."""
        _, a, b = self.weight_of(projection).shape
        return (a, b) if is_transposed(self) else (b, a)

    @property
    def num_experts(self) -> int:
        return self.weight_of("down").shape[0]

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        weight = innermost(base_layer).down_proj
        return weight.device, weight.dtype

    # --- forward ---------------------------------------------------------------------------------------------------

    def forward(self, hidden_states: Tensor, *routing: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """hidden_states (tokens, hidden) with routing = top-k indices and weights, both (tokens, k).

        Llama4: hidden_states (experts * tokens, hidden), already scaled by its scores, and no routing.
        """
        llama4 = is_llama4(self)
        tokens = hidden_states.shape[0] // (self.num_experts if llama4 else 1)
        groups = self.groups(adapter_names, tokens)
        if not any(self.experts[a] for names, _ in groups for a in names):
            return self.base_layer(hidden_states, *routing)
        if getattr(self.get_base_layer(), "_is_expert_parallel", False):
            raise ValueError("the experts are spread over several devices (expert parallel): not supported yet")
        factors = {a: self._unbound(a) for names, _ in groups for a in names}
        if llama4:
            return self._all_tokens(hidden_states, tokens, groups, factors)
        index, weights = routing
        taken = torch.zeros_like(index, dtype=torch.bool)
        work = []
        for names, rows in groups:
            for e in sorted({e for a in names for e in self.experts[a]}):
                hit = index == e  # (tokens, k)
                if rows is not None:
                    hit = hit & rows.to(hit.device)[:, None]
                taken |= hit
                work.append((e, [factors[a][e] for a in names if e in factors[a]], hit))
        out = self.base_layer(hidden_states, index, weights.masked_fill(taken, 0))
        for n, (e, mine, hit) in enumerate(work):
            # An expert that no token reached goes through this with no rows: its gradient is zero then, and not None.
            token, slot = hit.nonzero(as_tuple=True)
            y = (self._expert(hidden_states[token], e, mine) * weights[token, slot, None]).to(out.dtype)
            # One expert at a time: a token appears once in each, so the sum has the same order in every run.
            out = out.index_add_(0, token, y) if n else out.index_add(0, token, y)
        return out

    def _all_tokens(self, x: Tensor, tokens: int, groups: list[Group], factors: dict[str, Any]) -> Tensor:
        out = self.base_layer(x)
        for names, rows in groups:
            for e in sorted({e for a in names for e in self.experts[a]}):
                mine = x[e * tokens : (e + 1) * tokens]
                hit = (mine != 0).any(-1)  # a token routed elsewhere comes with score 0, and zero stays zero
                if rows is not None:
                    hit = hit & rows.to(hit.device)
                at = hit.nonzero(as_tuple=True)[0]
                y = self._expert(mine[at], e, [factors[a][e] for a in names if e in factors[a]])
                out = out.index_copy(0, at + e * tokens, y.to(out.dtype))
        return out

    def _unbound(self, adapter: str) -> dict[int, Any]:
        """Expert -> (projection -> (A, B)), scaling; one unbind, so that backward stacks once instead of once per expert."""
        parts = {p: [self._factors(f"{p}_{f}")[adapter].unbind(0) for f in "AB"] for p in PROJECTIONS}
        return {
            e: ({p: (a[j], b[j]) for p, (a, b) in parts.items()}, self.scaling[adapter])
            for j, e in enumerate(self.experts[adapter])
        }

    def _expert(self, x: Tensor, e: int, factors: list[Any]) -> Tensor:
        """One expert with `factors` inside, on its tokens: (rows, hidden) -> (rows, hidden)."""
        base: Any = self.get_base_layer()
        y = self._project(x, "gate_up", e, factors)  # (rows, 2 * intermediate)
        if is_llama4(base):
            gate, up = y.chunk(2, dim=-1)
            y = up * base.act_fn(gate)
        else:
            y = base._apply_gate(y)
        return self._project(y, "down", e, factors)

    def _project(self, x: Tensor, projection: str, e: int, factors: list[Any]) -> Tensor:
        weight = self.weight_of(projection)[e]
        bias = getattr(self.get_base_layer(), f"{projection}_proj_bias", None)
        if is_transposed(self):
            weight = weight.t()
        y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias[e].to(weight.dtype))
        for parts, scaling in factors:
            a, b = parts[projection]
            y = y + (F.linear(F.linear(x.to(a.dtype), a), b) * scaling).to(y.dtype)
        return y

    # --- merge -----------------------------------------------------------------------------------------------------

    def _touched(self, adapters: Iterable[str]) -> list[tuple[str, int]]:
        return [(p, e) for p in PROJECTIONS for e in sorted({e for a in adapters for e in self.experts[a]})]

    def _place(self, key: tuple[str, int]) -> Tensor:
        return self.weight_of(key[0]).data[key[1]]

    def _merged(self, key: tuple[str, int], start: Tensor, adapters: Iterable[str]) -> Tensor:
        p, e = key
        out = start.to(factor_dtype(start))
        for name in adapters:
            if e not in self.experts[name]:
                continue
            j = self.experts[name].index(e)
            a, b = (self._factors(f"{p}_{f}")[name][j].to(out) for f in "AB")
            left, right = (a.t(), b.t()) if is_transposed(self) else (b, a)
            out = torch.addmm(out, left, right, alpha=self.scaling[name])
        return out.to(start.dtype)


class RouterLayer(TunerLayer):
    """A router whose weight (experts, hidden) gets ``scaling * B A`` or a whole delta; selection stays the router's own."""

    adapter_layer_names = tuple(f"{PREFIX}router_{f}" for f in ("A", "B", "delta"))

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ExpertLoraConfig) -> None:
        super().__init__(base_layer, adapter_name)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: ExpertLoraConfig) -> None:
        """Add an adapter of the kind `config.train_router`, in float32 also on a half-precision base."""
        base: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        place = {"device": base.device, "dtype": factor_dtype(base)}
        if config.train_router == "full":
            self.scaling[adapter_name] = 1.0
            delta = torch.zeros(*base.shape, **place)
            self._add("router_delta", adapter_name, delta if config.init_weights else nn.init.normal_(delta, std=0.02))
        else:
            experts, hidden = base.shape
            r = config.router_r
            assert r is not None
            self.scaling[adapter_name] = config.lora_alpha / r
            a, b = torch.empty(r, hidden, **place), torch.zeros(experts, r, **place)
            self._add("router_A", adapter_name, nn.init.uniform_(a, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden)))
            self._add("router_B", adapter_name, b if config.init_weights else nn.init.normal_(b, std=0.02))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, *args: Any, adapter_names: Sequence[str] | None = None) -> Any:
        """What the wrapped router returns (logits, weights, indices), computed with the adapted weight."""
        groups = self.groups(adapter_names, math.prod(hidden_states.shape[:-1]))
        if not groups:
            return self.base_layer(hidden_states, *args)
        if groups[0][1] is None:
            weight = {"weight": self._merged(None, self._weight(), groups[0][0])}
            return torch.func.functional_call(self.base_layer, weight, (hidden_states, *args))
        # A mixed batch: every group's answer is worked out beside the base's own call and put into its output by a hook that
        # comes before all others, so that whoever records router logits there sees one call with the right rows.
        beside = []
        for names, rows in groups:
            weight = {"module.weight": self._merged(None, self._weight(), names)}
            found = torch.func.functional_call(_Unhooked(self.base_layer), weight, (hidden_states, *args))
            beside.append((rows.to(hidden_states.device), found))  # type: ignore[union-attr]

        def mix(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            for rows, found in beside:
                output = tuple(torch.where(rows[:, None], f, o) for f, o in zip(found, output, strict=True))
            return output

        handle = self.base_layer.register_forward_hook(mix, prepend=True)
        try:
            return self.base_layer(hidden_states, *args)
        finally:
            handle.remove()

    def delta(self, adapter: str) -> Tensor:
        """(experts, hidden): what the adapter adds to the router's weight."""
        if adapter in self._factors("router_delta"):
            return self._factors("router_delta")[adapter] * self.scaling[adapter]
        return self._factors("router_B")[adapter] @ self._factors("router_A")[adapter] * self.scaling[adapter]

    def _weight(self) -> Tensor:
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _touched(self, adapters: Iterable[str]) -> list[None]:
        return [None]

    def _place(self, key: None) -> Tensor:
        return self._weight().data

    def _merged(self, key: None, start: Tensor, adapters: Iterable[str]) -> Tensor:
        with torch.autocast(start.device.type, enabled=False):  # a weight keeps its dtype whatever the computation's is
            out = start.to(factor_dtype(start))
            for name in adapters:
                out = out + self.delta(name)
            return out.to(start.dtype)


class _Unhooked(nn.Module):
    """Calls a module's forward without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


def factor_dtype(weight: Tensor) -> torch.dtype:
    """float32 for half precision, else the weight's own."""
    return torch.promote_types(weight.dtype, torch.float32)
