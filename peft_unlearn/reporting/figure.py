"""What all pictures share: colors, plain axes, and a PNG at the end. A picture takes plain values and returns bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

FORGET, RETAIN, RETAIN_MODEL, BASE = "#c8452d", "#2a6f97", "#3c8d5a", "#6b6b6b"
COLORS = ("#c8452d", "#2a6f97", "#8a5aa8", "#c98a1b", "#5b6770", "#b5507f", "#4aa3a2", "#7a5230")  # of adapters
GRAY, FAINT, DARK, LINE = "#666666", "#bbbbbb", "#333333", "#eeeeee"


PNG_MARK = b"tEXtSoftware\x00peft-unlearn"  # how a picture of ours is known on a disk


def figure(width: float, height: float, dpi: int = 150) -> Any:
    from matplotlib.figure import Figure  # the object, not pyplot: no backend is chosen and none is changed

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def png(drawn: Any) -> bytes:
    out = io.BytesIO()
    drawn.savefig(out, format="png", metadata={"Software": "peft-unlearn"})
    return out.getvalue()


def plain_axes(*axes: Any) -> None:
    for a in axes:
        a.grid(color=LINE, zorder=0)
        a.set_axisbelow(True)
        a.spines[["top", "right"]].set_visible(False)


def title(axes: Any, text: str, size: float = 11.5) -> None:
    axes.set_title(text, loc="left", fontsize=size)


def beside(axes: Any, text: str, at: tuple[float, float], offset: tuple[float, float], **look: Any) -> None:
    """A label a few points beside a place of the data."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", **look)


def legend_below(drawn: Any, columns: int = 2) -> None:
    drawn.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)


def colorbar(drawn: Any, image: Any, axes: Any, **settings: Any) -> Any:
    bar = drawn.colorbar(image, ax=axes, **settings)
    bar.outline.set_visible(False)
    return bar


def numbered(axes: Any, columns: Sequence[str], rows: Sequence[str], size: float = 9) -> None:
    """Axes of a matrix: a label for every column and row, no frame."""
    axes.set_xticks(range(len(columns)), columns, fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def widest_gap(levels: Sequence[float]) -> float:
    """The middle of the widest gap between values: where a label hides no line."""
    return max((b - a, (a + b) / 2) for a, b in pairwise(sorted(levels)))[1]
