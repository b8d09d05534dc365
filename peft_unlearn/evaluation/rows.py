"""The rows of a set, and some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rows_of(data: Any, source: str) -> list[dict[str, Any]] | None:
    """The rows of a set by name, from a mapping or a `ForgetRetain`; None where the data has no such set."""
    if isinstance(data, Mapping):
        return data.get(source)
    # extra first: the bundle of the embedded people retains more than the suite's own retain set
    found = data.extra.get(source)
    return getattr(data, source, None) if found is None and source in ("forget", "retain", "holdout") else found


def evenly(count: int, n: int | None) -> NDArray[np.int64]:
    """(min(n, count),) indices spread evenly over range(count): rows lie person by person, so the first n are one
    person."""
    if n is None or n >= count:
        return np.arange(count)
    return (np.arange(n) * count) // n
