"""The picture of a forget vector: the vector, what a classifier sees with and without it, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import figure as kit
from .figure import BASE, DARK, FORGET, GRAY, RETAIN, RETAIN_MODEL

_SUBJECTS = {
    "base": ("base", BASE),
    "adapter": ("with the vector", FORGET),
    "retain_only": ("retrained without", RETAIN_MODEL),
}


@dataclass(frozen=True)
class Seen:
    """One test image. before, after: (class, confidence) that the classifier names without and with the vector; right: the true class."""

    image: Any  # (height, width) or (height, width, 3)
    with_vector: Any
    right: str
    before: tuple[str, float]
    after: tuple[str, float]


def vector(
    delta: Any, forgotten: Sequence[Seen], kept: Sequence[Seen], accuracies: Mapping[str, Mapping[str, float]]
) -> bytes:
    """PNG: the vector, test images of what is forgotten and of what is kept, each alone and with the vector, and accuracies.

    delta: (height, width), or (height, width, channels), of which the mean over channels is drawn.   accuracies: set in words ->
    subject (base, adapter, retain_only) -> share of right answers.
    """
    columns = max(len(forgotten), len(kept))
    drawn = kit.figure(4.4 + 1.15 * columns, 6.4)
    left, right = drawn.subfigures(1, 2, width_ratios=[4.4, 1.15 * columns + 0.4])
    top, bottom = left.subplots(2, 1, height_ratios=[1.25, 1])
    _heat(left, top, delta)
    _bars(bottom, accuracies)
    grid = right.subplots(4, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for block, (seen, what) in enumerate(((forgotten, "forgotten class"), (kept, "kept classes"))):
        for i, one in enumerate(seen):
            _image(grid[2 * block][i], one.image, one.before, one.right)
            _image(grid[2 * block + 1][i], one.with_vector, one.after, one.right)
        for row, text in ((2 * block, f"{what}: test images"), (2 * block + 1, "with the vector")):
            kit.title(grid[row][0], text, 9.5)
    return kit.png(drawn)


def _heat(figure: Any, axes: Any, delta: Any) -> None:
    flat = delta if delta.ndim == 2 else delta.mean(-1)
    most = float(abs(flat).max()) or 1.0
    image = axes.imshow(flat, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_axis_off()
    kit.title(axes, "The forget vector, added to every image", 10.5)
    kit.colorbar(figure, image, axes, shrink=0.8)


def _image(axes: Any, image: Any, named: tuple[str, float], right: str) -> None:
    axes.imshow(image, cmap="gray_r", vmin=-1.0, vmax=1.0, interpolation="nearest")
    label, sure = named
    color = RETAIN if label == right else FORGET
    axes.text(
        0.5, -0.06, f"{label}  ({sure:.2f})", transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=color
    )


def _bars(axes: Any, accuracies: Mapping[str, Mapping[str, float]]) -> None:
    names = list(accuracies)
    for k, (subject, (label, color)) in enumerate(_SUBJECTS.items()):
        there = [(i, accuracies[n][subject]) for i, n in enumerate(names) if subject in accuracies[n]]
        bars = axes.barh([i + 0.27 * (k - 1) for i, _ in there], [v for _, v in there], 0.25, color=color, label=label)
        axes.bar_label(bars, [f"{v:.2f}" for _, v in there], padding=2, fontsize=7.5, color=GRAY)
    axes.set_yticks(range(len(names)), names, fontsize=8.5, color=DARK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18)
    axes.set_xticks([0, 0.5, 1])
    kit.plain_axes(axes)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.4, -0.1),
        ncols=3,
        frameon=False,
        fontsize=7.5,
        columnspacing=0.8,
        handlelength=1,
    )
    kit.title(axes, "Share of images named right", 10.5)
