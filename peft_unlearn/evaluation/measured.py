"""What metrics stand on: rows of unequal length, the reason why something has no number, and confidence intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
UNIT = (0.0, 1.0)
KNOWLEDGE = {"forget": "lower", "retain": "higher"}  # which way is better, of a metric that says what a model knows


class Unmeasured(Exception):
    """A metric has no number here. The message is the reason that stands beside the null in eval.json."""


@dataclass(frozen=True)
class Estimate:
    """A number of a whole set that knows its own interval, where a mean over rows is not what it is. n: rows behind
    it, where those are not the set's own."""

    value: float
    ci95: tuple[float, float] | None = None
    n: int | None = None


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length in one buffer.

    flat: (total,) float64, row after row.   offsets: (rows + 1,) int64; row i is flat[offsets[i]:offsets[i + 1]].
    """

    flat: Array
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Sequence[float] | Array]) -> Ragged:
        """From a list of rows; an empty row stays a row."""
        parts = [np.asarray(row, dtype=np.float64) for row in rows]
        offsets = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return cls(np.concatenate(parts) if parts else np.zeros(0), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Array:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Ragged:
        """The rows at these indices, in this order; a row may come twice."""
        return Ragged.of([self[int(i)] for i in rows])

    def cut(self, lengths: NDArray[np.int64]) -> Ragged:
        """The first `lengths[i]` values of row i."""
        at = np.arange(len(self.flat)) - self.offsets[self.row_of]
        kept = np.minimum(lengths, self.lengths)
        return Ragged(self.flat[at < kept[self.row_of]], np.concatenate([[0], np.cumsum(kept)]).astype(np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(rows,) number of values in each row."""
        return np.diff(self.offsets)

    @property
    def row_of(self) -> NDArray[np.int64]:
        """(total,) the row to which each value belongs."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def sum(self) -> Array:
        """(rows,) sums; a NaN stays inside its own row (a difference of cumulative sums would spread it)."""
        return np.bincount(self.row_of, weights=self.flat, minlength=len(self)).astype(np.float64)

    def mean(self) -> Array:
        """(rows,) means; NaN for an empty row."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sum() / self.lengths


@lru_cache(maxsize=4)
def resampled(n: int, resamples: int, seed: int) -> NDArray[np.uint16]:
    """(resamples, n): how often each row is drawn. Shared by all metrics with the same n, so intervals are
    comparable."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.uint16)


def bootstrap_ci(
    values: Array, level: float = 0.95, resamples: int = 1000, seed: int = 0, groups: Sequence[Hashable] | None = None
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over rows.

    values: (rows,) finite.   groups: (rows,) whom each row belongs to: wordings of one fact are drawn together, since they are no
    independent evidence. Returns (low, high), or None with fewer than two rows. The same rows give the same interval.
    Where all rows are equal it has no width: at 0 of n an upper bound is better taken as 3 / n.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    sizes = None
    if groups is not None:
        _, which = np.unique([str(g) for g in groups], return_inverse=True)
        sizes = np.bincount(which).astype(np.float64)
        values = np.bincount(which, values) / sizes  # of each group its mean, weighed by its size
    n = len(values)
    if n < 2:
        return None
    if np.all(values == values[0]):  # without a matmul's rounding
        return float(values[0]), float(values[0])
    # in slices of 256, so that 10,000 rows do not need a (1000, 10000) matrix of floats
    counts = resampled(n, resamples, seed)
    slices = (counts[i : i + 256].astype(np.float64) for i in range(0, resamples, 256))
    if sizes is None:
        means = np.concatenate([c @ values for c in slices]) / n
    else:
        means = np.concatenate([c @ (values * sizes) / (c @ sizes) for c in slices])
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return float(low), float(high)


def mean_of_defined(values: Array, defined: NDArray[np.bool_], why: str) -> Array | Estimate:
    """(rows,) values where all are defined, else the mean over those that are, with its bootstrap interval and their number.

    A NaN among the defined ones stays a NaN. Raises Unmeasured with `why` where none is defined.
    """
    if not defined.any():
        raise Unmeasured(why)
    if defined.all():
        return values
    kept = values[defined]
    if not np.isfinite(kept).all():
        return np.where(defined, values, 0.0)
    return Estimate(float(kept.mean()), bootstrap_ci(kept), len(kept))
