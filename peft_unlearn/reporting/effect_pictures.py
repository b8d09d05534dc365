"""Pictures of effect.json: curves over the steps, a layer heat map, and a scatter of single tokens and sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import figure as kit
from .figure import FORGET, GRAY, RETAIN

COLORS = ("#c8452d", "#2a6f97", "#3c8d5a", "#8a5aa8", "#c98a1b", "#5b6770", "#b5507f", "#4aa3a2")
UPDATE = "update"  # dashed and black: it is what the optimizer was given, not one objective
_MOST_ROWS, _MOST_LAYERS = 6, 40


def pictures(found: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> PNG of what a track of effects holds: curves, layers, and instances where some were measured."""
    out = {"curves": curves(found), "layers": layers(found)}
    if (png := instances(found)) is not None:
        out["instances"] = png
    return out


def _labels(found: Mapping[str, Any]) -> list[str]:
    return list(found["points"][0]["effects"])


def _color(label: str, labels: Sequence[str]) -> str:
    return "#222222" if label == UPDATE else COLORS[[x for x in labels if x != UPDATE].index(label) % len(COLORS)]


def _shown(label: str, found: Mapping[str, Any]) -> str:
    rule = found.get("rule")
    return f"whole update (rule {next(iter(rule))})" if label == UPDATE and rule else label


def _title(figure: Any, found: Mapping[str, Any], what: str, extra: str = "") -> None:
    name = found.get("name") or "this run"
    n = found["points"][0]["batches"]
    figure.suptitle(
        f"{what} of {name} ({found['space']} gradients, {n} batch{'es' if n > 1 else ''}{extra})",
        x=0.01,
        ha="left",
        fontsize=12,
    )


def _number(x: float | None) -> float:
    return math.nan if x is None else x


