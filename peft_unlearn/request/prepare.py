"""Rows made of a request: what the base knows of it in several wordings and both directions, what is kept beside it, what judges.

The lab behind the choices (what a real model of half a billion parameters needed) is described in docs/your-model.md.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.facts import (
    REVERSED,
    REVERSED_HELDOUT,
    TRAINED,
    Fact,
    accepted,
    find_subject,
    find_value,
    names_value,
    reversals,
    spans_of,
    wordings,
    words,
)
from ..data.formats import layout_of
from ..data.neutral import ASK, CODE, KEEP, KINDS
from ..errors import UserError
from ..folder.atomic import write_text
from .ask import Asker

Row = dict[str, Any]
NEIGHBORS = 48
"""How many other subjects of a relation are looked for; a third of them is for judging alone."""
FEWEST = 12
"""As many neighbors at least, and twice as many neutral prompts, however slow the base is."""
KNOWN = 0.5
"""Share of the first wordings in which the base has to name the value; under it the fact is not known, or not stable."""


@dataclass
class Request:
    """What a request came to.

    facts: what the base knows.   unknown: (question, what the base answered, why it is left out).   sets: name -> rows, see `prepare`.
    notes: what a user should know.
    """

    facts: list[Fact]
    unknown: list[tuple[str, str, str]]
    sets: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """One .jsonl a set, to be looked at and edited, and what was left out."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in self.sets.items():
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def as_questions(rows: Sequence[Row]) -> list[Row]:
    """Rows of a user's file as questions with what else they say; a conversation of one turn is a question too.

    Raises:
        UserError: rows that are no questions.
    """
    out = []
    for i, row in enumerate(rows):
        if layout_of(row) == "messages" and [m["role"] for m in row["messages"]] == ["user", "assistant"]:
            row = {**row, "question": row["messages"][0]["content"], "answer": row["messages"][1]["content"]}
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            raise UserError(
                f"forget set: row {i} is no question; `forget` works on questions with short answers. For texts and longer conversations "
                "write a recipe (docs/your-model.md) and use `train`"
            )
        out.append(row)
    return out


def known_facts(questions: Sequence[Row], ask: Asker, value: str | None = None) -> Request:
    """What of this the base knows, by its own answers: each question with the value found in its answer, or the reason it is left out.

    questions: rows with a ``question``; ``value`` and ``accepted``, ``answer``, ``fact`` where the user says them.
    value: of a single question.
    """
    asked = [q["question"].strip() for q in questions]
    brief = [wordings(q)["brief"] for q in asked]
    answers, short = ask(asked), ask(brief, 8)
    more = ask([wordings(q)["request"] for q in asked])
    found = Request([], [])
    for row, q, answer, little, other in zip(questions, asked, answers, short, more, strict=True):
        given = accepted(row) or ([value] if value else [])
        own = find_value(q, answer, little)
        values = given or ([own] if own else [])
        if not values:
            found.unknown.append(
                (q, answer, "no value was found in the answer; say which with --value, or 'value' in the file")
            )
            continue
        share = sum(names_value(a, values) for a in (answer, little, other)) / 3
        if not names_value(answer, values):
            why = f"the base does not name {values[0]!r}: it does not know this, or not in these words"
            found.unknown.append((q, answer, why))
        elif share <= KNOWN and not given:
            why = f"the base answers differently each time ({little!r}, {other!r}); say what to forget with --value"
            found.unknown.append((q, answer, why))
        else:
            start, end = spans_of(answer, values)[0]
            stated = str(row.get("fact") or row.get("subject") or "")
            subject = stated if stated and spans_of(q, [stated]) else find_subject(q, answer)
            names = dict.fromkeys([answer[start:end], *values])
            found.facts.append(Fact(q, answer, tuple(names), subject))
    return found


