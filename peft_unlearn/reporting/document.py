"""A document as a list of parts, written as one HTML file that loads nothing, or as Markdown with its pictures beside it.

Every text is escaped: rows of a forget set may hold markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

DASH = "–"


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
class Table:
    """head: one text per column.   rows: (texts, one per column); a row of one text is a heading within the table.
    words: columns hold sentences, not numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """name: of its file beside a Markdown document."""

    png: bytes
    alt: str
    name: str
    caption: str = ""


Part = Heading | Text | Lines | Items | Table | Picture

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
table.said { table-layout: fixed; width: 100%; }
table.said td, table.said th { text-align: left; white-space: normal; padding-bottom: .6rem; overflow-wrap: break-word; }
table.said td { border-bottom: 1px solid #eee; } .said td:first-child { color: #666; }
.lead { color: #555; margin-top: 0; } .note { color: #666; font-size: .9rem; }
.verdict { background: #f4f7f4; border-left: 4px solid #3c8d5a; padding: .8rem 1.1rem; }
.good { color: #2f7d4b; font-weight: 600; } .bad { color: #c8452d; font-weight: 600; }
@media (max-width: 40rem) { body { font-size: 15px; margin-top: 1rem; } h1 { font-size: 1.4rem; }
  .picture { overflow-x: auto; } .picture img { min-width: 34rem; }
  table.said thead { display: none; } table.said, table.said tbody, table.said tr, table.said td { display: block; }
  td, th { padding-right: .7rem; } table { font-size: .85rem; }
  table.said tr { border-bottom: 1px solid #ccc; padding: .5rem 0; } table.said td { border: 0; padding: 0 0 .25rem; }
  table.said td:not([data-of=""])::before { content: attr(data-of) ": "; color: #888; } .said td:first-child { font-weight: 600; } }
"""


def image(png: bytes, alt: str, caption: str = "") -> str:
    """A picture inside the page itself."""
    inside = base64.b64encode(png).decode("ascii")
    note = f'\n<p class="note">{escape(caption)}</p>' if caption else ""
    return f'<div class="picture"><img alt="{escape(alt)}" src="data:image/png;base64,{inside}"></div>{note}'


def page(title: str, body: Sequence[str], tab: str = "") -> str:
    """A whole HTML document. title: the text in the browser's tab is `tab` or this; body: HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(tab or title)}</title><style>{STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body>\n</html>\n"
    )


def to_html(title: str, parts: Sequence[Part], tab: str = "") -> str:
    """The document as one HTML file."""
    return page(title, [f"<h1>{escape(title)}</h1>", *(html(p) for p in parts)], tab)


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
    if isinstance(part, Picture):
        return image(part.png, part.alt, part.caption)
    head = "".join(f"<th>{escape(h)}</th>" for h in part.head)
    lines = [f'<div class="scroll"><table{_SAID if part.words else ""}>', f"<thead><tr>{head}</tr></thead><tbody>"]
    for row in part.rows:
        if len(row) == 1 < len(part.head):
            lines.append(f'<tr class="head"><td colspan="{len(part.head)}">{escape(row[0])}</td></tr>')
            continue
        cells = zip(part.head, row, strict=True)
        lines.append("<tr>" + "".join(f"<td{_label(h, part.words)}>{_cell(c)}</td>" for h, c in cells) + "</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell(text: str) -> str:
    """A number's interval goes beneath it, small."""
    found = re.fullmatch(r"(\S+) (\[[^\[\]]*\])", text)
    return escape(text) if found is None else f"{escape(found[1])} <small>{escape(found[2])}</small>"


_SAID = ' class="said"'


def _label(head: str, words: bool) -> str:
    return f' data-of="{escape(head)}"' if words else ""


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
        elif isinstance(part, Picture):
            name = f"{prefix}-{part.name}.png"
            pictures[name] = part.png
            out.append(f"![{plain(part.alt)}]({name})" + (f"\n\n{plain(part.caption)}" if part.caption else ""))
        else:
            out.append(_grid(part))
    return "\n\n".join(out) + "\n", pictures


def _grid(table: Table) -> str:
    width = len(table.head)
    lines = [_row(table.head), "|" + "|".join(["---", *(["---" if table.words else "---:"] * (width - 1))]) + "|"]
    for row in table.rows:
        one = len(row) == 1 < width
        lines.append(_row([f"**{plain(row[0])}**", *[""] * (width - 1)], ready=True) if one else _row(row))
    return "\n".join(lines)


def _row(cells: Sequence[str], ready: bool = False) -> str:
    return "| " + " | ".join(c if ready else plain(c) for c in cells) + " |"


def plain(text: str) -> str:
    """Text as Markdown shows it, whatever it holds: no markup, no table column, no line break of its own."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    text = re.sub(r"^([-+])(?=\s)", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", text)  # no list either


def number(value: float | None) -> str:
    """A share with three digits, a small p with its exponent, a dash for what has no number."""
    if value is None:
        return DASH
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"


def interval(ci95: Sequence[float] | None) -> str:
    """`` [low, high]``, or nothing."""
    return "" if ci95 is None else f" [{number(ci95[0])}, {number(ci95[1])}]"


def percent(value: float) -> str:
    """A share for a sentence: 97 %, 1.5 %, 0 %."""
    text = f"{100 * value:.0f}" if abs(value) >= 0.0995 else f"{100 * value:.1f}".removesuffix(".0")
    return f"{'0' if text == '-0' else text} %"
