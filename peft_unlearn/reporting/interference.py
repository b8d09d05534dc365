"""Interference for readers: the matrix of what is left, as a table, a picture and a document. Everything takes its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figure as kit
from .document import Heading, Lines, Part, Picture, Text
from .tables import Table, to_text
from .text import interval, named, number

LEGEND = (
    "In brackets: 95 % bootstrap intervals over rows. A forget set that is forgotten is low, the lower the less of an answer "
    "follows by itself; the retain set should stay as the base has it."
)
NOTEWORTHY, SAME = 0.05, 0.01  # a difference of that much is named; one of that little is none
TOGETHER = "together"
Found = Mapping[str, Any]


def text(found: Found) -> str:
    return f"{to_text(table(found, intervals=False))}\n\n{sentences(found)}"


def table(found: Found, metric: str | None = None, intervals: bool = True) -> Table:
    rows = [
        [found["labels"][s], *(number(c["value"]) + (interval(c["ci95"]) if intervals else "") for c in cells)]
        for s, sets in found["details"].items()
        if (cells := [by[metric or found["metric"]] for by in sets.values()])
    ]
    return Table(["", *(about["label"].replace("\n", " ") for about in found["sets"].values())], rows)


def sentences(found: Found) -> str:
    scales = ", ".join(f"{name} at scale {value:g}" for name, value in found["scales"].items())
    return f"What is left, by {named(found['metric'])} ({scales}). {' '.join(found['notes']) or 'Nothing stands out.'}"


def notes(
    own: Mapping[str, Mapping[str, float | None]], cost: Mapping[str, float | None],
    taken: Mapping[tuple[str, str], float | None], same: Sequence[tuple[str, str]],
) -> list[str]:  # fmt: skip
    """What stands out. own, cost: as in the JSON.   taken: (adapter, whose set) -> what it alone takes from that set.
    same: pairs that forget the same set."""
    out = [f"{a} and {b} forget the same set." for a, b in same]
    for name, left in own.items():
        if left["difference"] is not None and left["difference"] > NOTEWORTHY:
            both = f"{left['alone']:.3f} alone, {left['together']:.3f} together"
            out.append(f"{name} forgets less of its own set beside the others: {both}.")
    for (other, name), loss in taken.items():
        shared = other == name or (other, name) in same or (name, other) in same
        if not shared and loss is not None and loss > NOTEWORTHY:
            out.append(f"{other} alone takes {loss:.3f} from the set of {name} too.")
    alone = [v for s, v in cost.items() if s != TOGETHER and v is not None]
    whole = cost[TOGETHER]
    if whole is not None and alone:
        gap = whole - sum(alone)
        more = "more than" if gap > SAME else "less than" if gap < -SAME else "about"
        added = f"{more} their single costs added up ({sum(alone):.3f})"
        out.append(f"Together they cost {whole:.3f} on the retain set, {added}.")
    return out


def parts(found: Found) -> list[Part]:
    """The result as a document."""
    out: list[Part] = [
        Text(sentences(found), "verdict"), Picture(matrix(found), "What is left of each set under each adapter", "matrix"),
        Heading("Numbers"), table(found), Text(LEGEND, "note"),
    ]  # fmt: skip
    for metric in next(iter(next(iter(found["details"].values())).values())):
        if metric != found["metric"]:
            out += [Text(f"The same by {named(metric)}:"), table(found, metric, intervals=False)]
    about = [
        f"base: {found['base']}",
        *(
            f"{name}: {sha}, forget set sha256 {found['forget_sets'][name]}"
            for name, sha in found["adapter_ids"].items()
        ),
        f"versions: {', '.join(f'{k} {v}' for k, v in found['versions'].items())}",
    ]
    return [*out, Heading("What was judged"), Lines("\n".join(about))]


def matrix(found: Found) -> bytes:
    """What is left of every forget set and of the retain set under each adapter alone and under all of them."""
    rows, columns = list(found["subjects"]), list(found["sets"])
    values = [[found["subjects"][r][c]["value"] for c in columns] for r in rows]
    drawn = kit.figure(2.6 + 1.5 * len(columns), 1.5 + 0.52 * len(rows))
    axes = drawn.subplots()
    shown = [[float("nan") if v is None else v for v in row] for row in values]
    image = axes.imshow(shown, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for i, row in enumerate(values):
        for j, v in enumerate(row):
            color = "white" if (v or 0) > 0.55 else "#222222"
            axes.text(j, i, "–" if v is None else f"{v:.3f}", ha="center", va="center", color=color, fontsize=10)
    kit.numbered(axes, [found["sets"][c]["label"] for c in columns], [found["labels"][r] for r in rows])
    axes.axvline(len(columns) - 1.5, color="white", lw=4)
    kit.title(axes, f"What is left: {named(found['metric'])}", 11)
    kit.colorbar(drawn, image, axes, pad=0.02, aspect=14)
    return kit.png(drawn)