def _scale(axes: Any, along: str, values: Sequence[float], decades: int) -> None:
    """A signed logarithmic axis where the values span so much that a linear one would show only the largest; `decades` below the
    largest it is linear, so that signs of nothing do not fill the picture."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v) and v)
    if len(sizes) < 3 or sizes[-1] < 30 * sizes[len(sizes) // 2]:
        return
    top = math.ceil(math.log10(sizes[-1]))
    low = top - decades
    getattr(axes, f"set_{along}scale")("symlog", linthresh=10.0**low, linscale=0.7)
    axes.autoscale(True, axis=along)  # margins in the new scale
    powers = [10.0**k for k in range(low, top + 1) if (top - k) % max(1, decades // 2) == 0]
    first, last = getattr(axes, f"get_{along}lim")()
    ticks = [t for t in (*(-x for x in reversed(powers)), 0.0, *powers) if first <= t <= last]
    axis = getattr(axes, f"{along}axis")
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


def curves(found: Mapping[str, Any]) -> bytes:
    """Both effects over the steps, one color per objective with a band of one standard error; the risks beneath."""
    points, labels = found["points"], _labels(found)
    steps = [p["step"] for p in points]
    figure = kit.figure(11.5, 6.6, dpi=130)
    _title(figure, found, "Effects", "; bands: one standard error")
    grid = figure.subplots(2, 2, sharex=True, height_ratios=[2.2, 1])
    sides = (
        ("unlearning", "Unlearning effect: below 0 the step forgets"),
        ("retaining", "Retaining effect: below 0 the step damages"),
    )
    for axes, (side, title) in zip(grid[0], sides, strict=True):
        every: list[float] = []
        for label in labels:
            estimates = [p["effects"][label][side] for p in points]
            y = [_number(e["value"]) for e in estimates]
            se = [_number(e["se"]) if e["se"] is not None else 0.0 for e in estimates]
            low, high = ([a + s * b for a, b in zip(y, se, strict=True)] for s in (-1, 1))
            every += y
            color, line = _color(label, labels), "--" if label == UPDATE else "-"
            axes.fill_between(steps, low, high, color=color, alpha=0.16, lw=0)
            axes.plot(steps, y, color=color, ls=line, marker="o", ms=4, lw=1.8, label=_shown(label, found))
        axes.axhline(0, color=GRAY, lw=1.0, zorder=1)
        _scale(axes, "y", every, decades=3)
        bottom = axes.get_ylim()[0]
        good = side == "unlearning"
        axes.axhspan(min(bottom, 0), 0, color="#3c8d5a" if good else FORGET, alpha=0.05, zorder=0, lw=0)
        axes.set_ylim(bottom=bottom)
        kit.title(axes, title, 11)
        axes.set_ylabel("$e_u$, nats per token and unit step" if good else "$e_r$")
        kit.plain_axes(axes)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9.5)
    for axes, side, color in zip(grid[1], ("forget", "retain"), (FORGET, RETAIN), strict=True):
        axes.plot(steps, [_number(p["risk"][side]) for p in points], color=color, marker="s", ms=3.5, lw=1.6)
        axes.set(xlabel="optimizer step", ylabel="nats per token")
        kit.title(axes, f"{side.capitalize()} risk (mean NLL)", 10)
        axes.set_ylim(bottom=0)
        kit.plain_axes(axes)
    return kit.png(figure)


def layers(found: Mapping[str, Any]) -> bytes:
    """Where the effects come from: layers by steps, one row of panels per objective; each panel has its own color scale."""
    from matplotlib.colors import Normalize, SymLogNorm

    points = found["points"]
    labels = _labels(found)
    labels = sorted(labels, key=lambda x: x == UPDATE)[:_MOST_ROWS]
    some = points[0]["effects"][labels[0]]
    by = "layers" if len(some["layers"]) <= _MOST_LAYERS else "groups"
    rows = list(some[by])
    blocks = sum(r.isdigit() for r in rows)
    height = max(1.9, 0.34 * len(rows) + 0.9)
    figure = kit.figure(max(9.0, 2.2 + 1.35 * len(points)), 0.9 + height * len(labels), dpi=130)
    _title(figure, found, "Where the effects arise: layers")
    grid = figure.subplots(len(labels), 2, squeeze=False, sharey=True)
    for line, label in zip(grid, labels, strict=True):
        for axes, side in zip(line, ("unlearning", "retaining"), strict=True):
            z = [[_number(p["effects"][label][by][r][side]) for p in points] for r in rows]
            top = max((abs(v) for row in z for v in row if math.isfinite(v)), default=0.0) or 1.0
            small = sorted(abs(v) for row in z for v in row if math.isfinite(v))[len(rows) * len(points) // 2 :][:1]
            norm = (
                SymLogNorm(linthresh=top / 100, vmin=-top, vmax=top, base=10)
                if small and small[0] < top / 20
                else Normalize(-top, top)
            )
            image = axes.imshow(z, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
            bar = kit.colorbar(figure, image, axes, pad=0.015, aspect=12, ticks=[-top, 0, top])
            bar.ax.set_yticklabels([_short(-top), "0", _short(top)], fontsize=7.5)
            bar.ax.minorticks_off()
            if len(rows) * len(points) <= 120:
                _numbers(axes, z, norm)
            kit.title(axes, f"{_shown(label, found)}: {side} effect", 10)
            kit.numbered(axes, [str(p["step"]) for p in points], [_place(r, blocks) for r in rows], 8.5)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    figure.supxlabel("blue: the step raises the risk there; red: it lowers it", fontsize=9, color=GRAY)
    return kit.png(figure)


def _numbers(axes: Any, z: Sequence[Sequence[float]], norm: Any) -> None:
    for i, row in enumerate(z):
        for j, v in enumerate(row):
            if math.isfinite(v):
                strong = abs(float(norm(v)) - 0.5) > 0.33
                axes.text(j, i, _short(v), ha="center", va="center", fontsize=7, color="white" if strong else "#333333")


def _short(x: float) -> str:
    """Two digits, without the zeros of a padded exponent."""
    text = f"{x:.2g}"
    if "e" in text:
        mantissa, _, power = text.partition("e")
        return f"{mantissa}e{int(power)}"
    return text


def _place(name: str, blocks: int) -> str:
    if name.isdigit():
        return f"block {name}, {group_of(name, blocks)}"
    return name.replace("_", " ")


def instances(found: Mapping[str, Any]) -> bytes | None:
    """Each measured token (or sequence) of the forget set by what lowering its likelihood does to both risks; its color is the
    weight that the objective gives it."""
    points = [p for p in found["points"] if any(e["instances"] for e in p["effects"].values())]
    labels = [k for k in _labels(found) if any(p["effects"][k]["instances"] for p in points)][:_MOST_ROWS]
    if not points or not labels:
        return None
    figure = kit.figure(1.2 + 3.9 * len(points), 1.3 + 3.1 * len(labels), dpi=130)
    _title(figure, found, "Single answers")
    grid = figure.subplots(len(labels), len(points), squeeze=False)
    for line, label in zip(grid, labels, strict=True):
        for axes, point in zip(line, points, strict=True):
            _scatter(figure, axes, point["effects"][label]["instances"])
            what = "sequences" if _whole(point["effects"][label]["instances"]) else "tokens"
            kit.title(axes, f"{label}, step {point['step']} ({what})", 10)
    for axes in grid[-1]:
        axes.set_xlabel("forget risk: left of 0 it forgets", fontsize=9)
    for axes in grid[:, 0]:
        axes.set_ylabel("retain risk: below 0 it damages", fontsize=9)
    figure.supxlabel(
        "A point: what lowering the likelihood of one token (or answer) does to the risks, before its weight. Color and size: the weight.",
        fontsize=9, color=GRAY,
    )  # fmt: skip
    return kit.png(figure)


def _whole(found: Sequence[Mapping[str, Any]]) -> bool:
    return bool(found) and found[0]["token"] is None


def _scatter(figure: Any, axes: Any, found: Sequence[Mapping[str, Any]]) -> None:
    kept = [i for i in found if None not in (i["forget"], i["retain"], i["weight"])]
    if not kept:
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes, color=GRAY)
        return
    x, y, w = ([i[k] for i in kept] for k in ("forget", "retain", "weight"))
    top, low = max(w), min(w)
    same = top - low <= 1e-3 * max(abs(top), 1e-30)
    if same:  # one weight for all: no scale to read off
        axes.scatter(x, y, s=30, color=COLORS[1], alpha=0.75, lw=0, zorder=3)
        axes.annotate(
            f"every weight {_short(top)}", (0.03, 0.95), xycoords="axes fraction", fontsize=8.5, color=GRAY, va="top",
            bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1.5}, zorder=4,
        )  # fmt: skip
    else:
        size = [14 + 46 * (v - low) / (top - low) for v in w]
        dots = axes.scatter(x, y, c=w, s=size, cmap="viridis_r", alpha=0.85, lw=0.3, edgecolor="white", zorder=3)
        kit.colorbar(figure, dots, axes, pad=0.02, aspect=22).ax.tick_params(labelsize=8)
    for along, values, line in (("x", x, axes.axvline), ("y", y, axes.axhline)):
        line(0, color=GRAY, lw=0.9, zorder=1)
        _scale(axes, along, values, decades=4)
    axes.tick_params(labelsize=8.5)
    kit.plain_axes(axes)


def group_of(place: str, n_blocks: int) -> str:
    """Layer group of a place: blocks fall into thirds by number."""
    return ("shallow", "middle", "deep")[3 * int(place) // n_blocks] if place.isdigit() else place
