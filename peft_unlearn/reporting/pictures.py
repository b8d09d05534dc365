"""Pictures of results: calibration curve, frontier, interference, attacks. Each takes JSON-shaped results and returns a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

FORGET, RETAIN, RETAIN_MODEL, BASE = "#c8452d", "#2a6f97", "#3c8d5a", "#6b6b6b"
COLORS = ("#c8452d", "#2a6f97", "#8a5aa8", "#c98a1b", "#5b6770", "#b5507f", "#4aa3a2", "#7a5230")
GRAY, LINE = "#666666", "#eeeeee"


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # the object, not pyplot: no backend is chosen and none is changed

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def png(drawn: Any) -> bytes:
    out = io.BytesIO()
    drawn.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def plain_axes(axes: Any) -> None:
    axes.grid(color=LINE, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def named(metric: str) -> str:
    return metric.replace("_", " ")


def widest_gap(levels: Sequence[float]) -> float:
    """The middle of the widest gap between values: where a label hides no line."""
    return max((b - a, (a + b) / 2) for a, b in pairwise(sorted(levels)))[1]


def calibration(block: Mapping[str, Any]) -> bytes:
    """Forget and retain value over the scale, with 95 % bands, the floor, the point chosen and the retain-only model's level."""
    points = block["curve"]
    drawn = figure(8.6, 4.5)
    axes = drawn.subplots()
    for side, color, marker in (("retain", RETAIN, "s"), ("forget", FORGET, "o")):
        kept = [p for p in points if p[side]["value"] is not None]
        x, y = [p["scale"] for p in kept], [p[side]["value"] for p in kept]
        bands = [p[side]["ci95"] or [v, v] for p, v in zip(kept, y, strict=True)]
        axes.fill_between(x, [b[0] for b in bands], [b[1] for b in bands], color=color, alpha=0.15, lw=0)
        axes.plot(x, y, color=color, marker=marker, ms=4, lw=2, label=f"{side} set ({block['n'][side]} rows)")
    last = points[-1]["scale"]
    floor = f"floor: {100 * block['floor']:g} % of the base's retain value"
    axes.axhline(block["wanted"], color=RETAIN, ls="--", lw=1.2, label=floor)
    retain_model = (block.get("retain_only") or {}).get("forget", {}).get("value")
    if retain_model is not None:
        axes.axhline(retain_model, color=RETAIN_MODEL, ls=":", lw=1.8, label="retain-only model, forget set")
    chosen = block.get("chosen")
    if chosen:
        axes.axvline(chosen["scale"], color="#bbbbbb", lw=1, zorder=1)
        for side, color in (("retain", RETAIN), ("forget", FORGET)):
            axes.scatter(
                chosen["scale"], chosen[side]["value"], s=120, color=color, edgecolor="white", lw=1.5, zorder=5
            )
        right = chosen["scale"] < 0.6 * last
        drawn_there = (0.0, 1.0, block["wanted"], retain_model, chosen["forget"]["value"], chosen["retain"]["value"])
        middle = widest_gap([v for v in drawn_there if v is not None])
        text = f"scale {chosen['scale']:.3g}\nforget {chosen['forget']['value']:.3f}\nretain {chosen['retain']['value']:.3f}"
        axes.annotate(
            text, (chosen["scale"], middle), xytext=(9 if right else -9, 0), textcoords="offset points", va="center",
            ha="left" if right else "right", fontsize=9.5, color="#333333",
            bbox={"facecolor": "white", "alpha": 0.85, "lw": 0, "pad": 2}, zorder=6,
        )  # fmt: skip
    title = "How far the adapter may be dialed" if chosen else f"No scale will do: {block['reason']}"
    axes.set_title(title, loc="left", fontsize=11.5)
    axes.set(xlabel="scale of the adapter (0: the base, 1: as trained)", ylabel=named(block["metric"]))
    axes.set_ylim(-0.04, 1.07)
    axes.set_xlim(-0.02 * last, 1.03 * last)
    plain_axes(axes)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    return png(drawn)


