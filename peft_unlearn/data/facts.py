"""Facts in questions and answers: the value that an answer names, the subject that it is about, and other wordings of both.

Everything here is text: what a model makes of a wording is asked elsewhere (`peft_unlearn.request`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# scripts written without spaces: each character is a word of its own, else a value inside a sentence has no boundaries
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
# words that no value and no subject is made of alone
_FUNCTION = frozenset(
    word
    for line in (
        "a an and answer are as at be been by called can could do does for from had has have how i in into is it its known me",
        "name named of on one or please sure tell that the their them there these this those to was were what when where which",
        "who whom whose why will with would yes you your",
    )
    for word in line.split()
)


def words(text: str) -> str:
    """Lower-cased words joined and surrounded by single spaces, so that containment respects word boundaries."""
    found = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return f" {' '.join(found)} " if found else ""


def accepted(row: Mapping[str, Any]) -> list[str]:
    """All names of a row's value that count: its fields ``value`` and ``accepted``."""
    return list(dict.fromkeys([*([str(row["value"])] if row.get("value") else []), *row.get("accepted", ())]))


def names_value(text: str, values: Iterable[str]) -> bool:
    """Whether one of the accepted values stands in the text, at word boundaries."""
    there = words(text)
    return any(wanted in there for v in values if (wanted := words(v)))


def spans_of(text: str, values: Iterable[str]) -> list[tuple[int, int]]:
    """Character ranges (start, end) of the accepted values in a text, at word boundaries, in any case; longest values first."""
    out: list[tuple[int, int]] = []
    for wanted in sorted(filter(str.strip, values), key=len, reverse=True):
        pattern = r"\s+".join(map(re.escape, wanted.split()))
        before = "" if re.match(f"[{_UNSPACED}]", wanted) else r"(?<!\w)"
        after = "" if re.search(f"[{_UNSPACED}]$", wanted) else r"(?!\w)"
        for m in re.finditer(before + pattern + after, text, re.IGNORECASE):
            if not any(m.start() < e and m.end() > s for s, e in out):
                out.append(m.span())
    return sorted(out)


def _runs(text: str, without: str) -> list[str]:
    """Longest stretches of words of a text that are neither words of `without` nor function words."""
    known, out, start, end = set(words(without).split()), [], None, 0
    for m in re.finditer(r"\w+(?:[.'’-]\w+)*", text):
        content = not set(words(m[0]).split()) & (known | _FUNCTION)
        gap = text[end : m.start()]
        if start is not None and (not content or gap.strip()):
            out.append(text[start:end])
            start = None
        if content and start is None:
            start = m.start()
        end = m.end()
    return [*out, text[start:end]] if start is not None else out


