"""The demo's report: one picture and one HTML file that needs nothing beside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..reporting import tables as table


def picture(
    curve: Sequence[Mapping[str, float]],
    base: Mapping[str, float],
    retain_model: Mapping[str, float],
    adapter: Mapping[str, float] | None = None,
    labels: tuple[str, str] = ("forget set (10 people)", "retain set (90 people)"),
) -> bytes:
    """PNG of forgetting against retaining: over the steps on the left, as a path in the plane on the right.

    Args:
        curve: one mapping per evaluation: step, forget, retain (value accuracies), in order of steps; `kept` marks the one that
            was saved. base, twin, adapter: forget and retain of the base (step 0), of the retain-only twin, and of the finished
            adapter on all rows (default: the curve's own last point). labels: of the two lines.
    """
    from matplotlib.figure import Figure  # the object, not pyplot: no backend is chosen and none is changed
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from ..reporting.pictures import BASE, FORGET, RETAIN, RETAIN_MODEL, plain_axes, png

    steps = [0, *(c["step"] for c in curve)]
    forget = [base["forget"], *(c["forget"] for c in curve)]
    retain = [base["retain"], *(c["retain"] for c in curve)]
    kept = next((c for c in curve if c.get("kept")), None)
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    left.plot(steps, retain, color=RETAIN, marker="s", ms=4, lw=2, label=labels[1])
    left.plot(steps, forget, color=FORGET, marker="o", ms=4, lw=2, label=labels[0])
    left.axhline(retain_model["retain"], color=RETAIN, ls=":", lw=1.2)
    left.axhline(retain_model["forget"], color=FORGET, ls=":", lw=1.2)
    left.plot([], [], color=BASE, ls=":", lw=1.2, label="retain-only twin, same colors")
    if kept:
        left.axvline(kept["step"], color="#bbbbbb", lw=1, zorder=0)
        left.annotate(
            "saved", (kept["step"], 0.2), xytext=(-4, 0), textcoords="offset points", ha="right", color="#666666"
        )
    left.set(xlabel="step", ylabel="answers that name the right value", ylim=(-0.04, 1.08))
    left.set_title("Forgetting and retaining over the steps", loc="left", fontsize=11)
    left.legend(loc="center right", bbox_to_anchor=(0.94, 0.55), frameon=False, fontsize=9)

    right.plot(forget, retain, color="#999999", lw=1.3, marker=".", ms=5, zorder=2)
    end = adapter or kept or {"forget": forget[-1], "retain": retain[-1]}
    for c in curve:  # the first steps, where the way is long, by their number
        if c["forget"] > 0.08 and c is not kept:
            right.annotate(
                f"step {c['step']}", (c["forget"], c["retain"]), xytext=(7, -11), textcoords="offset points",
                fontsize=8.5, color="#666666",
            )  # fmt: skip
    right.scatter(end["forget"], end["retain"], s=110, color=FORGET, zorder=4, label="with the adapter")
    right.scatter(base["forget"], base["retain"], s=110, color=BASE, marker="D", zorder=3, label="base (step 0)")
    right.scatter(
        retain_model["forget"], retain_model["retain"], s=190, facecolor="none", edgecolor=RETAIN_MODEL, lw=2.2, marker="o", zorder=5,
        label="retain-only twin",
    )  # fmt: skip
    low = max(0.0, min(0.9, *retain) - 0.02)
    right.set(xlabel="forget set: right answers", ylabel="retain set: right answers", xlim=(-0.06, 1.06))
    room = 1 - low  # a third of it beneath, for the legend
    right.set_ylim(low - 0.35 * room, 1 + 0.08 * room)
    right.set_yticks([t for t in MaxNLocator(6).tick_values(low, 1.0) if max(0.0, low - 0.1 * room) <= t <= 1.0])
    right.set_title("Where it goes: up is keeping, left is forgetting", loc="left", fontsize=11)
    right.legend(loc="lower center", frameon=False, fontsize=9, markerscale=0.75, labelspacing=0.7)
    for axes in (left, right):
        plain_axes(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return png(figure)


def numbers(report: table.Report) -> str:
    """The table of `table.show` as HTML."""
    from ..reporting import document

    n, rows = table.counts(report), []
    for k, (title, values) in enumerate(table.blocks(report)):
        rows.append([title])
        label = [f"{name} ({n[name]})" if k == 0 and name in n else name for name, _ in values]
        rows += [[text, *map(table.number, row)] for text, (_, row) in zip(label, values, strict=True)]
    drawn = document.html(document.Table(["set (rows)", *table.subjects(report).values()], rows))
    return "\n".join([drawn, *(f'<p class="note">{table.DASH} {escape(why)}</p>' for why in table.reasons(report))])


def samples_table(samples: Sequence[Mapping[str, str]]) -> str:
    """Questions with answers before and after, as HTML; every text is escaped."""
    from ..reporting import document

    rows = [[s[k] for k in ("kind", "question", "before", "after")] for s in samples]
    return document.html(document.Table(["", "question", "base", "with adapter"], rows, words=True))


def verdict(ok: bool, text: str) -> str:
    return f'<li><span class="{"good" if ok else "bad"}">{"yes" if ok else "no"}</span>: {escape(text)}</li>'


LEAD = (
    "A small language model knows a hundred invented people. A forget adapter makes it lose ten of them and keep ninety; the base "
    "model's own weights never change."
)


@dataclass(frozen=True)
class Section:
    """A further part of the page: a heading, sentences, a picture with its caption, preformatted lines."""

    heading: str
    text: str = ""
    png: bytes | None = None
    caption: str = ""
    lines: str = ""

    def html(self) -> list[str]:
        from ..reporting.document import image

        return [
            f"<h2>{escape(self.heading)}</h2>",
            f"<p>{escape(self.text)}</p>" if self.text else "",
            image(self.png, self.heading, self.caption) if self.png else "",
            f"<pre>{escape(self.lines)}</pre>" if self.lines else "",
        ]


def page(
    report: table.Report,
    samples: Sequence[Mapping[str, str]],
    checks: Sequence[tuple[bool, str]],
    removal: str,
    recipe: str,
    conditions: Sequence[str],
    png: bytes,
    caption: str = "",
    *,
    title: str = "Forgetting ten people",
    lead: str = LEAD,
    more: Sequence[Section] = (),
) -> str:
    """The whole report as one HTML document that loads nothing.

    checks: (held, what was checked). removal: the proof's own words. recipe: YAML. conditions: sentences on what the
    numbers mean and what they do not. more: sections between the picture and what the model says.
    """
    from ..reporting import document

    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        document.image(png, "Right answers on the forget and on the retain set over the steps", caption),
        *(line for section in more for line in section.html()),
        "<h2>What it says now</h2>",
        samples_table(samples),
        "<h2>Numbers</h2>",
        numbers(report),
        "<h2>What was checked</h2>",
        "<ul>",
        *(verdict(ok, text) for ok, text in checks),
        "</ul>",
        "<h2>Taken off again</h2>",
        f"<pre>{escape(removal)}</pre>",
        "<h2>What these numbers mean</h2>",
        *(f"<p>{escape(c)}</p>" for c in conditions),
        "<h2>The recipe</h2>",
        f"<pre>{escape(recipe)}</pre>",
    ]
    return document.page(title, body, tab="peft-unlearn demo")


def write(path: Path, html: str) -> None:
    """Write the page whole: a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(html, encoding="utf-8")
    part.replace(path)