def frontier(
    paths: Mapping[str, Mapping[str, Any]],
    base_retain: float,
    floor: float | None = None,
    retain_model: tuple[float, float] | None = None,
    spread: Sequence[tuple[float, float]] = (),
    metric: str = "extraction_strength",
) -> bytes:
    """Every adapter's way from the base (scale 0) in the plane of retaining and forgetting: up is forgotten, right is kept.

    paths: name -> calibration block (`curve`, `chosen`), or only a curve.   base_retain: what retention is a share of.
    twin: (forget, retain) of the retain-only model; spread: of further ones, trained with other seeds.
    """
    drawn = figure(8.6, 5.4)
    axes = drawn.subplots()
    lowest = 1.0
    for (name, block), color in zip(paths.items(), COLORS * 9, strict=False):
        kept = [
            (p["retain"]["value"] / base_retain, 1 - p["forget"]["value"], p["scale"])
            for p in block["curve"]
            if None not in (p["forget"]["value"], p["retain"]["value"])
        ]
        if not kept:
            continue
        lowest = min(lowest, *(k[0] for k in kept))
        axes.plot([k[0] for k in kept], [k[1] for k in kept], color=color, lw=1.8, marker=".", ms=5, zorder=3)
        trained = next((k for k in kept if k[2] == 1.0), kept[-1])
        axes.scatter(*trained[:2], s=75, facecolor="white", edgecolor=color, lw=1.8, zorder=4)
        chosen = block.get("chosen")
        label = name
        if chosen:
            at = (chosen["retain"]["value"] / base_retain, 1 - chosen["forget"]["value"])
            axes.scatter(*at, s=95, color=color, edgecolor="white", lw=1.2, zorder=5)
            label = f"{name} (scale {chosen['scale']:.3g})"
        axes.plot([], [], color=color, lw=2, label=label)
    if floor is not None:
        axes.axvline(floor, color=GRAY, ls="--", lw=1.1, zorder=2)
        axes.annotate(
            f"floor {100 * floor:g} %", (floor, 0.02), xytext=(-4, 0), textcoords="offset points", ha="right",
            color=GRAY, fontsize=9,
        )  # fmt: skip
    for k, (forget, retain) in enumerate(spread):
        label = f"{len(spread)} more, other seeds" if k == 0 else None
        axes.scatter(retain / base_retain, 1 - forget, s=60, marker="x", color=RETAIN_MODEL, zorder=5, label=label)
    if retain_model is not None:
        axes.scatter(
            retain_model[1] / base_retain, 1 - retain_model[0], s=200, facecolor="none", edgecolor=RETAIN_MODEL, lw=2.2, zorder=6,
            label="retain-only model",
        )  # fmt: skip
        lowest = min(lowest, retain_model[1] / base_retain)
    axes.scatter(1, 0, s=85, color=BASE, marker="D", zorder=4, label="base")
    axes.scatter([], [], s=60, facecolor="white", edgecolor=GRAY, lw=1.6, label="as trained")
    axes.scatter([], [], s=70, color=GRAY, label="at the floor, or the largest scale tried")
    room = max(1 - lowest, 0.05)
    axes.set_xlim(lowest - 0.06 * room, 1 + 0.06 * room)
    axes.set_ylim(-0.04, 1.07)
    axes.set(
        xlabel=f"kept: retain {named(metric)}, share of the base's", ylabel=f"forgotten: 1 - forget {named(metric)}"
    )
    axes.set_title("Up is forgetting, right is keeping", loc="left", fontsize=11.5)
    plain_axes(axes)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=9)
    return png(drawn)


