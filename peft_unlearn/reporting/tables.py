"""One description of a table, written as text, Markdown or HTML; and the tables of evaluations and methods.

The README's table is made from a committed report by `report_markdown`. Nothing here imports torch.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

from ..registry import title
from .text import absent, heading, interval, number, plain, reasons


@dataclass(frozen=True)
class Table:
    """head: one text per column.   rows: (texts, one per column); a row of one text is a heading within the table.
    words: columns hold sentences, not numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


# -- three ways to write it -------------------------------------------------------------------------------------------


def to_text(table: Table, width: int | None = None) -> str:
    """Columns beside each other: numbers to the right, sentences wrapped so that a line fits into `width` (the terminal's)."""
    lines = [r for r in (table.head, *table.rows) if len(r) > 1]
    wide = [max(len(line) for c in column for line in c.split("\n")) for column in zip(*lines, strict=True)]
    room = (width or shutil.get_terminal_size((110, 24)).columns) - 2 * (len(wide) - 1)
    while table.words and sum(wide) > room and max(wide) > 8:
        wide[wide.index(max(wide))] -= 1
    out = []
    for row in (table.head, *table.rows):
        if len(row) == 1 < len(wide):
            out.append(f"-- {row[0]}")
            continue
        cells = [
            [part for line in c.split("\n") for part in textwrap.wrap(line, w) or [""]] if table.words else [c]
            for c, w in zip(row, wide, strict=True)
        ]
        for parts in zip_longest(*cells, fillvalue=""):
            left = (p.ljust(w) if k == 0 or table.words else p.rjust(w) for k, (p, w) in enumerate(zip(parts, wide)))  # noqa: B905
            out.append("  ".join(left).rstrip())
    return "\n".join(out)


def to_markdown(table: Table) -> str:
    width = len(table.head)
    lines = [_row(map(plain, table.head)), f"|---{'|---' * (width - 1) if table.words else '|---:' * (width - 1)}|"]
    for row in table.rows:
        within = len(row) == 1 < width
        lines.append(_row([f"**{plain(row[0])}**", *[""] * (width - 1)] if within else map(plain, row)))
    return "\n".join(lines)


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def to_html(table: Table) -> str:
    """Every text is escaped. A number's interval goes beneath it, small."""
    head = "".join(f"<th>{escape(h)}</th>" for h in table.head)
    kind = ' class="words"' if table.words else ""
    lines = [f'<div class="scroll"><table{kind}>', f"<thead><tr>{head}</tr></thead><tbody>"]
    for row in table.rows:
        if len(row) == 1 < len(table.head):
            lines.append(f'<tr class="head"><td colspan="{len(table.head)}">{escape(row[0])}</td></tr>')
            continue
        of = [f' data-of="{escape(h)}"' if table.words else "" for h in table.head]
        lines.append("<tr>" + "".join(f"<td{o}>{_cell(c)}</td>" for o, c in zip(of, row, strict=True)) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(text: str) -> str:
    found = re.fullmatch(r"(\S+) (\[[^\[\]]*\])", text)
    return escape(text) if found is None else f"{escape(found[1])} <small>{escape(found[2])}</small>"


# -- evaluations ------------------------------------------------------------------------------------------------------

# a block of rows each
METRICS = ("value_accuracy", "accuracy", "extraction_strength", "mia_efficacy", "probability", "rouge_l_recall")
WHOLE = ("forget/truth_ratio", "forget/ks_distance", "forget/forget_quality", "model_utility")
Column = tuple[str, Mapping[str, Any], str]  # heading, evaluation, subject


def numbers(columns: Sequence[Column], metrics: Sequence[str] | None = None, intervals: bool = True) -> Table:
    """Evaluations side by side: a block of rows per metric, a row per set, a column per model.

    metrics: only these, and of the suite as a whole what `WHOLE` names; default all there are.
    """
    values = [e["subjects"].get(s) or {} for _, e, s in columns]
    details = [(e.get("details") or {}).get(s) or {} for _, e, s in columns]
    keys = list(dict.fromkeys(k for v in values for k in v))

    def cells(key: str) -> list[str]:
        shown = (_mapping(d.get(key)).get("ci95") if intervals else None for d in details)
        return [number(v.get(key)) + interval(ci) for v, ci in zip(values, shown, strict=True)]

    rows: list[list[str]] = []
    for metric in metrics or dict.fromkeys(k.rpartition("/")[2] for k in keys if "/" in k):
        block = []
        for key in (k for k in keys if k.endswith(f"/{metric}")):
            n = max((int(_mapping(d.get(key)).get("n") or 0) for d in details), default=0)
            if n or not any(key in d for d in details):  # a set without rows is among the reasons
                block.append([key.rpartition("/")[0] + (f" ({n})" if n else ""), *cells(key)])
        rows += [[title(metric)], *block] if block else []
    whole = [k for k in keys if "/" not in k] if metrics is None else [k for k in WHOLE if k in keys]
    rows += [["the suite as a whole"], *([_whole(k), *cells(k)] for k in whole)] if whole else []
    return Table(["set (rows)", *(name for name, _, _ in columns)], rows)


def _whole(key: str) -> str:
    name, _, metric = key.rpartition("/")
    return f"{title(metric)}, {name} set" if name else title(metric)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def of_report(report: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> Table:
    """An evaluation: base first, then adapters, then the retain model; those that were not given are left out."""
    found = [s for s, values in report["subjects"].items() if values]
    order = sorted(found, key=lambda s: (s != "base", s == "retain_only"))
    return numbers([(heading(s), report, s) for s in order], metrics, intervals=False)


def report_reasons(report: Mapping[str, Any]) -> list[str]:
    """Why `of_report` has dashes."""
    shown = {k for v in report["subjects"].values() for k in v or () if k in WHOLE or k.rpartition("/")[2] in METRICS}
    return reasons(absent(report, keys=shown))


def report_text(report: Mapping[str, Any]) -> str:
    """An evaluation as text: the table, and the reasons of its dashes beneath."""
    computed = f", computed in {report['dtype']}" if report.get("dtype") else ""
    return "\n".join(
        [f"suite {report['suite']}{computed}", "", to_text(of_report(report)), "", *report_reasons(report)]
    ).rstrip()


def report_markdown(report: Mapping[str, Any], metrics: Sequence[str] = METRICS) -> str:
    """The same for GitHub. metrics: only these blocks; the figures over the suite as a whole always stand last."""
    return (
        "\n".join([to_markdown(of_report(report, metrics)), *(f"\n{plain(w)}  " for w in report_reasons(report))])
        + "\n"
    )


# -- methods ----------------------------------------------------------------------------------------------------------


def methods_text(found: Sequence[Mapping[str, Any]]) -> str:
    """Methods (`registry.Method.to_dict`): a table per kind, hyper-parameters with their defaults."""
    out = []
    for kind in dict.fromkeys(m["kind"] for m in found):
        rows = []
        for m in (m for m in found if m["kind"] == kind):
            params = "\n".join(f"{k} = {p['default']}" for k, p in (m.get("params") or {}).items())
            source = m.get("source") or {}
            cited = f"{source.get('paper', '')} ({source.get('year', '')})\n{source.get('url', '')}" if source else ""
            rows.append([m["name"], m.get("summary") or "", params, cited])
        out.append(
            f"{kind}\n\n{to_text(Table(['name', 'what it does', 'hyper-parameters', 'source'], rows, words=True))}"
        )
    return "\n\n".join(out) or "There is no method of this kind yet."
