"""What attribution found out about the experts of a model, in lines and as a picture; both read the JSON of `peft-unlearn experts`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .figure import figure, png

CHOSEN = "#c1121f"
# matrix, its title, colors, format of a number, limits of the colors, logarithmic
_PANELS = (
    ("forget", "affinity for the forget set", "Blues", ".2f", (0, None), False),
    ("lift", "lift: affinity / affinity for the retain set", "PuOr_r", ".1f", (0.05, 20), True),
)
_SMALL = {"ha": "center", "va": "center", "fontsize": 7}


def experts_text(found: Mapping[str, Any]) -> str:
    """What was picked and how far it can be trusted, in lines."""
    lines = ["chosen experts: affinity for the forget set, lift over the retain set"]
    for k, ids in found["chosen"].items():
        row = found["layers"].index(int(k))
        picks = (f"expert {e}: {found['forget'][row][e]:.2f}, lift {found['lift'][row][e]:.1f}" for e in ids)
        lines.append(f"  block {k}: " + "; ".join(picks))
    s = found["stability"]
    lines.append(
        f"halves of the forget set: same top expert in {s['same_top']:.0%} of blocks, overlap of the six best {s['top6_overlap']:.2f}, "
        f"rank correlation {s['spearman']:.2f} (stability is not meaning: look at the lift)"
    )
    return "\n".join(lines + [f"warning: {w}" for w in found["warnings"]])


def experts_picture(found: Mapping[str, Any], planted: Mapping[str, Mapping[int, int]] | None = None) -> bytes:
    """PNG of two matrices, layers by experts: affinity for the forget set, and its lift over the retain set; chosen experts framed.

    Args:
        planted: ``{domain: {layer: expert}}`` where the right answer is known (the embedded base): a third panel.
    """
    from matplotlib.patches import Rectangle

    rows, columns = len(found["forget"]), len(found["forget"][0])
    n = 2 if planted is None else 3
    drawn = figure(n * min(1.5 + 0.45 * columns, 11), 1.6 + 0.55 * rows, dpi=130)
    axes = drawn.subplots(1, n)
    for ax, panel in zip(axes, _PANELS, strict=False):
        _matrix(drawn, ax, found[panel[0]], *panel[1:])
    if planted is not None:
        axes[2].imshow([[1.0] * columns] * rows, cmap="Greys", vmin=0, vmax=20, aspect="auto")
        axes[2].set_title("planted when the base was made", fontsize=10)
        for domain, where in planted.items():
            for k, e in where.items():
                axes[2].text(e, found["layers"].index(k), domain, **_SMALL)
    for ax in axes:
        ax.set_xlabel("expert")
        ax.set_ylabel("block")
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows), [str(k) for k in found["layers"]])
        for k, ids in found["chosen"].items():
            for e in ids:
                at = e - 0.5, found["layers"].index(int(k)) - 0.5
                ax.add_patch(Rectangle(at, 1, 1, fill=False, edgecolor=CHOSEN, linewidth=2))
    return png(drawn)


def _matrix(
    drawn: Any, ax: Any, values: Any, title: str, colors: str, form: str, limits: tuple[Any, Any], log: bool
) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = [[min(max(v, limits[0]), 100) for v in row] for row in values] if log else values
    image = ax.imshow(values, cmap=colors, aspect="auto", norm=(LogNorm if log else Normalize)(*limits))
    ax.set_title(title, fontsize=10)
    top = max(map(max, values))
    for i, row in enumerate(values if len(values[0]) <= 16 else ()):
        for j, v in enumerate(row):
            dark = (v > 8 or v < 0.15) if log else v > 0.6 * top
            ax.text(j, i, format(v, form), color="white" if dark else "black", **_SMALL)
    drawn.colorbar(image, ax=ax, shrink=0.9)
