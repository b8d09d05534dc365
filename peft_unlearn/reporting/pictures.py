"""Pictures of reports: what attacks bring back, models in the plane of usefulness and forgetting, a run over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figure as kit
from .figure import BASE, COLORS, DARK, FORGET, GRAY, RETAIN, RETAIN_MODEL
from .text import named


def attacks(bars: Sequence[Mapping[str, Any]], measure: str) -> bytes:
    """Recovery of each attack, on the adapter and on the retain model beside it.

    bars: {"name", "adapter": (value, low, high) | None, "retain_only": the same}.
    """
    drawn = kit.figure(8.6, 1.5 + 0.55 * len(bars))
    axes = drawn.subplots()
    for k, (side, color, label) in enumerate(
        (("adapter", FORGET, "adapter"), ("retain_only", RETAIN_MODEL, "the same attack on the retain model"))
    ):
        for i, bar in enumerate(bars):
            at = i + (k - 0.5) * 0.36
            if (found := bar.get(side)) is None:
                axes.text(0.01, at, "not measured", va="center", fontsize=8.5, color=GRAY)
                continue
            value, low, high = found
            axes.barh(at, value, height=0.33, color=color, zorder=3)
            if low is not None and high is not None:
                axes.plot([low, high], [at, at], color=DARK, lw=1.3, zorder=4)
            edge = max(value, high if high is not None else value, 0)
            kit.beside(axes, f"{value:.2f}", (edge, at), (5, 0), va="center", fontsize=9)
        axes.barh([0], [0], color=color, label=label)
    axes.set_yticks(range(len(bars)), [b["name"] for b in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.axvline(0, color=GRAY, lw=1)
    axes.axvline(1, color=GRAY, lw=1, ls=":")
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -0.02), max(right * 1.04, 1.12))
    axes.set_xlabel(f"recovery of {named(measure)}: 0 nothing comes back, 1 all that the base knew")
    kit.title(axes, "Right is back")
    kit.plain_axes(axes)
    axes.grid(visible=False, axis="y")
    kit.legend_below(drawn)
    return kit.png(drawn)


def plane(points: Sequence[Mapping[str, Any]], utility: str, forget: str, others: Sequence[float] = ()) -> bytes:
    """Models in the plane of usefulness and forgetting: up is forgotten, right is kept.

    points: {"label", "kind": base | adapter | retain_only, "x", "y", "x95", "y95"}.   utility, forget: keys of the axes.
    others: usefulness of retain models of other seeds, drawn as ticks at the height of the one that is a point.
    """
    drawn = kit.figure(8.6, 4.8)
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
        look = {"color": RETAIN_MODEL, "ms": 13, "mew": 1.8, "zorder": 3}
        axes.plot(others, [retain_model["y"]] * len(others), "|", label="usefulness of others,\nother seeds", **look)
    xs = [v for p in points for v in (p["x"], *(p["x95"] or ()))] + list(others)
    room = max(0.08, 0.15 * (max(xs) - min(xs)))  # never so near that a hair's breadth looks like a mile
    axes.set_xlim(max(-0.04, min(xs) - room), min(1.04, max(xs) + room))
    axes.set_ylim(-0.06, 1.08)
    axes.set(xlabel=f"usefulness: {named(utility)}", ylabel=f"forgotten: 1 - {named(forget)}")
    kit.title(axes, "Up is forgetting, right is keeping")
    kit.plain_axes(axes)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=9.5, labelspacing=0.9)
    return kit.png(drawn)


def story(
    curve: Sequence[Mapping[str, Any]],
    ends: Mapping[str, Mapping[str, float]],
    labels: tuple[str, str] = ("forget set (10 people)", "retain set (90 people)"),
) -> bytes:
    """Forgetting against retaining: over the steps on the left, as a path in the plane on the right.

    Args:
        curve: one mapping per evaluation: step, forget, retain (value accuracies), in order of steps; `kept` marks the saved one.
        ends: forget and retain on all rows of the "base" (step 0), the "retain_only" model and the finished "adapter" (default:
            the curve's own last point).
        labels: of the two lines.
    """
    from matplotlib.ticker import PercentFormatter

    kept = next((c for c in curve if c.get("kept")), None)
    path = [{"step": 0, **ends["base"]}, *curve]
    drawn = kit.figure(11, 4.4, dpi=130)
    left, right = drawn.subplots(1, 2, width_ratios=[1.45, 1])
    _over_steps(left, path, kept, ends["retain_only"], labels)
    _in_plane(right, path, kept, {"adapter": kept or path[-1], **ends})
    kit.plain_axes(left, right)
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return kit.png(drawn)


def _over_steps(
    axes: Any, path: Sequence[Mapping[str, Any]], kept: Any, level: Mapping[str, float], labels: tuple[str, str]
) -> None:
    steps = [p["step"] for p in path]
    for side, color, marker, label in (("retain", RETAIN, "s", labels[1]), ("forget", FORGET, "o", labels[0])):
        axes.plot(steps, [p[side] for p in path], color=color, marker=marker, ms=4, lw=2, label=label)
        axes.axhline(level[side], color=color, ls=":", lw=1.2)
    axes.plot([], [], color=BASE, ls=":", lw=1.2, label="retain model, same colors")
    if kept:
        axes.axvline(kept["step"], color=kit.FAINT, lw=1, zorder=0)
        kit.beside(axes, "saved", (kept["step"], 0.2), (-4, 0), ha="right", color=GRAY)
    axes.set(xlabel="step", ylabel="answers that name the right value", ylim=(-0.04, 1.08))
    kit.title(axes, "Forgetting and retaining over the steps", 11)
    axes.legend(loc="center right", bbox_to_anchor=(0.94, 0.55), frameon=False, fontsize=9)


def _in_plane(axes: Any, path: Sequence[Mapping[str, Any]], kept: Any, ends: Mapping[str, Mapping[str, float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.plot(
        *([p[s] for p in path] for s in ("forget", "retain")), color="#999999", lw=1.3, marker=".", ms=5, zorder=2
    )
    for p in path[1:]:  # the first steps, where the way is long, by their number
        if p["forget"] > 0.08 and p is not kept:
            kit.beside(axes, f"step {p['step']}", (p["forget"], p["retain"]), (7, -11), fontsize=8.5, color=GRAY)
    looks: dict[str, dict[str, Any]] = {
        "adapter": {"s": 110, "color": FORGET, "zorder": 4, "label": "with the adapter"},
        "base": {"s": 110, "color": BASE, "marker": "D", "zorder": 3, "label": "base (step 0)"},
        "retain_only": {"s": 190, "facecolor": "none", "edgecolor": RETAIN_MODEL, "lw": 2.2, "zorder": 5, "label": "retain model"},
    }  # fmt: skip
    for which, look in looks.items():
        axes.scatter(ends[which]["forget"], ends[which]["retain"], **look)
    low = max(0.0, min(0.9, *(p["retain"] for p in path)) - 0.02)
    axes.set(xlabel="forget set: right answers", ylabel="retain set: right answers", xlim=(-0.06, 1.06))
    room = 1 - low  # a third of it beneath, for the legend
    axes.set_ylim(low - 0.35 * room, 1 + 0.08 * room)
    axes.set_yticks([t for t in MaxNLocator(6).tick_values(low, 1.0) if max(0.0, low - 0.1 * room) <= t <= 1.0])
    kit.title(axes, "Where it goes: up is keeping, left is forgetting", 11)
    axes.legend(loc="lower center", frameon=False, fontsize=9, markerscale=0.75, labelspacing=0.7)


def trials(
    runs: Sequence[Sequence[Mapping[str, float]]],
    most: Mapping[str, float],
    least: Mapping[str, float],
    aims: Mapping[str, str],
) -> bytes:
    """What a search saw, look by look over all runs: what is still named above, what is kept below; dotted lines are the aims.

    runs: per run its looks, ``{"step": n, set: share}``.   most, least: forget and retain sets that have an aim.   aims: ``<= .10`` by set.
    """
    drawn = kit.figure(8.6, 5.6)
    above, below = drawn.subplots(2, 1, sharex=True)
    looks = [(run, look) for run, judged in enumerate(runs) for look in judged]
    at = list(range(1, len(looks) + 1))
    for axes, names, text in ((above, most, "still named"), (below, least, "kept")):
        for k, name in enumerate(n for n in names if any(n in look for _, look in looks)):
            color = COLORS[k % len(COLORS)]
            for run in range(len(runs)):
                seen = [look.get(name, float("nan")) if r == run else float("nan") for r, look in looks]
                label = None if run else f"{name} {aims.get(name, '')}"
                axes.plot(at, seen, marker="o", ms=4, lw=1.8, color=color, label=label)
            if name in aims:
                axes.axhline(float(aims[name].split()[1]), color=color, ls=":", lw=1.1)
        for x in (i + 0.5 for i in range(1, len(looks)) if looks[i][0] != looks[i - 1][0]):
            axes.axvline(x, color=GRAY, lw=1)
        axes.set(ylim=(-0.04, 1.06), ylabel=text)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    below.set_xticks(at, [str(look["step"]) for _, look in looks])
    below.set_xlabel("step of each look; a line begins a new run")
    kit.title(above, "What each look at the runs found")
    kit.plain_axes(above, below)
    return kit.png(drawn)
