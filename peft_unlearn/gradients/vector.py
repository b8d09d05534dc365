"""`Vec`: one float32 tensor per trainable parameter; `Space`: the parameters it belongs to, with norms and inner products.

Rules and smoothings are written with these alone and never touch torch.distributed: gradients are already summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor lies in parts on several ranks (DTensor, as FSDP2's `fully_shard` makes parameters)."""
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """The tensor itself; of a sharded one all of it, on every rank, which all of them have to ask for."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[operator]


def gradients_of(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """d loss / d params, None for those that it does not reach; of sharded parameters the sum over ranks, each rank with its own loss.

    FSDP2 collects gradients in hooks that only ``.backward()`` runs (torch.autograd.grad gives None for every sharded parameter), and
    averages them over ranks. What stands in ``.grad`` is left as it is.
    """
    if not any(is_sharded(p) for p in params):
        return torch.autograd.grad(loss, list(params), allow_unused=True)
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    loss.backward()
    found = [p.grad for p in params]
    for p, grad in zip(params, before, strict=True):
        p.grad = grad
    return [g if g is None or not is_sharded(g) else g * g.device_mesh.size() for g in found]  # type: ignore[attr-defined]


class Vec:
    """A vector of a `Space`; supports + and - with another, * and / by a scalar. Operations return new vectors."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def __add__(self, other: Vec) -> Vec:
        return Vec(torch._foreach_add(self.tensors, other.tensors))

    def __sub__(self, other: Vec) -> Vec:
        return Vec(torch._foreach_sub(self.tensors, other.tensors))

    def __mul__(self, c: float | Tensor) -> Vec:
        return Vec(torch._foreach_mul(self.tensors, float(c)))

    __rmul__ = __mul__

    def __truediv__(self, c: float | Tensor) -> Vec:
        return self * (1.0 / float(c))

    def __neg__(self) -> Vec:
        return self * -1.0

    def add_(self, other: Vec, c: float = 1.0) -> Vec:
        """In place: self += c * other."""
        torch._foreach_add_(self.tensors, other.tensors, alpha=float(c))
        return self

    def clone(self) -> Vec:
        return Vec([t.clone() for t in self.tensors])


class Space:
    """Named parameters as one vector space.

    Inner products are taken in float64, whatever the parameters' dtype.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.names = [n for n, _ in named]
        self.params = [p for _, p in named]

    @classmethod
    def trainable(cls, model: nn.Module) -> Space:
        """The parameters of `model` that require a gradient."""
        return cls([(n, p) for n, p in model.named_parameters() if p.requires_grad])

    @classmethod
    def under_adapters(cls, model: nn.Module) -> Space:
        """The frozen weights under the adapters of `model`, the output embeddings excepted (the head has to stay plain)."""
        head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
        inside = {id(p) for p in head.parameters()} if head is not None else set()
        return cls(
            [(n, p) for n, p in model.named_parameters() if n.endswith(".base_layer.weight") and id(p) not in inside]
        )

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """The parameters require a gradient; the flags come back as they were."""
        flags = [p.requires_grad for p in self.params]
        for p in self.params:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p, flag in zip(self.params, flags, strict=True):
                p.requires_grad_(flag)

    def sub(self, indices: Sequence[int]) -> Space:
        """The space of some of the parameters."""
        return Space([(self.names[i], self.params[i]) for i in indices])

    def __len__(self) -> int:
        return len(self.params)

    def zeros(self) -> Vec:
        return Vec([torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self.params])

    def randn(self, rng: torch.Generator) -> Vec:
        """Standard normal entries, drawn on the CPU so that every rank and device draws the same."""
        return Vec([_as(p, torch.randn(p.shape, generator=rng).to(p.device)) for p in self.params])

    def read(self) -> Vec:
        """A copy of the parameters as float32."""
        return Vec([p.detach().to(torch.float32, copy=True) for p in self.params])

    @torch.no_grad()
    def write(self, v: Vec) -> None:
        """Set the parameters to `v` (cast to their dtype)."""
        for p, t in zip(self.params, v.tensors, strict=True):
            p.copy_(t)

    def dot(self, a: Vec, b: Vec) -> Tensor:
        """<a, b>, 0-dim float64."""
        parts = [whole((x.double() * y.double()).sum()) for x, y in zip(a.tensors, b.tensors, strict=True)]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def norm(self, a: Vec) -> Tensor:
        """|a|, 0-dim float64."""
        return self.dot(a, a).sqrt()

    @contextmanager
    def shifted(self, at: Vec | None) -> Iterator[None]:
        """The parameters moved by `at`; put back bit for bit from a saved copy, also after an exception."""
        if at is None:
            yield
            return
        # Adapters are small; base weights go to host memory, the one place where a copy of them is made.
        host = not all(p.requires_grad for p in self.params)
        saved = [p.detach().to("cpu" if host else p.device, copy=True) for p in self.params]
        try:
            with torch.no_grad():
                for p, t in zip(self.params, at.tensors, strict=True):
                    p.add_(t)
            yield
        finally:
            with torch.no_grad():
                for p, s in zip(self.params, saved, strict=True):
                    p.copy_(s)


def _as(p: Tensor, t: Tensor) -> Tensor:
    """`t`, which every rank has whole, in parts like `p`."""
    if not is_sharded(p):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, p.device_mesh, p.placements)  # type: ignore[attr-defined]
