"""What selection methods are fed, by the names of their parameters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..registry import Method
from .streamed import input_axis

# input -> (objective, batch); None: the one that the caller or the method names
GRADIENTS: dict[str, tuple[str | None, str]] = {
    "forget_grad": (None, "forget"),
    "retain_grad": ("nll", "retain"),
    "entropy_grad": ("neg_entropy", "forget"),
    "ascent_grad": ("ga", "forget"),
}
_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"rms": lambda x: (x * x).sum(), "mean": lambda x: x.abs().sum()}
INPUTS = ("weight", *GRADIENTS, "input_norm", "input_axis", "generator")
# and of `weight` and the gradients, over all weights together: x_rms, the root of their mean square; x_mean, of |x|


@dataclass
class Found:
    """What a method is given for each weight, and about all of them together; all on the device of the accumulators."""

    model: Any
    params: Mapping[str, torch.nn.Parameter]
    grads: Mapping[str, Mapping[str, Tensor]]
    norms: Mapping[str, Tensor]
    seed: int
    device: Any
    stated: dict[str, float] = field(default_factory=dict)

    @cached_property
    def axes(self) -> dict[str, int]:
        return input_axis(self.model, self.params)

    def tensor(self, what: str, name: str) -> Tensor:
        """`weight` or a gradient of one weight, float32."""
        x = self.params[name].detach() if what == "weight" else self.grads[what][name]
        return x.to(self.device, torch.float32)

    def feed(self, what: str, name: str) -> Any:
        if what == "generator":
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if what == "input_axis":
            return self.axes[name]
        if what == "input_norm":
            shape = [1] * self.params[name].dim()
            shape[self.axes[name]] = -1
            return self.norms[name].to(self.device).view(shape)
        of, _, statistic = what.rpartition("_")
        return self.overall(of, statistic) if statistic in _STATISTICS else self.tensor(what, name)

    def overall(self, of: str, statistic: str) -> float:
        key = f"{of}_{statistic}"
        if key not in self.stated:
            parts = (_STATISTICS[statistic](self.tensor(of, n).double()) for n in self.params)
            mean = float(sum(map(float, parts))) / sum(p.numel() for p in self.params.values())
            self.stated[key] = math.sqrt(mean) if statistic == "rms" else mean
        return self.stated[key]


def needed_by(method: Method) -> set[str]:
    """Inputs of a method without their statistics' endings; TypeError for one that nothing here is called."""
    found = set()
    for name in method.inputs:
        of, _, statistic = name.rpartition("_")
        found.add(of if statistic in _STATISTICS and of in ("weight", *GRADIENTS) else name)
    if unknown := found - set(INPUTS):
        raise TypeError(f"selection {method.name} cannot be fed {sorted(unknown)}; known: {', '.join(INPUTS)}")
    return found
