"""Numbers, names and reasons as a reader sees them; the same in every table, sentence and picture."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

DASH = "–"
SUBJECTS = {"base": "base", "adapter": "with adapter", "retain_only": "retain model"}


_STEERING = (
    re.compile(  # control, bidi and other invisible format characters, halves of surrogates; not the joiners of scripts
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
        "\ud800-\udfff\U000e0000-\U000e007f]"
    )
)
_BREAKS = str.maketrans({"\n": "\\n", "\t": "\\t"})


def printable(text: str, breaks: bool = True) -> str:
    """Text for a terminal, a page or a document: what steers a terminal, turns the direction of a line or hides is written out
    (``\\x1b``). Whatever was written by others passes here before it is shown. breaks: line breaks and tabs stay."""
    out = _STEERING.sub(lambda c: c[0].encode("unicode_escape").decode(), text)
    return out if breaks else out.translate(_BREAKS)


def json_text(value: Any) -> str:
    """JSON as commands print and store it. Raises `ValueError` for a number that JSON does not have, a defect."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    return _STEERING.sub(lambda c: json.dumps(c[0])[1:-1], text)  # such characters stand in strings alone


def named(key: str) -> str:
    """``retain/extraction_strength`` -> ``retain extraction strength``."""
    return key.replace("/", " ").replace("_", " ")


def heading(subject: str) -> str:
    """The heading of a subject's column: ``adapter:mine`` -> ``mine``."""
    return SUBJECTS.get(subject) or subject.removeprefix("adapter:")


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


def size(n_bytes: int) -> str:
    """Bytes for people: 1.3 MB."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def plain(text: str) -> str:
    """Text as Markdown shows it, whatever it holds: no markup, no table column, no line break of its own."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([\\`*\[\]|#~])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # between letters it is no markup
    text = re.sub(r"^([-+])(?=\s)", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", text)  # no list either


def reasons(found: Iterable[tuple[str, str]]) -> list[str]:
    """Why there are dashes, each reason once. found: (what has no number, why), see `absent`."""
    out: dict[str, dict[str, None]] = {}
    for what, why in found:
        out.setdefault(why, {})[what] = None
    return [
        f"{DASH} {', '.join([*who][:3])}{f' and {len(who) - 3} more' if len(who) > 3 else ''}: {why}"
        for why, who in out.items()
    ]


def absent(
    report: Mapping[str, Any], names: Mapping[str, str] | None = None, keys: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(what has no number, why) of an evaluation. names: subject -> what it is called.   keys: only these numbers."""
    for subject, values in (report.get("subjects") or {}).items():
        details = (report.get("details") or {}).get(subject) or {}
        name = (names or {}).get(subject) or heading(subject)
        if not values:
            yield name, details.get("reason") or "this model was not given"
        for key in (k for k, v in (values or {}).items() if v is None and (keys is None or k in keys)):
            why = details.get(key)
            yield f"{name} {named(key)}", (isinstance(why, Mapping) and why.get("reason")) or "no reason is given"
