"""The k largest of many scores, exactly, without sorting or holding them: a radix select over float bit patterns.

float32 values in the order of their bits (the sign turned around) are 32-bit whole numbers. One pass counts how many scores share
their upper 16 bits, a second one counts the lower 16 bits within the bin that holds the k-th largest. Both histograms together are 1 MB
whatever the number of scores, which are asked for part by part, once for each pass and once to be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_HALF, _PIECE = 1 << 16, 1 << 22
Parts = Callable[[], Iterable[Tensor]]  # the scores part by part, the same ones at every call


class Threshold(NamedTuple):
    """key: of the smallest score that is taken (see `keys`); ties: how many scores equal to it are taken, the first by position.

    count: how many are taken in all.
    """

    key: int
    ties: int
    count: int


def keys(scores: Tensor) -> Tensor:
    """float32 scores as int32 of the same order, flat; -0.0 counts as 0.0. The scores must not be NaN."""
    bits = (scores.detach().float() + 0.0).reshape(-1).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


_NEVER = int(keys(torch.tensor([-torch.inf]))[0])
_NONE = (1 << 31) - 1  # the key of no number


def _pieces(parts: Parts) -> Iterator[Tensor]:
    """Keys of all scores, at most so many at a time."""
    for scores in parts():
        yield from map(keys, scores.reshape(-1).split(_PIECE))


def _counted(uppers: Iterable[Tensor], shift: int) -> Tensor:
    """How many keys fall into each of 2**16 bins."""
    out = torch.zeros(_HALF, dtype=torch.int64)
    for found in uppers:
        out += torch.bincount(found + shift, minlength=_HALF).cpu()
    return out


def threshold(parts: Parts, wanted: int | Callable[[int], int]) -> Threshold:
    """Where to cut so that exactly the k largest scores remain, ties in favor of the earlier.

    wanted: k, or a function that gives it for the number of scores. A score of -inf is never taken; fewer remain where too few others
    are there.
    """
    high = _counted((found >> 16 for found in _pieces(parts)), _HALF // 2)
    n = int(high.sum())
    k = wanted(n) if callable(wanted) else wanted
    if high[(_NEVER >> 16) + _HALF // 2]:
        k = min(k, sum(int((found != _NEVER).sum()) for found in _pieces(parts)))
    k = min(k, n)
    if k <= 0:
        return Threshold(_NONE, 0, 0)
    upper, above = _cut(high, k)
    upper -= _HALF // 2
    low = _counted((found[found >> 16 == upper] & (_HALF - 1) for found in _pieces(parts)), 0)
    at, more = _cut(low, k - above)
    return Threshold((upper << 16) | at, k - above - more, k)


def _cut(histogram: Tensor, k: int) -> tuple[int, int]:
    """(bin of the k-th largest, how many lie in bins above it)."""
    upto = histogram.flip(0).cumsum(0)  # from the largest down
    at = int(torch.searchsorted(upto, k))
    return _HALF - 1 - at, int(upto[at - 1]) if at else 0


def largest(
    scores: Mapping[str, Callable[[], Tensor]], wanted: int | Callable[[int], int]
) -> Iterator[tuple[str, Tensor]]:
    """(name, which of its scores are among the k largest of all together: bool of their shape), name by name.

    Args:
        scores: name -> a function that gives this name's scores, equal at every call.
        wanted: k, see `threshold`.
    """
    cut = threshold(lambda: (score() for score in scores.values()), wanted)
    left = cut.ties
    for name, score in scores.items():
        values = score()
        taken = []
        for piece in values.reshape(-1).split(_PIECE):
            found = keys(piece)
            here = found > cut.key
            tied = (found == cut.key).nonzero().squeeze(1)[:left]
            left -= len(tied)
            here[tied] = True
            taken.append(here)
        yield name, torch.cat(taken).view(values.shape)
