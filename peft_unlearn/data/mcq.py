"""Multiple-choice questions as WMDP and MMLU have them: {question, choices: [..], answer: 0-based number}.

A folder with forget (and retain, holdout) files in that layout, one file (``mcq:FILE``), or a data set on the Hub
(``mcq:cais/wmdp?config=wmdp-bio&split=test``). ``answer`` may also be a letter or the right choice's text, and the choices
may stand in fields option1, option2, ..., as in TOFU. Rows become prompt and letter in lm-eval's wording.
Paper: https://arxiv.org/abs/2403.03218
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..errors import Errors, UserError, nearest
from .bundle import SETS, ForgetRetain
from .chat import Template
from .files import SUFFIXES, find_file, hub_rows, read_file

PREFIX = "mcq:"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def recognizes(spec: str | Path) -> bool:
    """Whether this is ``mcq:..`` or a folder whose forget file holds multiple-choice questions."""
    if str(spec).startswith(PREFIX):
        return True
    path = Path(spec).expanduser()
    file = find_file(path, "forget") if path.is_dir() else None
    if file is None:
        return False
    try:
        first = next(iter(read_file(file)), (None, None))[1]
    except UserError:  # the reader of plain files says what is wrong with it
        return False
    return isinstance(first, Mapping) and "question" in first and _choices(first) is not None


def load(spec: str | Path, template: Template = "qa") -> ForgetRetain:
    """The bundle. A single file or Hub data set is the forget set.

    Raises UserError: rows that are no multiple-choice question, with file, row and field.
    """
    text = str(spec).removeprefix(PREFIX)
    path = Path(text).expanduser()
    if path.is_dir():
        found = {name: mcq_rows(read_file(f), str(f)) for name in SETS if (f := find_file(path, name))}
        if "forget" not in found:
            raise UserError(f"data: {text} holds no forget file (forget{', forget'.join(SUFFIXES)})")
        return ForgetRetain(found["forget"], found.get("retain"), found.get("holdout"), template=template)
    if path.is_file():
        return ForgetRetain(mcq_rows(read_file(path), text), template=template)
    return ForgetRetain(mcq_rows(_from_hub(text), text), refs={"forget": f"{PREFIX}{text}"}, template=template)


def mcq_rows(rows: Iterable[tuple[str, Any]], origin: str) -> list[dict[str, Any]]:
    """Rows {prompt, completion, question, choices, gold} of (where, row) pairs.

    prompt: lm-eval's wording of WMDP and MMLU: an optional line about the `subject`, the question, one line a choice
    ("A. .."), "Answer:".   completion: blank and letter.   gold: 0-based number of the right choice.
    Raises UserError with every malformed row, up to ten.
    """
    errors, out = Errors(), []
    for where, row in rows:
        wrong = _complaint(row)
        if wrong:
            if len(errors.messages) < 10:
                errors.add(f"{where} {wrong}")
            continue
        choices = _choices(row) or []
        gold = _gold(row["answer"], choices)
        about = str(row.get("subject") or "").replace("_", " ").strip()
        head = f"The following are multiple choice questions (with answers) about {about}.\n\n" if about else ""
        lines = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
        prompt = f"{head}{row['question'].strip()}\n{lines}\nAnswer:"
        out.append({"prompt": prompt, "completion": f" {LETTERS[gold or 0]}", "question": row["question"],
                    "choices": choices, "gold": gold})  # fmt: skip
    errors.raise_if_any(origin)
    if not out:
        raise UserError(f"{origin}: holds no rows; a set needs at least one")
    return out


def _choices(row: Mapping[str, Any]) -> list[Any] | None:
    found = row.get("choices")
    if found is None and "option1" in row:
        found = []
        while (key := f"option{len(found) + 1}") in row:
            found.append(row[key])
    return list(found) if isinstance(found, (list, tuple)) else None


def _gold(answer: Any, choices: list[Any]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(choices)]:
        return LETTERS.index(answer)
    return None


def _complaint(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}, not an object with fields"
    if missing := [f for f in ("question", "answer") if f not in row]:
        return f"has no field {' and no '.join(map(repr, missing))}; wanted question, choices and answer"
    if not isinstance(row["question"], str) or not row["question"].strip():
        return "field 'question' is empty or not text"
    choices = _choices(row)
    if choices is None:
        return "has no list 'choices' (nor option1, option2, ..)"
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(c, str) and c.strip() for c in choices):
        return f"field 'choices' must hold 2 to {len(LETTERS)} texts, none of them empty"
    if _gold(row["answer"], choices) is None:
        return f"field 'answer' is {row['answer']!r}, not a number from 0 to {len(choices) - 1}, a letter or one of the choices"
    return None


def _from_hub(ref: str) -> Iterable[tuple[str, Any]]:
    where, _, query = ref.partition("?")
    options = dict(parse_qsl(query))
    for key in options:
        if key not in ("config", "split"):
            raise UserError(f"data: {PREFIX}{ref}: unknown option {key!r}.{nearest(key, ('config', 'split'))}")
    repo, _, revision = where.partition("@")
    if repo.count("/") != 1:
        raise UserError(f"data: {PREFIX}{ref}: no such file, and not a Hub id (owner/name?config=NAME&split=NAME)")
    rows = hub_rows(ref, repo, options.get("config"), revision, options.get("split", "test"))
    return [(f"row {i}", row) for i, row in enumerate(rows)]
