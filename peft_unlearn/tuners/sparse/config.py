"""`SparseConfig`: how many entries of which parameters are adapted; which ones stands with the values, in the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig

from ...folder.schema import is_number, is_whole
from ..peft_type import SPARSE_TYPE, peft_type
from ..selection import Selection


@dataclass
class SparseConfig(PeftConfig):
    """``W + scale * D`` with D zero outside chosen entries of W, whose values are trained; everything else frozen.

    Args:
        selection: the entries (not saved with the configuration; they are tensors of the adapter). Fills the next two.
        counts: name of the base's parameter -> number of chosen entries, above 0.
        shapes: the same names -> the parameter's shape, compared with the base's.
        scale: the delta's factor.
        init_weights: False draws the values at random instead of zero (for tests).

    Raises:
        ValueError: naming everything that is wrong.
    """

    counts: dict[str, int] | None = field(default=None)
    shapes: dict[str, list[int]] | None = field(default=None)
    scale: float = field(default=1.0)
    init_weights: bool = field(default=True)
    selection: InitVar[Selection | None] = None

    # PEFT asks every config for this; parameters go by their full names, never by a pattern.
    target_modules: ClassVar[None] = None

    def __post_init__(self, selection: Selection | None) -> None:  # type: ignore[override]
        super().__post_init__()
        self.peft_type = peft_type(SPARSE_TYPE)
        self.chosen = selection if isinstance(selection, Selection) else None
        wrong: list[str] = []
        if self.chosen is not None:
            self.counts = {n: len(i) for n, i in self.chosen.indices.items() if len(i)}
            self.shapes = {n: list(self.chosen.shapes[n]) for n in self.counts}
            if not self.counts:
                wrong.append("the selection chose no entry")
        elif not _is_table(self.counts, lambda k: is_whole(k) and k > 0):
            wrong.append(
                f"counts {_shown(self.counts)}: expected {{parameter: number of entries}} with at least one; they come with a selection "
                "(SparseConfig(selection=..), or a recipe's `selection`)"
            )
        elif not _is_table(self.shapes, lambda s: isinstance(s, list | tuple) and all(map(is_whole, s))) or set(
            self.shapes or ()
        ) != set(self.counts or ()):
            wrong.append(f"shapes {_shown(self.shapes)}: expected the shape of each parameter in counts")
        if not wrong:
            # JSON sorts its keys, and the tensors hold one parameter after the other: so one order always.
            self.counts, self.shapes = (
                dict(sorted((self.counts or {}).items())),
                dict(sorted((self.shapes or {}).items())),
            )
            for name, k in (self.counts or {}).items():
                if k > (size := math.prod((self.shapes or {})[name])):
                    wrong.append(f"counts: {name} has {size} entries, and {k} of them are wanted")
        if not is_number(self.scale) or not math.isfinite(self.scale) or not self.scale:
            wrong.append(f"scale {self.scale!r}: expected a finite number that is not 0")
        if wrong:
            raise ValueError("SparseConfig: " + "; ".join(wrong))


def _is_table(given: Any, fits: Any) -> bool:
    return isinstance(given, Mapping) and bool(given) and all(isinstance(n, str) and fits(v) for n, v in given.items())


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) < 80 else f"{text[:80]}.."
