"""A comparison at equal retention for readers: table, sentences, picture and document. Everything takes its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figure as kit
from .document import Heading, Items, Lines, Part, Picture, Text
from .figure import BASE, COLORS, GRAY, RETAIN_MODEL
from .tables import Table, to_text
from .text import DASH, absent, interval, named, number, percent, reasons

LEVEL = " at the floor"  # ends a subject's name once it is at its scale
NAMES = {
    "forget/extraction_strength": "forget ES", "forget/value_accuracy": "forget right", "forget/probability": "forget prob.",
    "forget/forget_quality": "quality p", "forget/ks_distance": "KS D", "retain/extraction_strength": "retain ES",
    "retain/value_accuracy": "retain right", "model_utility": "utility",
}  # fmt: skip
CAPTION = "Each line is one adapter, from the base (scale 0) outward."
LEGEND = (
    "In brackets: 95 % bootstrap intervals over rows of the mean. ES: extraction strength. right: answers that name the right value. "
    "quality p, KS D: the forget set's truth ratios against the retain model's, which against itself has 1 and 0. utility: "
    "harmonic mean of the suite's parts."
)
Found = Mapping[str, Any]


def text(found: Found) -> str:
    dtype = found["report"].get("dtype")
    return f"{to_text(table(found, intervals=False))}\n\n{sentences(found)}" + (
        f"\ncomputed in {dtype}" if dtype else ""
    )


def order(found: Found) -> list[str]:
    """Names, best at equal retention first, then those that cannot hold the floor."""
    return [*found["ranking"], *found["cannot"]]


def table(found: Found, intervals: bool = True) -> Table:
    """Base and retain model, every adapter at the floor in order of rank, then every adapter as trained."""
    report, keys = found["report"], found["keys"]

    def line(label: str, scale: str, subject: str) -> list[str]:
        values, details = report["subjects"].get(subject), report["details"].get(subject, {})
        if not values:
            return [label, scale, *[DASH] * len(keys)]
        shown = ((details.get(k) or {}).get("ci95") if intervals else None for k in keys)
        return [label, scale, *(number(values.get(k)) + interval(ci) for k, ci in zip(keys, shown, strict=True))]

    scales = {name: f"{found['calibration'][name]['scale']:.3g}" for name in found["ranking"]}
    rows = [
        line("base", "0", "base"), line("retain model", DASH, "retain_only"),
        [f"at the floor: {percent(found['floor'])} of the base's retain {named(found['metric'])}"],
        *(line(f"{k}. {name}", scale, name + LEVEL) for k, (name, scale) in enumerate(scales.items(), 1)),
        *([f"{name}: {why}"] for name, why in found["cannot"].items()), ["as trained"],
        *(line(name, "1", name) for name in order(found)),
    ]  # fmt: skip
    return Table(["", "scale", *(NAMES.get(k) or named(k) for k in keys)], rows)


def sentences(found: Found) -> str:
    """The comparison in words, conditions first."""
    metric, n = named(found["metric"]), found["n"]
    out = [
        f"On {n['forget']} forget and {n['retain']} retain rows, each adapter at the scale at which it forgets most and keeps "
        f"{percent(found['floor'])} of the base's retain {metric} (scales up to {found['max_scale']:g} were tried):"
    ]
    if found["ranking"]:
        best = found["ranking"][0]
        value = found["calibration"][best]["chosen"]["forget"]
        left = number(value["value"]) + interval(value["ci95"])
        out.append(f"{best} leaves least of the forget set, {metric} {left}.")
        near = [n for n, gap in found["behind"].items() if gap["ci95"] and gap["ci95"][0] <= 0]
        apart = [
            f"{n} by {number(g['value'])}{interval(g['ci95'])}" for n, g in found["behind"].items() if n not in near
        ]
        out += [f"Not clearly apart from it, row by row: {', '.join(near)}."] if near else []
        out += [f"Behind it: {', '.join(apart)}."] if apart else []
    if found.get("retain_only"):
        level = number(found["retain_only"]["forget"]["value"])
        out.append(f"A model that never saw the forget set has {level}: less than that is no better.")
    return " ".join([*out, *(f"{name}: {why}." for name, why in found["cannot"].items())])


def parts(found: Found) -> list[Part]:
    """The comparison as a document."""
    report = found["report"]
    jumps = [
        f"{name}: the curves do not only fall, so the best of the grid's scales was taken."
        for name in order(found)
        if not found["calibration"][name]["monotone"]
    ]
    about = [
        f"base: {found['base']}", f"forget set: sha256 {found['data']['forget']}",
        *(f"{name}: {sha}" for name, sha in found["adapter_ids"].items()),
        f"versions: {', '.join(f'{k} {v}' for k, v in report['versions'].items())}",
    ]  # fmt: skip
    return [
        Text(sentences(found), "verdict"),
        Picture(frontier(found), "Forgetting against retaining, over the scale of each adapter", "frontier", CAPTION),
        Heading("Numbers"), table(found), Text(LEGEND, "note"),
        *(Items(some) for some in (jumps, reasons(absent(report))) if some), Heading("What was compared"),
        Lines("\n".join(about)),
    ]  # fmt: skip


# -- the picture ------------------------------------------------------------------------------------------------------


def frontier(found: Found) -> bytes:
    """Every adapter's way from the base (scale 0) in the plane of retaining and forgetting: up is forgotten, right is kept."""
    base, metric = found["base_levels"]["retain"]["value"], named(found["metric"])
    drawn = kit.figure(8.6, 5.4)
    axes = drawn.subplots()
    lowest = 1.0
    for name, color in zip(order(found), COLORS * 9, strict=False):
        lowest = min(lowest, _way(axes, name, found["calibration"][name], base, color))
    axes.axvline(found["floor"], color=GRAY, ls="--", lw=1.1, zorder=2)
    floor = f"floor {100 * found['floor']:g} %"
    kit.beside(axes, floor, (found["floor"], 0.02), (-4, 0), ha="right", color=GRAY, fontsize=9)
    if level := found.get("retain_only"):
        at = _place(level, base)
        look = {"facecolor": "none", "edgecolor": RETAIN_MODEL, "lw": 2.2, "zorder": 6}
        axes.scatter(*at, s=200, label="retain model", **look)
        lowest = min(lowest, at[0])
    axes.scatter(1, 0, s=85, color=BASE, marker="D", zorder=4, label="base")
    axes.scatter([], [], s=60, facecolor="white", edgecolor=GRAY, lw=1.6, label="as trained")
    axes.scatter([], [], s=70, color=GRAY, label="at the floor, or the largest scale tried")
    room = max(1 - lowest, 0.05)
    axes.set_xlim(lowest - 0.06 * room, 1 + 0.06 * room)
    axes.set_ylim(-0.04, 1.07)
    axes.set(xlabel=f"kept: retain {metric}, share of the base's", ylabel=f"forgotten: 1 - forget {metric}")
    kit.title(axes, "Up is forgetting, right is keeping")
    kit.plain_axes(axes)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=9)
    return kit.png(drawn)


def _place(point: Mapping[str, Any], base: float) -> tuple[float, float]:
    return point["retain"]["value"] / base, 1 - point["forget"]["value"]


def _way(axes: Any, name: str, block: Mapping[str, Any], base: float, color: str) -> float:
    """One adapter's line with its two marks; returns the lowest retention on it."""
    kept: Sequence[Any] = [p for p in block["curve"] if None not in (p["forget"]["value"], p["retain"]["value"])]
    if not kept:
        return 1.0
    x, y = zip(*(_place(p, base) for p in kept), strict=True)
    axes.plot(x, y, color=color, lw=1.8, marker=".", ms=5, zorder=3)
    trained = next((p for p in kept if p["scale"] == 1.0), kept[-1])
    axes.scatter(*_place(trained, base), s=75, facecolor="white", edgecolor=color, lw=1.8, zorder=4)
    label = name
    if chosen := block.get("chosen"):
        axes.scatter(*_place(chosen, base), s=95, color=color, edgecolor="white", lw=1.2, zorder=5)
        label = f"{name} (scale {chosen['scale']:.3g})"
    axes.plot([], [], color=color, lw=2, label=label)
    return min(x)