def matrix(found: Mapping[str, Any]) -> bytes:
    """Interference: what is left of every forget set and of the retain set under each adapter alone and under all of them."""
    rows, columns = list(found["subjects"]), list(found["sets"])
    values = [[found["subjects"][r][c]["value"] for c in columns] for r in rows]
    drawn = figure(2.6 + 1.5 * len(columns), 1.5 + 0.52 * len(rows))
    axes = drawn.subplots()
    shown = [[float("nan") if v is None else v for v in row] for row in values]
    image = axes.imshow(shown, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            text = "–" if v is None else f"{v:.3f}"
            axes.text(
                j, i, text, ha="center", va="center", color="white" if (v or 0) > 0.55 else "#222222", fontsize=10
            )
    axes.set_xticks(range(len(columns)), [found["sets"][c]["label"] for c in columns], fontsize=9)
    axes.set_yticks(range(len(rows)), [found["labels"][r] for r in rows], fontsize=9.5)
    axes.axvline(len(columns) - 1.5, color="white", lw=4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"What is left: {named(found['metric'])}", loc="left", fontsize=11)
    bar = drawn.colorbar(image, ax=axes, pad=0.02, aspect=14)
    bar.outline.set_visible(False)
    return png(drawn)


def attacks(bars: Sequence[Mapping[str, Any]], measure: str) -> bytes:
    """Recovery of each attack, on the adapter and, as control, on the retain-only model.

    bars: {"name", "adapter": (value, low, high) | None, "retain_only": the same}.
    """
    drawn = figure(8.6, 1.5 + 0.55 * len(bars))
    axes = drawn.subplots()
    for k, (side, color, label) in enumerate(
        (("adapter", FORGET, "adapter"), ("retain_only", RETAIN_MODEL, "the same attack on the retain-only model"))
    ):
        for i, bar in enumerate(bars):
            at = i + (k - 0.5) * 0.36
            if (found := bar.get(side)) is None:
                axes.text(0.01, at, "not measured", va="center", fontsize=8.5, color=GRAY)
                continue
            value, low, high = found
            axes.barh(at, value, height=0.33, color=color, zorder=3)
            if low is not None and high is not None:
                axes.plot([low, high], [at, at], color="#333333", lw=1.3, zorder=4)
            edge = max(value, high if high is not None else value, 0)
            axes.annotate(
                f"{value:.2f}", (edge, at), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
            )
        axes.barh([0], [0], color=color, label=label)
    axes.set_yticks(range(len(bars)), [b["name"] for b in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.axvline(0, color=GRAY, lw=1)
    axes.axvline(1, color=GRAY, lw=1, ls=":")
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.02), max(right * 1.04, 1.12))
    axes.set_xlabel(f"recovery of {named(measure)}: 0 nothing comes back, 1 all that the base knew")
    axes.set_title("Right is back", loc="left", fontsize=11.5)
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    return png(drawn)


def plane(points: Sequence[Mapping[str, Any]], utility: str, forget: str, others: Sequence[float] = ()) -> bytes:
    """Models in the plane of usefulness and forgetting: up is forgotten, right is kept.

    points: {"label", "kind": base | adapter | retain_only, "x", "y", "x95", "y95"}.   utility, forget: keys of the axes.
    others: usefulness of retain-only models of other seeds, drawn as ticks at the height of the one that is a point.
    """
    drawn = figure(8.6, 4.8)
    axes = drawn.subplots()
    looks = {"base": (BASE, "D"), "retain_only": (RETAIN_MODEL, "o")}
    k = 0
    for p in points:
        color, marker = looks.get(p["kind"], (COLORS[k % len(COLORS)], "o"))
        k += p["kind"] == "adapter"
        for along, axis in (("x95", "x"), ("y95", "y")):
            if p[along] is not None:
                low, high = p[along]
                span = ([low, high], [p["y"]] * 2) if axis == "x" else ([p["x"]] * 2, [low, high])
                axes.plot(*span, color=color, lw=1.4, zorder=3, solid_capstyle="butt")
        hollow = p["kind"] == "retain_only"
        axes.scatter(
            p["x"], p["y"], s=210 if hollow else 105, marker=marker, zorder=4 + hollow, label=p["label"][:30],
            facecolor="none" if hollow else color, edgecolor=color if hollow else "white", lw=2.2 if hollow else 1,
        )  # fmt: skip
    retain_model = next((p for p in points if p["kind"] == "retain_only"), None)
    if retain_model is not None and len(others):
        axes.plot(
            others,
            [retain_model["y"]] * len(others),
            "|",
            color=RETAIN_MODEL,
            ms=13,
            mew=1.8,
            zorder=3,
            label="usefulness of others,\nother seeds",
        )
    xs = [v for p in points for v in (p["x"], *(p["x95"] or ()))] + list(others)
    room = max(0.08, 0.15 * (max(xs) - min(xs)))  # never so near that a hair's breadth looks like a mile
    axes.set_xlim(max(-0.04, min(xs) - room), min(1.04, max(xs) + room))
    axes.set_ylim(-0.06, 1.08)
    axes.set(
        xlabel=f"usefulness: {named(utility).replace('/', ' ')}",
        ylabel=f"forgotten: 1 - {named(forget).replace('/', ' ')}",
    )
    axes.set_title("Up is forgetting, right is keeping", loc="left", fontsize=11.5)
    plain_axes(axes)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=9.5, labelspacing=0.9)
    return png(drawn)