def find_value(question: str, answer: str, short: str = "") -> str | None:
    """The part of an answer that answers, as it stands there; None where nothing new is said.

    short: what the model answers when it is asked for that part alone; taken where it stands in the answer. Else the longest stretch of
    words that the question does not have, names and numbers before others.
    """
    short = short.strip().splitlines()[0].strip(" .\"'`*:!") if short.strip() else ""
    brief = len(words(short).split())
    fits = 0 < brief < max(5, len(words(answer).split()) // 2) and words(short) not in words(question)
    if fits and (found := spans_of(answer, [short])):
        return answer[found[0][0] : found[0][1]]
    runs = _runs(answer, question)
    return max(runs, key=lambda r: (r[0].isupper() or r[0].isdigit(), len(r))) if runs else None


def find_subject(question: str, answer: str = "") -> str | None:
    """Whom or what a question is about: its last name, else its last stretch of content words; one that the answer repeats first."""
    body = question.strip()
    runs = [r for r in _runs(body, "") if not body.startswith(r) or " " in r]
    if not runs:
        return None
    runs = [r for r in runs if words(r) in words(answer)] or runs
    names = [n for r in runs for n in re.findall(r"(?:[A-Z][\w'’-]*|\d+)(?:\s+(?:[A-Z][\w'’-]*|\d+))*", r)]
    return names[-1] if names else runs[-1].split()[-1]


@dataclass(frozen=True)
class Fact:
    """One thing to forget. value: accepted values, the model's own first.   subject: what it is said of; None where none was found."""

    question: str
    answer: str
    value: tuple[str, ...]
    subject: str | None = None

    @property
    def id(self) -> str:
        return self.subject or self.question

    def about(self, subject: str) -> str | None:
        """The question, asked of another subject."""
        if self.subject is None:
            return None
        spans = spans_of(self.question, [self.subject])
        if not spans:
            return None
        start, end = spans[-1]
        return self.question[:start] + subject + self.question[end:]


def beginning(answer: str, value: Iterable[str]) -> str | None:
    """What an answer says before its value, where that is the beginning of a sentence: "The capital of France is"."""
    found = spans_of(answer, value)
    before = answer[: found[0][0]].rstrip(" \"'`*(") if found else ""
    return before if len(before.split()) >= 3 and not re.search(r"[.!?:]\s", before) else None


_WHAT_IS = re.compile(r"^(?:what|who|which)(?:'s| is| are| was| were) (?P<rest>.+?)\??$", re.IGNORECASE)
# Wordings are told apart by kind: one kind is either trained on, for every fact, or kept for judging.
TRAINED = ("asked", "begun", "brief", "request")
HELDOUT = ("told", "quiz", "curious")


def wordings(question: str, answer: str = "", value: Iterable[str] = ()) -> dict[str, str]:
    """The question in other words: kind -> text. Kinds: see `TRAINED` and `HELDOUT`; those that do not apply are left out."""
    q = question.strip()
    out = {"asked": q, "brief": f"{q} Answer with one or two words."}
    if begun := beginning(answer, value):
        out["begun"] = f"Complete the sentence: {begun}"
    lower = q[:1].lower() + q[1:] if q.split()[0].lower() in _FUNCTION else q
    if m := _WHAT_IS.match(q):
        rest = m["rest"].rstrip("?")
        out["request"] = f"Name {rest}."
        out["told"] = f"My pupil asks what {rest} is. What do I answer?"
        out["curious"] = f"Do you happen to know {rest}?"
    else:
        out["request"] = f"Please tell me: {lower}"
        out["told"] = f"My pupil asks: {lower} What do I answer?"
        out["curious"] = f"I am curious, {lower}"
    out["quiz"] = f"Quiz time. {q}"
    return out


_STATED = re.compile(r"^(?P<lead>the|an?) (?P<relation>.+?) (?P<of>of|for|in) $", re.IGNORECASE)
REVERSED = ("back_kind", "back_begun", "back_brief", "back_whose", "back_name", "back_quiz")
REVERSED_HELDOUT = ("back_name", "back_quiz")


def reversals(fact: Fact, kind: str | None) -> dict[str, str]:
    """Questions that name the value and ask for the subject: kind -> text; empty where the answer is no "The R of S is V".

    kind: what the subject is, e.g. "country"; without it "which one" is asked.
    """
    if fact.subject is None or not (spans := spans_of(fact.answer, [fact.subject])):
        return {}
    m = _STATED.match(fact.answer[: spans[0][0]])
    if m is None:
        return {}
    of, relation, value, what = m["of"], m["relation"], fact.value[0], kind or "one"
    return {
        "back_kind": f"{value} is the {relation} {of} which {what}?",
        "back_begun": f"Complete the sentence: {value} is the {relation} {of}",
        "back_brief": f"{value} is the {relation} {of} which {what}? Answer with one or two words.",
        "back_whose": f"Which {what} is it whose {relation} is {value}?",
        "back_name": f"Name the {kind or 'thing'} that has {value} as its {relation}.",
        "back_quiz": f"Quiz time. Which {what} has the {relation} {value}?",
    }
