"""Putting foreign text into Markdown: what comes in as text stays text, whatever signs are in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_ACTIVE = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {c: f"\\{c}" for c in "\\`*_[]|~$"}  # $: formulas on the Hub
)
_JOINERS = "\u200c\u200d"  # invisible, and part of how some scripts are written


def one_line(text: object) -> str:
    """Printable characters only, white space and every kind of line break as single spaces."""
    flat = " ".join(str(text).split())
    return " ".join("".join(c for c in flat if c.isprintable() or c in _JOINERS).split())


def inline(text: object) -> str:
    """Text within a line or a table cell: no HTML, emphasis, link, code or column comes of it."""
    return one_line(text).translate(_ACTIVE)


def block(text: object) -> str:
    """Paragraphs (separated by blank lines) of plain text: no heading, list, rule or table comes of them either."""
    paragraphs = [inline(p) for p in re.split(r"\n\s*\n", str(text))]
    return "\n\n".join(_harmless_start(p) for p in paragraphs if p)


def _harmless_start(line: str) -> str:
    line = re.sub(r"^(\d+)([.)])(\s|$)", r"\1\\\2\3", line)
    return re.sub(r"^([#+=-])", r"\\\1", line)


def code(text: object, cell: bool = True) -> str:
    """A code span that holds exactly the line; `cell`: inside a table, where a bar would end the column even in code."""
    line = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    if not line.strip("` "):
        line = line or " "
    pad = " " if line[:1] in "` " or line[-1:] in "` " else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|') if cell else line}{pad}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; the cells are Markdown already."""
    return [_row(head), "|---" * len(head) + "|", *(_row(row) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |" if any(cells) else "| " * len(cells) + "|"
