"""A document as a list of parts, written as one HTML file that loads nothing, or as Markdown with its pictures beside it.

Every text is escaped: rows of a forget set may hold markup, and control characters.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from . import tables
from .tables import Table
from .text import plain, printable


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: "" plain, "lead" under the title, "verdict" what is to be read first, "note" small."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Lines:
    """Preformatted text."""

    text: str


@dataclass(frozen=True)
class Items:
    """Each a sentence."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Checks:
    """What was checked: (it holds, in words)."""

    found: Sequence[tuple[bool, str]]


@dataclass(frozen=True)
class Picture:
    """name: of its file beside a Markdown document."""

    png: bytes
    alt: str
    name: str
    caption: str = ""


Part = Heading | Text | Lines | Items | Checks | Table | Picture

HTML_MARK = '<meta name="generator" content="peft-unlearn">'  # how a page of ours is known on a disk
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #222; background: #fff;
max-width: 62rem; margin: 2rem auto 4rem; padding: 0 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .4rem; border-top: 1px solid #e4e4e0; }
img { width: 100%; height: auto; } 
code, pre { font: .86rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
pre { background: #f5f5f3; padding: .7rem .9rem; white-space: pre-wrap; }
td small { display: block; color: #777; font-size: .78em; line-height: 1.25; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; } td, th { padding: .25rem 1rem .25rem 0; text-align: right;
vertical-align: top; font-variant-numeric: tabular-nums; white-space: nowrap; } td:first-child, th:first-child { text-align: left; }
th { font-weight: 600; border-bottom: 1px solid #999; } tr.head td { font-weight: 600; padding-top: .9rem; border-bottom: 1px solid #ccc; }
table.words { table-layout: fixed; width: 100%; }
table.words td, table.words th { text-align: left; white-space: normal; padding-bottom: .6rem; overflow-wrap: break-word; }
table.words td { border-bottom: 1px solid #eee; } .words td:first-child { color: #666; }
.lead { color: #555; margin-top: 0; } .note { color: #666; font-size: .9rem; }
.verdict { background: #f4f7f4; border-left: 4px solid #3c8d5a; padding: .8rem 1.1rem; }
.good { color: #2f7d4b; font-weight: 600; } .bad { color: #c8452d; font-weight: 600; }
@media (max-width: 40rem) { body { font-size: 15px; margin-top: 1rem; } h1 { font-size: 1.4rem; }
  .picture { overflow-x: auto; } .picture img { min-width: 34rem; }
  table.words thead { display: none; } table.words, table.words tbody, table.words tr, table.words td { display: block; }
  td, th { padding-right: .7rem; } table { font-size: .85rem; }
  table.words tr { border-bottom: 1px solid #ccc; padding: .5rem 0; } table.words td { border: 0; padding: 0 0 .25rem; }
  table.words td:not([data-of=""])::before { content: attr(data-of) ": "; color: #888; } .words td:first-child { font-weight: 600; } }
"""


def to_html(title: str, parts: Sequence[Part], tab: str = "") -> str:
    """The document as one HTML file. tab: what stands in the browser's tab, default the title."""
    head = (
        f'<meta charset="utf-8">{HTML_MARK}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tab or title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(html(p) for p in parts)])
    return printable(f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n')


def html(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h2>{escape(part.text)}</h2>"
    if isinstance(part, Text):
        kind = f' class="{part.kind}"' if part.kind else ""
        return f"<p{kind}>{escape(part.text)}</p>"
    if isinstance(part, Lines):
        return f"<pre>{escape(part.text)}</pre>"
    if isinstance(part, Items):
        return "<ul>\n" + "\n".join(f"<li>{escape(t)}</li>" for t in part.texts) + "\n</ul>"
    if isinstance(part, Checks):
        marks = (
            f'<span class="{"good" if held else "bad"}">{yes_no(held)}</span>: {escape(t)}' for held, t in part.found
        )
        return "<ul>\n" + "\n".join(f"<li>{m}</li>" for m in marks) + "\n</ul>"
    if isinstance(part, Table):
        return tables.to_html(part)
    inside = base64.b64encode(part.png).decode("ascii")
    note = f'\n<p class="note">{escape(part.caption)}</p>' if part.caption else ""
    return f'<div class="picture"><img alt="{escape(part.alt)}" src="data:image/png;base64,{inside}"></div>{note}'


def yes_no(held: bool) -> str:
    return "yes" if held else "no"


def to_markdown(title: str, parts: Sequence[Part], prefix: str) -> tuple[str, dict[str, bytes]]:
    """(text, pictures by file name). prefix: what the pictures' names begin with."""
    out, pictures = [f"# {plain(title)}"], {}
    for part in parts:
        if isinstance(part, Heading):
            out.append(f"## {plain(part.text)}")
        elif isinstance(part, Text):
            out.append(f"**{plain(part.text)}**" if part.kind == "lead" else plain(part.text))
        elif isinstance(part, Lines):
            fence = "`" * (max([2, *(len(m) for m in re.findall("`+", part.text))]) + 1)
            out.append(f"{fence}\n{part.text}\n{fence}")
        elif isinstance(part, Items):
            out.append("\n".join(f"- {plain(t)}" for t in part.texts))
        elif isinstance(part, Checks):
            out.append("\n".join(f"- {yes_no(held)}: {plain(t)}" for held, t in part.found))
        elif isinstance(part, Table):
            out.append(tables.to_markdown(part))
        else:
            name = f"{prefix}-{part.name}.png"
            pictures[name] = part.png
            out.append(f"![{plain(part.alt)}]({name})" + (f"\n\n{plain(part.caption)}" if part.caption else ""))
    return printable("\n\n".join(out)) + "\n", pictures
