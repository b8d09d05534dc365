"""The picture of docs/methods: what every recipe keeps against what can still be extracted after it, from results.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

X, Y = "forget/extraction_strength", "retain_heldout/value_accuracy"
VERSION = 2  # of the drawing: raise it and the picture counts as stale
Point = tuple[str, float, float, str]  # label, x, y, "base" | "twin" | "recipe"


def points(results: Mapping[str, Any]) -> list[Point]:
    out: list[Point] = []
    for name in ("base", "twin"):
        if (f := results.get("models", {}).get(name)) is not None:
            out.append((name.replace("twin", "retain model"), f[X], f[Y], name))
    for name, row in sorted(results["recipes"].items()):
        f = row.get("figures") or {}
        if f.get(X) is not None and f.get(Y) is not None:
            out.append((name.removeprefix("people-"), f[X], f[Y], "recipe"))
    return out


def key(results: Mapping[str, Any]) -> str:
    """What the picture shows, as one digest; it is written into the file."""
    return hashlib.sha256(json.dumps([VERSION, points(results)]).encode()).hexdigest()


def is_current(path: Path, results: Mapping[str, Any]) -> bool:
    """Whether the file holds this picture (nothing measured wants no file). Pixels are not compared: fonts and releases differ."""
    from PIL import Image

    if not points(results):
        return not path.exists()
    if not path.is_file():
        return False
    with Image.open(path) as image:
        return image.info.get("Description") == key(results)


def draw(path: Path, results: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = points(results)
    if not found:
        return
    look = {
        "recipe": {"marker": "o", "s": 30, "color": "#2f6db3"},
        "base": {"marker": "s", "s": 70, "color": "#555555"},
        "twin": {"marker": "*", "s": 190, "color": "#c8781e"},
    }
    fig, ax = plt.subplots(figsize=(9, 6), dpi=110)
    for _, x, y, kind in found:
        ax.scatter([x], [y], zorder=3, edgecolors="white", linewidths=0.6, **look[kind])
    twin = next((p for p in found if p[3] == "twin"), None)
    if twin is not None:
        ax.axvline(twin[1], color=look["twin"]["color"], lw=0.8, ls=":", zorder=1)
    low = min(y for _, _, y, _ in found)
    ax.set_xlim(-0.04, 1.06)
    ax.set_ylim(low - 0.08, 1.06)
    ax.set_xlabel("extraction strength of the forget answers (the retain model's: what can be guessed)")
    ax.set_ylabel("value accuracy of retain questions, wording never trained")
    ax.set_title("Recipes on the embedded people: one seed, one base", fontsize=11)
    ax.grid(alpha=0.25, lw=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    label(fig, ax, found, look)
    fig.savefig(path, metadata={"Description": key(results), "Software": None})
    plt.close(fig)


def label(fig: Any, ax: Any, found: list[Point], look: Mapping[str, Any]) -> None:
    """Write each point's name beside it where nothing else stands yet; a thin line leads there when it had to go far."""
    fig.canvas.draw()
    renderer, area = fig.canvas.get_renderer(), ax.get_window_extent()
    pixels = [tuple(ax.transData.transform((x, y))) for _, x, y, _ in found]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    taken += [
        (x - 2, area.y0, x + 2, area.y1) for (x, _), p in zip(pixels, found, strict=True) if p[3] == "twin"
    ]  # its line
    # Crowded points first: they have the fewest places.
    order = sorted(range(len(found)), key=lambda i: (-sum(_near(pixels[i], q) for q in pixels), found[i][0]))
    lines: list[tuple[tuple[float, float], tuple[float, float]]] = []
    names: list[tuple[float, ...]] = []
    for i in order:
        name, x, y, kind = found[i]
        text = ax.text(
            x, y, name, fontsize=9, weight="normal" if kind == "recipe" else "bold", color=look[kind]["color"]
        )
        extent = text.get_window_extent(renderer)
        w, h = extent.width, extent.height
        for far, left, bottom in _places(pixels[i], w, h):
            box = (left - 3, bottom - 1, left + w + 3, bottom + h + 1)
            inside = box[0] > area.x0 and box[2] < area.x1 and box[1] > area.y0 and box[3] < area.y1
            end = (left + w / 2, bottom + h / 2)
            # A line may pass a point, never a name; a name may not lie on a line.
            crossed = far and any(_crosses(pixels[i], end, t) for t in names)
            crossed = crossed or any(_crosses(a, b, box) for a, b in lines)
            if inside and not crossed and not any(_overlap(box, t) for t in taken + names):
                break
        else:
            raise ValueError(f"no room for the label {name}: make the picture larger")
        names.append(box)
        text.set_position(ax.transData.inverted().transform((left, bottom)))
        text.set_verticalalignment("baseline")
        if far:
            lines.append((pixels[i], end))
            at = ax.transData.inverted().transform(
                (min(max(pixels[i][0], left), left + w), min(max(pixels[i][1], bottom), bottom + h))
            )
            ax.plot([x, at[0]], [y, at[1]], color="#999999", lw=0.6, zorder=2)


def _near(p: tuple[float, float], q: tuple[float, float]) -> bool:
    return abs(p[0] - q[0]) < 80 and abs(p[1] - q[1]) < 25


def _places(p: tuple[float, float], w: float, h: float) -> Iterator[tuple[bool, float, float]]:
    """(needs a line, left, bottom) of places for a label, nearest first."""
    import math

    x, y = p
    for left, bottom in (
        (x + 10, y - h / 2 + 1),
        (x - 10 - w, y - h / 2 + 1),
        (x - w / 2, y + 8),
        (x - w / 2, y - 8 - h),
    ):
        yield False, left, bottom
    for reach in range(20, 320, 10):
        for k in range(24):
            angle = k * math.pi / 12
            yield (
                True,
                x + reach * math.cos(angle) - (w if math.cos(angle) < 0 else 0),
                y + reach * math.sin(angle) - h / 2,
            )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(p: tuple[float, float], q: tuple[float, float], box: tuple[float, ...]) -> bool:
    """Whether the segment from p to q touches the box (looked at in small steps)."""
    steps = 60
    inside = ((p[0] + (q[0] - p[0]) * k / steps, p[1] + (q[1] - p[1]) * k / steps) for k in range(steps + 1))
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in inside)
