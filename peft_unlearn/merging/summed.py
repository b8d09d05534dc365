"""The factors of a sum of adapters, weight by weight: side by side, and cut to a rank by their singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..tuners.delta import Adapted, Deltas
from ..tuners.lowrank import cut


@dataclass
class Summed:
    """One weight's sum: a (experts, r, in), b (experts, out, r), with b a the delta; experts is 1 but for fused ones."""

    like: Adapted
    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def cut(self, rank: int) -> float:
        """Keep the best approximation of this rank, expert by expert; the relative error |D - D_r| / |D| (Frobenius)."""
        parts = [cut(a.double(), b.double(), rank) for a, b in zip(self.a, self.b, strict=True)]
        self.a, self.b = (torch.stack([p[i].float() for p in parts]) for i in (0, 1))
        lost, whole = (sum(float(s[k:].square().sum()) for _, _, s in parts) for k in (rank, 0))
        return math.sqrt(lost / whole) if whole > 0 else 0.0

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """With zero blocks up to `rank`, as the file holds them."""
        a = torch.nn.functional.pad(self.a, (0, 0, 0, rank - self.rank))
        b = torch.nn.functional.pad(self.b, (0, rank - self.rank))
        if self.like.experts == 1:
            return a[0].contiguous(), b[0].contiguous()
        return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def summed(deltas: list[Deltas], factors: list[float]) -> dict[str, Summed]:
    """Weight -> the sum of factor times delta over the adapters that have it. Raises `UserError` where shapes do not agree."""
    out: dict[str, Summed] = {}
    for weight in sorted({w for d in deltas for w in d}):
        found = [(d, c) for d, c in zip(deltas, factors, strict=True) if weight in d]
        like = _alike(weight, [d for d, _ in found])
        parts = []
        for d, c in found:
            a, b, s = d.factors(weight)
            e = like.experts
            a = a.unflatten(0, (e, -1))
            b = b.unflatten(1, (-1, e)).permute(2, 0, 1) if e > 1 else b[None]
            parts.append((a, (b.double() * (c * s)).float()))
        out[weight] = Summed(like, *_side_by_side(parts))
    return out


def _alike(weight: str, deltas: list[Deltas]) -> Adapted:
    """What all of `deltas` adapt there, as a module where one of them does; `UserError` where their shapes do not agree."""

    def shape(row: Adapted) -> tuple[Any, ...]:
        return row.experts, row.a.shape[1:], row.b.shape[0], row.kind == "embedding"

    first = deltas[0].adapted[weight]
    for d in deltas:
        row = d.adapted[weight]
        if len(row.a.shape) != 2:
            raise UserError(f"{d.folder.path}: {weight} is a convolution, and composing those is not supported.")
        if shape(row) != shape(first):
            raise UserError(
                f"{d.folder.path}: its factors for {weight} have other shapes ({list(row.a.shape)} and "
                f"{list(row.b.shape)}) than those of {deltas[0].folder.path} ({list(first.a.shape)} and {list(first.b.shape)})."
            )
    linear = next((d.adapted[weight] for d in deltas if d.adapted[weight].kind == "linear"), first)
    return linear if first.kind == "parameter" else first


def _side_by_side(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenated along the rank. Of fused experts only blocks that are not zero take room, and the rank is the largest
    that any expert needs: adapters on different experts stand in each other's place."""
    if parts[0][0].shape[0] == 1:
        return torch.cat([a for a, _ in parts], 1), torch.cat([b for _, b in parts], 2)
    rows = []
    for e in range(parts[0][0].shape[0]):
        mine = [(a[e], b[e]) for a, b in parts if bool(a[e].any()) and bool(b[e].any())]
        rows.append((torch.cat([a for a, _ in mine]), torch.cat([b for _, b in mine], 1)) if mine else None)
    rank = max((r[0].shape[0] for r in rows if r is not None), default=1)
    out_a = parts[0][0].new_zeros(len(rows), rank, parts[0][0].shape[2])
    out_b = parts[0][1].new_zeros(len(rows), parts[0][1].shape[1], rank)
    for e, row in enumerate(rows):
        if row is not None:
            out_a[e, : row[0].shape[0]], out_b[e, :, : row[1].shape[1]] = row
    return out_a, out_b
