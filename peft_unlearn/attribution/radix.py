"""The k largest of many scores, exactly, without sorting or holding them: a radix select over float bit patterns.

float32 values in the order of their bits (the sign turned around) are 32-bit whole numbers. One pass counts how many scores share
their upper 16 bits, a second one counts the lower 16 bits within the bin that holds the k-th largest. Both histograms together are 1 MB
whatever the number of scores, which are asked for part by part, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_HALF = 1 << 16
Parts = Callable[[], Iterable[Tensor]]  # the scores part by part, the same ones at every call


class Threshold(NamedTuple):
    """key: of the smallest score that is taken (see `keys`); ties: how many scores equal to it are taken, the first by position.

    count: how many are taken in all: k, or fewer where fewer may be taken.
    """

    key: int
    ties: int
    count: int


def keys(scores: Tensor) -> Tensor:
    """float32 scores as int64 in [0, 2**32) of the same order; -0.0 counts as 0.0. The scores must not be NaN."""
    bits = (scores.detach().float() + 0.0).reshape(-1).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


_NEVER = int(keys(torch.tensor([-torch.inf]))[0])  # a score of -inf is never taken


def threshold(parts: Parts, k: int) -> Threshold:
    """Where to cut so that exactly the k largest scores remain, ties in favor of the earlier; -inf is never taken."""
    high = torch.zeros(_HALF, dtype=torch.int64)
    never = 0
    for scores in parts():
        found = keys(scores)
        never += int((found == _NEVER).sum())
        high += torch.bincount(found >> 16, minlength=_HALF).cpu()
    k = min(k, int(high.sum()) - never)
    if k <= 0:
        return Threshold(1 << 32, 0, 0)
    bin_, above = _cut(high, k)
    low = torch.zeros(_HALF, dtype=torch.int64)
    for scores in parts():
        found = keys(scores)
        low += torch.bincount(found[found >> 16 == bin_] & (_HALF - 1), minlength=_HALF).cpu()
    at, more = _cut(low, k - above)
    return Threshold((bin_ << 16) | at, k - above - more, k)


def _cut(histogram: Tensor, k: int) -> tuple[int, int]:
    """(bin of the k-th largest, how many lie in bins above it)."""
    upto = histogram.flip(0).cumsum(0)  # from the largest down
    at = int(torch.searchsorted(upto, torch.tensor(k)))
    return _HALF - 1 - at, int(upto[at - 1]) if at else 0


def positions(scores: Mapping[str, Callable[[], Tensor]], k: int) -> dict[str, Tensor]:
    """Flat positions of the k largest entries of all scores together, by name, rising, int64 on the CPU; names that lost are left empty.

    Args:
        scores: name -> a function that gives this name's scores, equal at every call.
    """
    cut = threshold(lambda: (score() for score in scores.values()), k)
    left, out = cut.ties, {}
    for name, score in scores.items():
        found = keys(score())
        taken = found > cut.key
        tied = (found == cut.key).nonzero().squeeze(1)[:left]
        left -= len(tied)
        taken[tied] = True
        out[name] = taken.nonzero().squeeze(1).cpu()
    return out
