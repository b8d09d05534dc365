"""Rows from wherever users keep them, and the text a row stands for.

A row is a plain dict in one of four layouts; `LAYOUTS` names their fields. Files are jsonl, json, csv or parquet; a
`datasets` object, a Hub id (``owner/name``, ``owner/name@revision:split``) and a list work too. Every mistake names file, row and field.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from .chat import Template, chat_text, parse_template

LAYOUTS: dict[str, tuple[str, ...]] = {
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "prompt/response": ("prompt", "response"),
    "messages": ("messages",),
    "text": ("text",),
}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
QA_PROMPT = "Question: {question}\nAnswer:"
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.\[\]%-]+)?$")


def layout_of(row: Mapping[str, Any]) -> str | None:
    """Name of the first layout whose fields are all there."""
    return next((name for name, fields in LAYOUTS.items() if all(f in row for f in fields)), None)


def complaint(row: Any) -> str | None:
    """What is wrong with one row, naming the field; None when it is fine."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}, not an object with fields"
    layout = layout_of(row)
    if layout is None:
        have = ", ".join(map(repr, row)) or "none"
        return f"has fields {have}; wanted one of: {'; '.join('+'.join(f) for f in LAYOUTS.values())}"
    if layout == "messages":
        return _complaint_messages(row["messages"])
    for name in LAYOUTS[layout]:
        if not isinstance(row[name], str):
            return f"field {name!r} is {type(row[name]).__name__}, not text"
    target = LAYOUTS[layout][-1]
    if not row[target].strip():
        return f"field {target!r} is empty: there is nothing to learn or to forget in it"
    return None


def _complaint_messages(messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "field 'messages' is not a non-empty list"
    for i, m in enumerate(messages):
        if not isinstance(m, Mapping) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            return f"field 'messages': message {i} needs text in 'role' and 'content'"
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "field 'messages' must end with a non-empty assistant message: that is the text to train on"
    return None


def load_rows(source: Any, name: str = "") -> list[dict[str, Any]]:
    """Rows of a file, a Hub id, a `datasets` object or a list, each checked.

    Raises:
        UserError: unreadable source, no rows, or malformed rows (all of them listed, up to ten).
    """
    origin = str(source) if isinstance(source, (str, Path)) else (name or f"{type(source).__name__} given")
    if isinstance(source, (str, Path)):
        pairs = list(read_file(source))
    elif isinstance(source, Mapping):
        raise UserError(f"{origin}: a mapping is not a list of rows; name one split")
    elif isinstance(source, Iterable):
        pairs = [(f"row {i}", {"text": r} if isinstance(r, str) else r) for i, r in enumerate(source)]
    else:
        raise UserError(f"{origin}: cannot read rows from a {type(source).__name__}")
    if not pairs:
        raise UserError(f"{origin}: holds no rows; a set needs at least one")
    errors = Errors()
    for where, row in pairs:
        if (wrong := complaint(row)) and len(errors.messages) < 10:
            errors.add(f"{where} {wrong}")
    errors.raise_if_any(origin)
    return [dict(row) for _, row in pairs]


def read_file(source: str | Path) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    try:
        there = path.exists()
    except OSError:  # e.g. a name longer than a file system takes
        there = False
    if not there:
        if isinstance(source, str) and suffix not in SUFFIXES and _HUB_ID.match(source):
            rest, _, split = source.partition(":")
            repo, _, revision = rest.partition("@")
            rows = hub_rows(source, repo, revision=revision, split=split or "train")
            yield from ((f"row {i}", row) for i, row in enumerate(rows))
            return
        raise UserError(f"{source}: no such file, and not a Hub id (owner/name, owner/name@revision:split)")
    if path.is_dir():
        raise UserError(f"{source}: is a folder; a set is a file ({', '.join(SUFFIXES)})")
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file {suffix!r}; wanted {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: is not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror})") from e
    if suffix == ".jsonl":
        # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {i}", _json(line, f"{source}: line {i}")
    elif suffix == ".json":
        rows = _json(text, str(source))
        if not isinstance(rows, list):
            raise UserError(f"{source}: holds one {type(rows).__name__}, not a list of rows")
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(f"{source}: line {reader.line_num} has not as many columns as the header")
                yield f"line {reader.line_num}", row
        except csv.Error as e:
            raise UserError(f"{source}: line {reader.line_num} is not valid csv: {e}") from e


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not valid JSON: {e.msg} (column {e.colno})") from e
    except (ValueError, RecursionError) as e:  # a number of too many digits, or too deep a nesting
        raise UserError(f"{where} is not valid JSON: {e}") from e


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'peft-unlearn[data]'") from e
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as e:  # pyarrow has no one error class for foreign and truncated files
        raise UserError(f"{path}: is not a readable parquet file: {e}") from e
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def hub_rows(
    ref: str, repo: str, config: str | None = None, revision: str = "", split: str = "train"
) -> list[dict[str, Any]]:
    """Rows of a data set on the Hub; `ref` is what the user called it."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"{ref}: a Hub data set needs datasets: pip install 'peft-unlearn[data]'") from e
    try:
        rows = datasets.load_dataset(repo, config, revision=revision or None, split=split)
    except Exception as e:  # the Hub client raises a dozen unrelated classes
        raise UserError(f"{ref}: could not be loaded from the Hub: {e}") from e
    return [dict(row) for row in rows]


def find_file(folder: Path, *names: str) -> Path | None:
    """The first ``NAME.jsonl``, ``.json``, ``.csv`` or ``.parquet`` in a folder."""
    return next((f for name in names for s in SUFFIXES if (f := folder / f"{name}{s}").is_file()), None)


def to_text(row: Mapping[str, Any], tokenizer: Any = None, template: Template = "qa") -> tuple[str, str]:
    """(prompt, answer) of a row, ready to be tokenized one after the other.

    Args:
        template: how question/answer rows are worded: "qa" (``Question: ..\\nAnswer:``, the answer with a leading
            space) or "chat" (the tokenizer's chat template). The other layouts carry their own wording. ``{name: arguments}``
            gives arguments to the chat template, for messages rows too; see `chat.template_args`.
    """
    layout, (name, args) = layout_of(row), parse_template(template)
    if layout == "text":
        return "", row["text"]
    if layout in ("prompt/completion", "prompt/response"):
        return row["prompt"], row[LAYOUTS[layout][1]]
    if layout == "messages":
        return chat_text(row["messages"], tokenizer, args)
    if name == "chat":
        user = {"role": "user", "content": row["question"]}
        return chat_text([user, {"role": "assistant", "content": row["answer"]}], tokenizer, args)
    return QA_PROMPT.format(question=row["question"]), f" {row['answer']}"


def target_of(row: Mapping[str, Any]) -> str | None:
    """The text that a row is there for: its answer, completion or last message; None for plain text."""
    layout = layout_of(row)
    if layout in (None, "text"):
        return None
    return str(row["messages"][-1]["content"] if layout == "messages" else row[LAYOUTS[layout][-1]]).strip()


def identity(row: Mapping[str, Any]) -> str:
    """Canonical JSON of the fields that make the row's text: what set hashes and overlap checks compare."""
    fields = LAYOUTS[layout_of(row) or "text"]
    return json.dumps({f: row[f] for f in fields}, sort_keys=True, ensure_ascii=False)
