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

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDINGS = ("nearest", "stochastic")
BLOCK = 1 << 19  # elements: a few MB, so that a block's passes stay in the cache


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
        return self.kept_wanted / math.sqrt(self.kept * self.wanted) if self.kept > 0 else 0.0

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


def merge_block(w: Tensor, d: Tensor, dtype: torch.dtype, rng: torch.Generator | None = None) -> tuple[Tensor, Sums]:
    """cast(w + d) and its sums. w: of any float dtype; d: float32 of the same shape, overwritten. Raises `Overflow`."""
    wide = w.float()
    merged = round_to(wide + d, dtype, rng)
    start = w if w.dtype == dtype else wide.to(dtype)
    kept = (merged.float() - start.float()).view(-1)
    changed = merged.view(torch.int16) != start.view(torch.int16) if dtype.itemsize == 2 else merged != start
    flat, wanted = wide.view(-1), d.reshape(-1)
    sums = Sums(
        float(torch.dot(kept, wanted)), float(torch.dot(kept, kept)), float(torch.dot(wanted, wanted)),
        float(torch.dot(flat, flat)), int(torch.count_nonzero(changed)), merged.numel(),
    )  # fmt: skip
    if not math.isfinite(sums.kept) and not torch.isfinite(merged).all():
        raise Overflow
    return merged, sums


def cast_block(w: Tensor, dtype: torch.dtype) -> Tensor:
    """`w` in another float dtype, to the nearest. Raises `Overflow`."""
    out = w.to(dtype)
    if w.dtype.itemsize > 2 or dtype == torch.float16:
        low, high = torch.aminmax(out.float())
        if not (math.isfinite(float(low)) and math.isfinite(float(high))) and bool(torch.isfinite(w.float()).all()):
            raise Overflow
    return out
