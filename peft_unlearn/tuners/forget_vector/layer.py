"""The layer of the tuner: the model's first convolution, which reads ``x + sum of the active vectors``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..peft_type import FORGET_VECTOR

PREFIX = f"{FORGET_VECTOR.lower()}_"
DELTA = f"{PREFIX}delta"


class ForgetVectorLayer(nn.Module, BaseTunerLayer):
    """The first convolution of an image classifier, wrapped; per adapter ``delta (channels, height, width)``, float32.

    A convolution is linear: conv(x + d) = conv(x) + W * d, so where its output meets position embeddings of its own
    shape (ViT, DeiT), `merge` adds W * d to these and is exact. Elsewhere nothing in the model could hold it.

    positions: the embeddings with the number of tokens ahead of the patches, or None.
    """

    adapter_layer_names: tuple[str, ...] = (DELTA,)
    other_param_names: tuple[str, ...] = ("scaling",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, positions: tuple[nn.Parameter, int] | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, DELTA, nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._positions = [positions]  # in a list: the embeddings stay a parameter of the model's own
        self._backup: Tensor | None = None
        self._disable_adapters = False
        self._active_adapter: Any = adapter_name

    def update_layer(self, adapter_name: str, shape: list[int], std: float) -> None:
        """Add an adapter."""
        start = torch.zeros(shape, device=self.weight.device)
        self.vectors[adapter_name] = nn.Parameter(nn.init.normal_(start, std=std) if std else start)
        self.scaling[adapter_name] = 1.0

    @property
    def vectors(self) -> nn.ParameterDict:
        """Adapter -> delta (channels, height, width)."""
        return getattr(self, DELTA)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)  # models read stride and padding of their first convolution

    def total(self, adapters: list[str]) -> Tensor | None:
        """Sum of scale times vector over those of `adapters` that there are, (channels, height, width)."""
        parts = [self.scaling[a] * self.vectors[a] for a in adapters if a in self.scaling]
        return torch.stack(parts).sum(0) if parts else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: images (batch, channels, height, width)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        delta = None if self.merged else self.total(self.active_adapters)
        if delta is None:
            return self.base_layer(x, *args, **kwargs)
        if delta.shape != x.shape[1:]:
            raise ValueError(
                f"the forget vector has shape {list(delta.shape)} and these images {list(x.shape[1:])}; prepare them as those it "
                "was trained on (its manifest names the shape), or train a vector of their shape"
            )
        return self.base_layer(x + delta.to(x.dtype), *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the vectors (default: the active ones) to the position embeddings.

        Raises:
            ValueError: the model has no embeddings that could hold them; or, with `safe_merge`, the sum is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.scaling]
        delta = self.total([*self.merged_adapters, *names])
        if not names or delta is None:
            return
        new = self.merged_positions(delta)
        if safe_merge and not torch.isfinite(new).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        place, _ = self.positions
        self._backup = place.detach().clone() if self._backup is None else self._backup
        with torch.no_grad():
            place.copy_(new)
        self.merged_adapters.extend(names)

    @property
    def positions(self) -> tuple[nn.Parameter, int]:
        """Position embeddings (1, tokens, width) and how many of the tokens stand before the patches."""
        if (found := self._positions[0]) is None:
            raise ValueError(no_positions())
        return found

    @torch.no_grad()
    def merged_positions(self, delta: Tensor) -> Tensor:
        """The base's position embeddings plus W * delta at the patches, (1, tokens, width)."""
        place, ahead = self.positions
        conv: Any = self.base_layer
        added = at_patches(conv, conv.weight.float(), delta, ahead)
        start = place.detach() if self._backup is None else self._backup
        if added.shape != start.shape:
            raise ValueError(
                f"the vector covers {added.shape[1] - ahead} patches and the model has embeddings for {start.shape[1] - ahead}"
            )
        return (start.float() + added).to(start.dtype)

    def unmerge(self) -> None:
        """Put back, bit for bit, what `merge` wrote over."""
        if self._backup is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with torch.no_grad():
            self.positions[0].copy_(self._backup)
        self._backup = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "forget_vector." + super().__repr__()


def at_patches(conv: Any, weight: Tensor, delta: Tensor, ahead: int) -> Tensor:
    """W * delta at the patches and 0 at the tokens ahead of them, (1, tokens, width); `weight` is that of `conv`."""
    added = F.conv2d(delta[None], weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    patches = added.flatten(2).transpose(1, 2)  # (1, width, h, w) -> (1, patches, width)
    return F.pad(patches, (0, 0, ahead, 0))


def no_positions() -> str:
    return (
        "a forget vector cannot be merged into this model: it has no position embeddings on its patches (ViT and DeiT have), "
        "and no other weight adds a picture to the input. Serve it unmerged"
    )
