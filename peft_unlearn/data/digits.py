"""The embedded images: 1,797 handwritten digits of the UCI repository, shipped as the 57 KB file that they are.

Source and licence (CC BY 4.0): digits.LICENSE.txt. Images are enlarged to 16 x 16 by doubling pixels, and scaled to [-1, 1]; nothing else
has to be done to them before a model. The split into 1,257 training and 540 test images is one and the same for every seed.
"""

from __future__ import annotations

import gzip
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .classes import split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIZE, CLASSES, TRAIN = 16, 10, 1257
_RANDOM = re.compile(r"random([1-9]|[1-8]\d|90)")


@cache
def arrays() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(images (1797, 1, 16, 16) float32 in [-1, 1], labels (1797,)), shuffled once: the first `TRAIN` are for training."""
    import numpy as np

    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt", encoding="ascii") as f:
        table = np.loadtxt(f, delimiter=",", dtype=np.int64)
    table = table[np.random.Generator(np.random.PCG64(0)).permutation(len(table))]
    small = table[:, :64].reshape(-1, 1, 8, 8) / 8.0 - 1.0
    return small.repeat(2, 2).repeat(2, 3).astype(np.float32), table[:, 64]


def rows(train: bool) -> list[dict[str, Any]]:
    """The training or the test images as rows: ``{"pixel_values": (1, 16, 16) float32, "label": int}``."""
    x, y = arrays()
    part = slice(None, TRAIN) if train else slice(TRAIN, None)
    return [{"pixel_values": image, "label": int(label)} for image, label in zip(x[part], y[part], strict=True)]


def check_forget(value: str) -> str:
    """`value` as an embedded reference has it: digits by commas, in order ("3", "3,5"), or ``random10`` (percent of the rows)."""
    if _RANDOM.fullmatch(value):
        return value
    digits = value.split(",")
    if not all(d in "0123456789" and len(d) == 1 for d in digits) or len(set(digits)) in (0, CLASSES):
        raise UserError(
            f"embedded:digits?forget={value}: expected digits by commas, e.g. 3 or 3,5 (not all ten), or random10 for ten percent of "
            "the training rows"
        )
    return ",".join(sorted(set(digits)))


def generate(seed: int = 0, forget: str = "3") -> dict[str, list[dict[str, Any]]]:
    """The sets of one request; see `classes.split`. seed: of the rows that a random request draws."""
    return split(rows(True), rows(False), check_forget(forget).split(","), seed)
