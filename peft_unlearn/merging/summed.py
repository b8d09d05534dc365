"""The factors of a sum of adapters, weight by weight: side by side, and cut to a rank by their singular values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .delta import Adapted, Deltas


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
        pairs = [_cut(a, b, rank) for a, b in zip(self.a, self.b, strict=True)]
        lost = sum(p[2] for p in pairs)
        whole = sum(p[3] for p in pairs)
        self.a, self.b = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        return math.sqrt(lost / whole) if whole > 0 else 0.0

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """With zero blocks up to `rank`, as the file holds them."""
        a = torch.nn.functional.pad(self.a, (0, 0, 0, rank - self.rank))
        b = torch.nn.functional.pad(self.b, (0, rank - self.rank))
        if self.like.experts == 1:
            return a[0].contiguous(), b[0].contiguous()
        return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def _cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best rank-`rank` (A, B) of b a, and the squared Frobenius norms of what is lost and of the whole."""
    k = min(rank, a.shape[0], a.shape[1], b.shape[0])
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:k].sqrt()
    squares = s.square()
    new_b, new_a = qb @ (u[:, :k] * root), (root[:, None] * vh[:k]) @ qa.T
    pad = rank - k
    return (
        torch.nn.functional.pad(new_a, (0, 0, 0, pad)).float(), torch.nn.functional.pad(new_b, (0, pad)).float(),
        float(squares[k:].sum()), float(squares.sum()),
    )  # fmt: skip


def summed(deltas: list[Deltas], factors: list[float]) -> dict[str, Summed]:
    """Weight -> the sum of factor times delta over the adapters that have it. Raises `UserError` where shapes do not agree."""
    out: dict[str, Summed] = {}
    for weight in sorted({w for d in deltas for w in d}):
        found = [(d, c) for d, c in zip(deltas, factors, strict=True) if weight in d]
        rows = [d.adapted[weight] for d, _ in found]
        like = rows[0]
        for d, row in zip([d for d, _ in found], rows, strict=True):
            ours = (row.experts, row.a.shape[1:], row.b.shape[0], row.kind == "embedding")
            if len(row.a.shape) != 2:
                raise UserError(f"{d.folder.path}: {weight} is a convolution, and composing those is not supported.")
            if ours != (like.experts, like.a.shape[1:], like.b.shape[0], like.kind == "embedding"):
                raise UserError(
                    f"{d.folder.path}: its factors for {weight} have other shapes ({list(row.a.shape)} and "
                    f"{list(row.b.shape)}) than those of {found[0][0].folder.path} ({list(like.a.shape)} and {list(like.b.shape)})."
                )
        if like.kind == "parameter" and any(r.kind == "linear" for r in rows):
            like = next(r for r in rows if r.kind == "linear")
        parts = []
        for d, c in found:
            a, b, s = d.factors(weight)
            e = like.experts
            a = a.unflatten(0, (e, -1))
            b = b.unflatten(1, (-1, e)).permute(2, 0, 1) if e > 1 else b[None]
            parts.append((a, (b.double() * (c * s)).float()))
        out[weight] = Summed(like, *_side_by_side(parts))
    return out


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
