"""Several frozen LoRA adapters of one layer as one pair of matrices.

sum_i s_i B_i A_i x = B A x with A = [A_1; A_2; ..] (sum of ranks, in) and B = [s_1 B_1, s_2 B_2, ..] (out, sum of ranks):
two products however many adapters there are, where PEFT's own layer makes two per adapter. The adapters stay what they
are, so they can be scaled, swapped, saved and taken off one by one; the pair is built at the first forward that needs it
and again whenever something about them has changed. Where a gradient could flow into one of them, PEFT's own loop runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> int:
    """Make every plain LoRA layer of `model` compute its adapters together; returns how many layers there are.

    Embeddings, quantized layers and experts keep their own forward. Undone by `unfuse`, or by taking the layers out.
    """
    layers: list[Any] = [m for m in model.modules() if type(m) is Linear]
    for layer in layers:
        layer.__class__ = FusedLinear
    return len(layers)


def unfuse(model: nn.Module) -> None:
    """Give every layer PEFT's own forward back."""
    layers: list[Any] = [m for m in model.modules() if type(m) is FusedLinear]
    for layer in layers:
        layer._pair = None
        layer.__class__ = Linear


class _Pair:
    """What was concatenated, and how to see whether it still holds. a None: these adapters have to run one by one."""

    def __init__(self, layer: Linear, active: list[str]) -> None:
        self.active = list(active)
        names = [n for n in active if n in layer.lora_A]
        factors: list[tuple[str, Any, Any]] = [(n, layer.lora_A[n].weight, layer.lora_B[n].weight) for n in names]
        self.seen = [(n, layer.scaling[n], _seen(a), _seen(b)) for n, a, b in factors if not a.is_inference()]
        self.drops = any(not isinstance(layer.lora_dropout[n], nn.Identity) for n in names)
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        kinds = {(t.dtype, t.device, t.is_inference()) for _, a, b in factors for t in (a, b)}
        plain = not any(n in layer.lora_variant or layer.lora_bias.get(n) for n in names)
        if not plain or len(kinds) != 1 or next(iter(kinds))[2]:
            return
        # An adapter at scale zero is left out, not multiplied by zero: the others are as if it were not there.
        on = [(layer.scaling[n], a, b) for n, a, b in factors if layer.scaling[n] != 0]
        with torch.inference_mode(False), torch.no_grad():
            if on:
                self.a = torch.cat([a for _, a, _ in on])
                self.b = torch.cat([(b * s if s != 1 else b) for s, _, b in on], 1)
            else:
                self.a = self.b = factors[0][1].new_empty(0)

    def holds(self, layer: Linear) -> bool:
        """Whether the layer still has the same adapters active, each with the scale and the factors it had."""
        if self.active != layer._active_adapter:
            return False
        scaling, a_of, b_of = layer.scaling, _factors(layer, "lora_A"), _factors(layer, "lora_B")
        for name, scale, a, b in self.seen:
            if scaling.get(name) != scale or not _unchanged(a_of[name], a) or not _unchanged(b_of[name], b):
                return False
        return True

    def trains(self) -> bool:
        return torch.is_grad_enabled() and any(a[0].requires_grad or b[0].requires_grad for _, _, a, b in self.seen)


_Seen = tuple[Tensor, int, int]  # a factor, where its memory was, and how often it had been written to


def _seen(t: Tensor) -> _Seen:
    return t, t.data_ptr(), 0 if t.is_inference() else t._version


def _factors(layer: Any, which: str) -> Any:
    """Adapter -> module that holds the factor; past nn.Module's own attribute look-up, which costs more than the rest."""
    return layer._modules[which]._modules


def _unchanged(module: Any, seen: _Seen) -> bool:
    tensor, at, version = seen
    return module._parameters["weight"] is tensor and tensor._version == version and tensor.data_ptr() == at


class FusedLinear(Linear):
    """PEFT's LoRA layer, with another forward where two or more adapters are active and none of them is to get a gradient."""

    _pair: _Pair | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        pair = None
        if not (self._disable_adapters or self.merged_adapters or args or kwargs):
            pair = self._current()
        if pair is None or pair.a is None or pair.b is None or (self.training and pair.drops) or pair.trains():
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        if not pair.a.numel():
            return result
        x = self._cast_input_dtype(x, pair.a.dtype)
        return (result + F.linear(F.linear(x, pair.a), pair.b)).to(result.dtype)

    def _current(self) -> _Pair | None:
        pair, active = self._pair, self._active_adapter
        if pair is not None and pair.holds(self):
            return pair
        # One adapter runs as PEFT runs it, bit for bit.
        if isinstance(active, str) or len(active) < 2 or sum(n in self.scaling for n in active) < 2:
            return None
        self._pair = _Pair(self, active)
        return self._pair

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # every move to another dtype or device comes by here
        self._pair = None
        return super()._apply(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        self._pair = None
        super().update_layer(*args, **kwargs)

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._pair = None
        super().delete_adapter(*args, **kwargs)
