"""cast(W + D), and what the cast kept of D.

One block of rows at a time, float32, one rounding. "nearest" loses a change smaller than half the distance between two
neighbours; "stochastic" rounds up or down with the probability that makes the mean right (Gupta et al. 2015, "Deep Learning
with Limited Numerical Precision", https://arxiv.org/abs/1502.02551), so that what is kept is D in expectation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDINGS = ("nearest", "stochastic")
BLOCK = 1 << 18  # elements: a few MB, so that a block's passes stay in the cache


class Overflow(Exception):
    """A value that is finite in float32 and not in the wanted dtype."""


@dataclass
class Sums:
    """Sums over a layer: kept is cast(W + D) - cast(W), D the wanted delta. Added up over blocks, tensors and runs."""

    kept_wanted: float = 0.0
    kept: float = 0.0
    wanted: float = 0.0
    weight: float = 0.0
    changed: int = 0
    n: int = 0

    def add(self, other: Sums) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def cosine(self) -> float | None:
        """Of kept and wanted; 0 if nothing was kept, None if nothing was wanted."""
        if self.wanted == 0:
            return None
        if not self.kept > 0:
            return 0.0
        return max(-1.0, min(1.0, self.kept_wanted / math.sqrt(self.kept * self.wanted)))  # sums of blocks in float32

    @property
    def gain(self) -> float | None:
        """How much of the wanted delta is in the kept one: <kept, D> / <D, D>; 1 is all of it."""
        return self.kept_wanted / self.wanted if self.wanted > 0 else None


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows of about `BLOCK` elements."""
    step = max(1, BLOCK // max(1, columns))
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))


def generator(seed: int, name: str) -> torch.Generator:
    """A generator for one tensor: the same whatever was rounded before it, and in which run."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def round_to(x: Tensor, dtype: torch.dtype, rng: torch.Generator | None = None) -> Tensor:
    """float32 `x` in `dtype`: to the nearest, or stochastically if there is an `rng`."""
    if rng is None or dtype == torch.float32:
        return x.to(dtype)
    drop = {torch.bfloat16: 16, torch.float16: 13}[dtype]  # bits of float32's mantissa that go
    noise = torch.randint(0, 1 << drop, x.shape, dtype=torch.int32, generator=rng)
    # Adding noise below the cut and cutting carries with probability (what is cut) / (distance to the next number).
    out = ((x.contiguous().view(torch.int32) + noise) & -(1 << drop)).view(torch.float32)
    if dtype == torch.float16:  # below its normal range float16's numbers are evenly spaced
        step = 2.0**-24
        even = torch.floor(x / step + noise / (1 << drop)) * step
        out = torch.where(x.abs() < 2.0**-14, even, out)
    return out.to(dtype)


class Adder:
    """cast(W + L @ R) for blocks of rows, in memory that is used again: fresh pages would cost more than the arithmetic."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._scratch: dict[str, Tensor] = {}

    def _room(self, what: str, shape: torch.Size) -> Tensor:
        n = shape.numel()
        if what not in self._scratch or self._scratch[what].numel() < n:
            self._scratch[what] = torch.empty(n)
        return self._scratch[what][:n].view(shape)

    def __call__(
        self, w: Tensor, left: Tensor, right: Tensor | None, out: Tensor, rng: torch.Generator | None = None
    ) -> Sums:
        """Fill `out`, of this dtype and w's shape (rows, columns); what was kept. right None: `left` is the delta itself.

        Raises:
            Overflow: a value does not fit the dtype.
        """
        wide, d = self._room("wide", w.shape).copy_(w), left
        if right is not None:
            d = torch.mm(left, right, out=self._room("d", w.shape))
        weight = _dot(wide, wide)
        if self.dtype == torch.float32:
            torch.add(wide, d, out=out)
            kept = torch.sub(out, wide, out=wide)
        else:
            kept = torch.add(wide, d, out=self._room("x", w.shape))
            out.copy_(kept if rng is None else round_to(kept, self.dtype, rng))
            kept.copy_(out).sub_(wide if w.dtype == self.dtype else wide.to(self.dtype))
        changed = int(np.count_nonzero(kept.numpy() != 0))
        sums = Sums(_dot(kept, d), _dot(kept, kept), _dot(d, d), weight, changed, kept.numel())
        if not math.isfinite(sums.kept) and not torch.isfinite(out).all():
            raise Overflow
        return sums


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def cast_block(w: Tensor, out: Tensor) -> None:
    """`w` in another float dtype, to the nearest. Raises `Overflow`."""
    out.copy_(w)
    if w.dtype.itemsize > 2 or out.dtype == torch.float16:
        low, high = torch.aminmax(out.float())
        if not (math.isfinite(float(low)) and math.isfinite(float(high))) and bool(torch.isfinite(w.float()).all()):
            raise Overflow
