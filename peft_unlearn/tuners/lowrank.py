"""The best approximation of a product of factors by one of lower rank, without forming the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cut(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A (rank, in), B (out, rank), singular values of b a) with B A nearest to b a (Eckart and Young), in their dtype.

    With b = Q_b R_b and a^T = Q_a R_a the singular values of b a are those of the small R_b R_a^T. Rank that b a does not
    have is filled with zeros.
    """
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s[:rank].sqrt()
    k = len(root)
    new_a, new_b = (root[:, None] * vh[:k]) @ qa.T, (qb @ u[:, :k]) * root
    return F.pad(new_a, (0, 0, 0, rank - k)), F.pad(new_b, (0, rank - k)), s
