"""What a row is, and the text it stands for.

A row is a plain dict in one of four layouts; `LAYOUTS` names their fields. Every mistake names file, row and field.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from .chat import Template, chat_text, parse_template
from .files import pairs_of

LAYOUTS: dict[str, tuple[str, ...]] = {
    "question/answer": ("question", "answer"),
    "prompt/completion": ("prompt", "completion"),
    "prompt/response": ("prompt", "response"),
    "messages": ("messages",),
    "text": ("text",),
}
DATA_OPTIONS = ("anchor", "per_anchor", "max_length", "on_overflow", "template", "template_args", "target", "fields")
"""Keys of a recipe's ``data`` part that name no set."""
QA_PROMPT = "Question: {question}\nAnswer:"
_KNOWN = {
    "conversations": "{messages: conversations}",
    "instruction": "{question: instruction, answer: output}",
}
"""A field that tells of a layout people have -> the mapping that reads it."""


IMAGE = "pixel_values"
"""The field of a row that is an image with a ``label`` (`images`); it stands for no text."""


def layout_of(row: Mapping[str, Any]) -> str | None:
    """Name of the first layout whose fields are all there; ``image`` for an image."""
    if IMAGE in row:
        return "image"
    return next((name for name, fields in LAYOUTS.items() if all(f in row for f in fields)), None)


def complaint(row: Any) -> str | None:
    """What is wrong with one row, naming the field; None when it is fine."""
    if not isinstance(row, Mapping):
        return f"is a {type(row).__name__}, not an object with fields"
    layout = layout_of(row)
    if layout == "image":
        return _complaint_image(row)
    if layout is None:
        have = ", ".join(map(repr, row)) or "none"
        hint = next((f"; data.fields: {fields} reads these" for mark, fields in _KNOWN.items() if mark in row), "")
        return f"has fields {have}; wanted one of: {'; '.join('+'.join(f) for f in LAYOUTS.values())}{hint}"
    if layout == "messages":
        return _complaint_messages(row["messages"])
    for name in LAYOUTS[layout]:
        if not isinstance(row[name], str):
            return f"field {name!r} is {type(row[name]).__name__}, not text"
        if wrong := _broken(row[name]):
            return f"field {name!r} {wrong}"
    target = LAYOUTS[layout][-1]
    if not row[target].strip():
        return f"field {target!r} is empty: there is nothing to learn or to forget in it"
    return None


def _complaint_image(row: Mapping[str, Any]) -> str | None:
    pixels, label = row[IMAGE], row.get("label")
    if getattr(pixels, "ndim", 0) != 3 or str(pixels.dtype) not in ("float32", "uint8"):
        return f"field {IMAGE!r} is no array (channels, height, width) of float32 or uint8"
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return f"field 'label' is {label!r}, not the number of a class"
    finite = pixels.dtype == "uint8" or bool((abs(pixels) < float("inf")).all())
    return None if finite else f"field {IMAGE!r} holds values that are no numbers"


def _complaint_messages(messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "field 'messages' is not a non-empty list"
    for i, m in enumerate(messages):
        if not isinstance(m, Mapping) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
            return f"field 'messages': message {i} needs text in 'role' and 'content'"
        if wrong := _broken(m["content"]):
            return f"field 'messages': message {i} {wrong}"
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return "field 'messages' must end with a non-empty assistant message: that is the text to train on"
    return None


def _broken(text: str) -> str | None:
    """Half of a surrogate pair is no character: no file, no tokenizer and no hash takes it."""
    at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
    return (
        None if at is None else f"holds half a character (a lone surrogate, {text[at]!r}, at {at}): a broken emoji, say"
    )


def load_rows(source: Any, name: str = "", fields: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows of whatever `files.pairs_of` reads, each checked.

    fields: field of ours -> the name it has there, e.g. ``{question: instruction, answer: output}``; a column of ``from`` and
        ``value`` turns (ShareGPT) may stand for ``messages``.

    Raises:
        UserError: unreadable source, no rows, or malformed rows (all of them listed, up to ten).
    """
    origin = str(source) if isinstance(source, (str, Path)) else (name or f"{type(source).__name__} given")
    pairs = [(where, _tidy(row, fields or {})) for where, row in pairs_of(source, origin)]
    if not pairs:
        raise UserError(f"{origin}: holds no rows; a set needs at least one")
    errors = Errors()
    for where, row in pairs:
        if (wrong := complaint(row)) and len(errors.messages) < 10:
            errors.add(f"{where} {wrong}")
    errors.raise_if_any(origin)
    return [dict(row) for _, row in pairs]


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


def _tidy(row: Any, fields: Mapping[str, str]) -> Any:
    """A row under our names, without the nulls that columns of other rows leave in it."""
    if not isinstance(row, Mapping):
        return row
    out = {k: v for k, v in row.items() if v is not None}
    for ours, theirs in fields.items():
        if theirs in out:
            out[ours] = out[theirs]
    if isinstance(given := out.get("value"), list | tuple) and given and all(isinstance(v, str) for v in given):
        out |= {
            "value": given[0],
            "accepted": list(given),
        }  # several names of one thing: the first is the one looked for in prompts
    turns = out.get("messages")
    if isinstance(turns, Sequence) and not isinstance(turns, str):
        out["messages"] = [_turn(m) for m in turns]
    return out


def _turn(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    out = {k: v for k, v in message.items() if v is not None}
    if "role" not in out and out.get("from") in _SPEAKERS and "value" in out:
        return {"role": _SPEAKERS[out["from"]], "content": out["value"]}
    return {**out, "content": ""} if out.get("tool_calls") and "content" not in out else out


def to_text(row: Mapping[str, Any], tokenizer: Any = None, template: Template = "qa") -> tuple[str, str]:
    """(prompt, answer) of a row, ready to be tokenized one after the other.

    Args:
        template: how question/answer rows are worded: "qa" (``Question: ..\\nAnswer:``, the answer with a leading
            space) or "chat" (the tokenizer's chat template). The other layouts carry their own wording. ``{name: arguments}``
            gives arguments to the chat template, for messages rows too; see `chat.template_args`.
    """
    layout, (name, args) = layout_of(row), parse_template(template)
    if layout == "image":
        raise UserError("is an image, and this is for texts: use a base that is an image classifier")
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
    if layout in (None, "text", "image"):
        return None
    return str(row["messages"][-1]["content"] if layout == "messages" else row[LAYOUTS[layout][-1]]).strip()


def identity(row: Mapping[str, Any]) -> str:
    """Canonical JSON of the fields that make the row's text, or label and hash of an image: what set hashes and overlap checks compare."""
    if IMAGE in row:
        pixels = row[IMAGE]
        head = f"{pixels.dtype} {pixels.shape}".encode()
        return json.dumps({"image": hashlib.sha256(head + pixels.tobytes()).hexdigest(), "label": row["label"]})
    fields = LAYOUTS[layout_of(row) or "text"]
    return json.dumps({f: row[f] for f in fields}, sort_keys=True, ensure_ascii=False)