def prepare(
    questions: Sequence[Row],
    ask: Asker,
    *,
    value: str | None = None,
    kept: Sequence[Row] = (),
    seed: int = 0,
    seconds: float = math.inf,
) -> Request:
    """All sets of a request: forget, retain (neighbors), general to train on; wordings, reversed, neighbors_unseen, general_unseen and
    code to judge by; ``kept`` where the user gives a retain set.

    seconds: about how long asking may take: fewer neighbors and neutral prompts where the base is slow here.

    Raises:
        UserError: the base knows nothing of it, a question is asked that also stands in `kept`, or nothing was found to hold on to.
    """
    r = known_facts(questions, ask, value)
    if not r.facts:
        about = "\n".join(f"  {q}\n    answered: {a}\n    {why}" for q, a, why in r.unknown[:10])
        raise UserError(f"there is nothing to forget: of {len(questions)} question(s) this base knows none\n{about}")
    both = {words(f.question) for f in r.facts} & {words(str(k.get("question", ""))) for k in kept}
    if both:
        raise UserError(
            f"{len(both)} question(s) stand in the forget set and in the retain set ({', '.join(sorted(both)[:3])}); take them out of one"
        )
    rng = random.Random(seed)
    kind = _kind(r.facts, ask)
    _forget_rows(r, ask, kind)
    neighbors = ask.affordable(seconds / 2, 3 * FEWEST, 3 * NEIGHBORS) // 3  # each is asked in about three ways
    secret = [v for f in r.facts for v in (*f.value, *([f.subject] if f.subject else []))]
    _neighbor_rows(r, ask, kind, rng, neighbors)
    _general_rows(r, ask, secret, ask.affordable(seconds / 4, 2 * FEWEST, len(KEEP)))
    if kept:
        r.sets["kept"] = [dict(k) for k in kept]
    if not r.sets["retain"] and not kept:
        r.notes.append(
            "no neighbors were found (the same question about somebody or something else): give a retain set of like questions with "
            "--retain, or the whole relation may be forgotten"
        )
        del r.sets["retain"]
    elif len(r.sets["retain"]) < 8:
        r.notes.append(
            f"only {len(r.sets['retain'])} neighbor rows were found; a retain set of your own (--retain) helps"
        )
    r.sets = {name: rows for name, rows in r.sets.items() if rows}
    return r


def _row(fact: Fact, question: str, answer: str, values: Iterable[str], kind: str) -> Row:
    """A row whose answer ends with what it is there for."""
    values = list(values)
    spans = spans_of(answer, values)
    return {
        "question": question,
        "answer": answer[: spans[0][1]] if spans else answer,
        "value": values[0],
        "accepted": values,
        "fact": fact.id,
        "kind": kind,
    }


def _forget_rows(r: Request, ask: Asker, kind: str | None) -> None:
    """Wordings of every fact, and questions for the subject, where the base names what they ask for."""
    wanted: list[tuple[str, Fact, str, str, list[str]]] = []
    for fact in r.facts:
        for k, q in wordings(fact.question, fact.answer, fact.value).items():
            wanted.append(("forget" if k in TRAINED else "wordings", fact, k, q, list(fact.value)))
        for k, q in reversals(fact, kind).items():
            assert fact.subject is not None
            wanted.append(("reversed" if k in REVERSED_HELDOUT else "forget", fact, k, q, [fact.subject]))
    answers = ask([w[3] for w in wanted], what="other wordings")
    r.sets |= {"forget": [], "wordings": [], "reversed": []}
    for (name, fact, k, q, values), answer in zip(wanted, answers, strict=True):
        if names_value(answer, values) and not names_value(q, values):
            r.sets[name].append(_row(fact, q, answer, values, k))


def _listed(facts: Sequence[Fact]) -> tuple[str, list[str]] | None:
    """(the kind that comes with us on whose list at least half of the subjects stand, what else is on it)"""
    subjects = [f.subject for f in facts if f.subject]
    taken = {words(s) for s in subjects} | {words(v) for f in facts for v in f.value}
    kind, listed = max(KINDS.items(), key=lambda item: len(taken & set(map(words, item[1]))))
    own = [n for n in listed if words(n) not in taken]
    return (kind, own) if subjects and 2 * (len(listed) - len(own)) >= len(subjects) else None


def _kind(facts: Sequence[Fact], ask: Asker) -> str | None:
    """What the subjects are, in a word: "country", by our lists, else by the base; None where it does not say it twice of several."""
    if listed := _listed(facts):
        return listed[0]
    subjects = [f.subject for f in facts if f.subject][:5]
    answers = ask([f"What kind of thing is {s}? Answer with one word." for s in subjects], 6, "what the subjects are")
    found = [
        m[0].lower() for a in answers if (m := re.search(r"[A-Za-z]{3,}", a.removeprefix("A ").removeprefix("An ")))
    ]
    best = max(found, key=found.count, default=None)
    return best if best is None or len(subjects) == 1 or found.count(best) > 1 else None


_SEPARATOR = re.compile(r"[,;\n]|\d+[.)]|\s-\s|\band\b")


def _names(text: str) -> list[str]:
    """The names of a list that a model wrote: up to three words each, without numbering."""
    parts = (p.strip(" .:*-\"'`()") for p in _SEPARATOR.split(text.rpartition(":")[2] or text))
    return [p for p in parts if len(p) > 1 and p[0].isalnum() and len(p.split()) <= 3]


