"""What data of one's own will probably do to a run, said before it starts: three things that no loss can mend (docs/your-model.md)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .bundle import ForgetRetain
from .facts import accepted, words
from .formats import layout_of, target_of

FEWEST = 5
"""Rows under which nothing can be said."""
ALIKE = 0.5
"""Share of a question's words that a neighbor's question has too."""


def advice(data: ForgetRetain) -> list[str]:
    """Remarks on question-and-answer data, most telling first; none on embedded data, texts and conversations."""
    rows = _asked(data.forget)
    if len(rows) < FEWEST or any(str(ref).startswith("embedded:") for ref in data.refs.values()):
        return []
    found = [
        _one_form(rows) if data.target != "value" else None,
        _one_wording(rows),
        _no_neighbor(rows, _asked(data.retain or [])),
    ]
    return [text for text in found if text]


def _asked(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ask something, whatever their fields are called, as question and answer."""
    known = [r for r in rows if layout_of(r) in ("question/answer", "prompt/completion", "prompt/response")]
    return [{**r, "question": str(r.get("question", r.get("prompt"))), "answer": str(target_of(r))} for r in known]


def _one_form(rows: Sequence[Mapping[str, Any]]) -> str | None:
    heads = Counter(" ".join(words(r["answer"]).split()[:2]) for r in rows)
    head, n = heads.most_common(1)[0]
    if not head or n < 0.9 * len(rows):
        return None
    return (
        f"{n} of {len(rows)} forget answers begin with {head!r}: a loss on whole answers teaches the model to avoid that sentence, and the "
        "value comes back in another; give the rows a 'value' and set data.target: value"
    )


def _one_wording(rows: Sequence[Mapping[str, Any]]) -> str | None:
    asked: dict[str, set[str]] = defaultdict(set)
    for r in rows:
        key = r.get("fact") or " ".join(accepted(r))
        if key:
            asked[words(str(key))].add(words(r["question"]))
    if not asked or any(len(q) > 1 for q in asked.values()):
        return None
    return (
        f"each of the {len(asked)} facts is asked in one wording only: others, and the question turned round, will still be answered; "
        "`peft-unlearn augment` writes more"
    )


def _no_neighbor(rows: Sequence[Mapping[str, Any]], retain: Sequence[Mapping[str, Any]]) -> str | None:
    kept = [set(words(r["question"]).split()) for r in retain]
    near = 0
    for r in rows:
        mine = set(words(r["question"]).split())
        near += any(len(mine & other) >= ALIKE * len(mine) for other in kept if mine)
    if near:
        return None
    return (
        "no retain question is like a forget question: the whole relation may be forgotten with it; add the same questions about others "
        "(`peft-unlearn augment` finds some)"
    )
