"""Where in the network chosen weights lie, in lines and as a picture; both read the JSON of `peft-unlearn attribute`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import figure as kit
from .tables import Table, to_text


def selection_text(found: Mapping[str, Any]) -> str:
    """What was chosen, and the share of it that lies in each block and kind of module."""
    values = ", ".join(
        f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in found["hyper"].items() if v is not None
    )
    head = (
        f"{found['method']}{f' ({values})' if values else ''}: {found['count']:,} entries, {found['density']:.3%} of the weights looked at "
        f"(ratio {found['ratio']:g}, budget {found['budget']})"
    )
    kinds = _kinds(found)
    rows = []
    for block, of in found["where"].items():
        shares = [of[k]["chosen"] / found["count"] if k in of else None for k in kinds]
        cells = [f"{share:.1%}" if share is not None else "" for share in shares]
        rows.append([f"block {block}" if block != "-" else "elsewhere", *cells, f"{sum(s or 0 for s in shares):.1%}"])
    return f"{head}\nshare of the chosen entries:\n{to_text(Table(['', *kinds, 'all'], rows))}"


def selection_picture(found: Mapping[str, Any]) -> bytes:
    """PNG of two matrices, blocks by kinds of modules: the share of all chosen entries that lies there, and the share of the module's own
    entries that was chosen."""
    kinds, blocks = _kinds(found), list(found["where"])
    cells = [[found["where"][b].get(k) for k in kinds] for b in blocks]
    shares = [[100 * c["chosen"] / found["count"] if c else None for c in row] for row in cells]
    dense = [[100 * c["chosen"] / c["of"] if c else None for c in row] for row in cells]
    drawn = kit.figure(2 * min(2.2 + 0.75 * len(kinds), 9), 1.7 + 0.38 * len(blocks))
    axes = drawn.subplots(1, 2)
    _matrix(drawn, axes[0], shares, "% of all chosen weights", kinds, blocks)
    _matrix(drawn, axes[1], dense, f"% of the module's weights (all: {100 * found['density']:.2g})", kinds, blocks)
    axes[0].set_ylabel("block", fontsize=9)
    drawn.suptitle(f"Where {found['method']} lets weights move", x=0.01, ha="left", fontsize=12)
    return kit.png(drawn)


def _kinds(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(k for kinds in found["where"].values() for k in kinds))


def _matrix(
    drawn: Any, axes: Any, values: list[list[float | None]], title: str, kinds: list[str], blocks: list[str]
) -> None:
    top = max((v for row in values for v in row if v is not None), default=0) or 1
    image = axes.imshow(
        [[float("nan") if v is None else v for v in row] for row in values],
        cmap="Blues",
        vmin=0,
        vmax=top,
        aspect="auto",
    )
    kit.title(axes, title, 10)
    kit.numbered(axes, kinds, ["other" if b == "-" else b for b in blocks], 8)
    axes.tick_params(axis="x", rotation=30)
    for i, row in enumerate(values if len(blocks) <= 40 else ()):
        for j, v in enumerate(row):
            if v is not None:
                text = f"{v:.1f}" if v >= 0.95 else f"{v:.2g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if v > 0.6 * top else "black")
    kit.colorbar(drawn, image, axes, shrink=0.9)