def neighbors_of(facts: Sequence[Fact], ask: Asker, kind: str | None, wanted: int = NEIGHBORS) -> list[str]:
    """Other subjects of the same kind: of a list that comes with us, where the subjects are on it, else as the base lists them; up to
    twice as many as wanted, since not all will do."""
    subjects = [f.subject for f in facts if f.subject]
    if not subjects:
        return []
    taken = {words(s) for s in subjects} | {words(v) for f in facts for v in f.value}
    if (listed := _listed(facts)) and len(listed[1]) >= FEWEST:
        return random.Random(0).sample(listed[1], min(len(listed[1]), 2 * wanted))
    like = ", ".join(subjects[:3])
    several = re.sub("ys$", "ies", f"{kind}s") if kind else f"things of the same kind as {like}"
    prompts = [
        f"List 30 {several}, separated by commas.",
        f"List 30 more {several} like {like}, separated by commas.",
        f"Name 30 things of the same kind as {like}, separated by commas.",
        f"List 30 less known {several}, separated by commas.",
        *(f"List 10 {several} that begin with the letter {letter}, separated by commas." for letter in "ACEIMNPSTUZ"),
    ]
    upper, out = subjects[0][:1].isupper(), {}
    for some in (prompts[:4], prompts[4:]):
        if len(out) < 1.5 * wanted:
            found = [n for text in ask(some, 96, "looking for neighbors") for n in _names(text)]
            out |= {words(n): n for n in found if words(n) and words(n) not in taken and n[:1].isupper() == upper}
    return list(out.values())[: 2 * wanted]


def _neighbor_rows(r: Request, ask: Asker, kind: str | None, rng: random.Random, wanted: int) -> None:
    """The same questions about others, answered by the base, right or wrong; part of the subjects is for judging alone."""
    facts = [f for f in r.facts if f.about("x")]
    forgotten = [v for f in r.facts for v in f.value]
    others = neighbors_of(facts, ask, kind, wanted)
    frames = list(dict.fromkeys(f.about("\0") for f in facts))[:4]
    pairs = [(n, frames[i % len(frames)]) for i, n in enumerate(others)] if frames else []
    asked = [str(frame).replace("\0", n) for n, frame in pairs]
    found: list[Fact] = []
    for (name, _), q, answer in zip(pairs, asked, ask(asked, what="neighbors"), strict=True):
        v = find_value(q, answer)
        if v and not names_value(answer, forgotten) and len(found) < wanted:
            found.append(Fact(q, answer, (v,), name))
    rng.shuffle(found)
    unseen = found[: len(found) // 3]
    back = any(row["kind"] in REVERSED for row in r.sets["forget"])
    r.sets["retain"] = _others(found[len(unseen) :], ask, ("asked", "request"), ("back_kind",) if back else (), kind)
    r.sets["neighbors_unseen"] = _others(unseen, ask, ("asked", "told"), (), kind)
    r.sets["retain"] = [row for row in r.sets["retain"] if not names_value(row["answer"], forgotten)]


def _others(
    facts: Sequence[Fact], ask: Asker, kinds: Sequence[str], back: Sequence[str], kind: str | None
) -> list[Row]:
    wanted = [(f, k, w[k]) for f in facts for w in [wordings(f.question, f.answer, f.value)] for k in kinds if k in w]
    wanted += [(f, k, b[k]) for f in facts for b in [reversals(f, kind)] for k in back if k in b]
    answers = ask([q for *_, q in wanted], what="neighbors")
    rows = []
    for (f, k, q), answer in zip(wanted, answers, strict=True):
        values = [f.subject] if k in REVERSED and f.subject else list(f.value)
        rows.append({**_row(f, q, answer, values, k), "answer": answer} if answer else None)
    return [row for row in rows if row is not None]


def _general_rows(r: Request, ask: Asker, secret: Sequence[str], wanted: int) -> None:
    """The model's own answers to neutral prompts; whatever comes near the request is left out."""
    mine = {words(f.question) for f in r.facts}

    def away(*texts: str) -> bool:
        return not any(names_value(t, secret) or words(t) in mine for t in texts)

    prompts = [KEEP[i * len(KEEP) // wanted] for i in range(wanted)]
    answers = ask(prompts, 12, "neutral prompts")
    r.sets["general"] = [
        {"question": q, "answer": a} for q, a in zip(prompts, answers, strict=True) if a and away(q, a)
    ]
    r.sets["general_unseen"] = [
        {"question": q, "answer": v[0], "value": v[0], "accepted": list(v)} for q, v in ASK.items() if away(q, *v)
    ]
    r.sets["code"] = [{"question": q, "answer": "def"} for q in CODE]
