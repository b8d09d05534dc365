"""Rows with a label, and what one request makes of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError, nearest

Row = dict[str, Any]


def split(
    train: list[Row], test: list[Row], forget: Sequence[str], seed: int = 0, names: Sequence[str] = ()
) -> dict[str, list[Row]]:
    """The sets of one request: forget, retain, holdout and, for classes, forget_test.

    forget: classes (names, or labels where there are none), or ``["random10"]``: ten percent of the training rows, drawn with `seed`.
    """
    if forget and (found := re.fullmatch(r"random(\d{1,2})", forget[0])):
        order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(train))
        n = max(1, round(len(train) * int(found[1]) / 100))
        drawn = {*order[:n].tolist()}
        out = {"forget": [r for i, r in enumerate(train) if i in drawn]}
        return {**out, "retain": [r for i, r in enumerate(train) if i not in drawn], "holdout": test}
    known = list(names) or [str(k) for k in range(1 + max(r["label"] for r in train))]
    if lost := [c for c in forget if c not in known]:
        raise UserError(f"data: there is no class {lost[0]!r} to forget.{nearest(lost[0], known)}")
    gone = {known.index(c) for c in forget}
    sets = {
        "forget": [r for r in train if r["label"] in gone], "retain": [r for r in train if r["label"] not in gone],
        "holdout": [r for r in test if r["label"] not in gone], "forget_test": [r for r in test if r["label"] in gone],
    }  # fmt: skip
    return {k: rows for k, rows in sets.items() if rows or k in ("forget", "retain")}
