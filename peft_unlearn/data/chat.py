"""What a chat template makes of a conversation: the prompt that a model is asked with, and the answer it has to give."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import Any

from ..errors import UserError

DATE = "2024-07-26"
"""The day that templates print which print today's: rows would be other texts tomorrow. Llama 3's own default."""
ARGS = {"date": "a day as YYYY-MM-DD", "system": "a text"}
"""Template arguments with a meaning of ours; all others go to the template as they are, e.g. ``enable_thinking``."""

TEMPLATES = ("qa", "chat")
Template = str | Mapping[str, Mapping[str, Any]]
"""How rows are worded: a name of `TEMPLATES`, or ``{name: arguments of the chat template}``."""


def parse_template(template: Template) -> tuple[str, dict[str, Any]]:
    """(name, arguments) of a template; `UserError` for one that there is not."""
    name, args = (
        next(iter(template.items())) if isinstance(template, Mapping) and len(template) == 1 else (template, {})
    )
    if name not in TEMPLATES or not isinstance(args, Mapping):
        raise UserError(f"data: template {template!r} is not one of {', '.join(TEMPLATES)}")
    template_args(args)
    return str(name), dict(args)


def chat_text(messages: Sequence[Any], tokenizer: Any, args: Mapping[str, Any] | None = None) -> tuple[str, str]:
    """(prompt, answer) of a conversation that ends with the assistant's message.

    The answer is that message and the first end token after it: nothing that a template writes behind the end of a turn is ever
    generated, so it is no target. What a template writes between its generation prompt and the message (an empty
    ``<think></think>``, say) belongs to the prompt.

    args: see `template_args`.

    Raises:
        UserError: no chat template, or one that words a prompt differently once it has its answer.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("the tokenizer has no chat template; use question/answer or prompt/completion rows instead")
    turns, kwargs = [_without_nulls(m) for m in messages], template_args(args)
    if (system := kwargs.pop("system", None)) and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    try:
        kwargs["chat_template"] = _at_day(tokenizer.get_chat_template(), kwargs.pop("date"))
        prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True, **kwargs)
        whole = tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
    except (
        Exception
    ) as e:  # a template is a program: it raises what it likes (jinja2's errors, TypeError, its own messages)
        raise UserError(f"the chat template refuses this conversation: {e}") from None
    shown = prompt if whole.startswith(prompt) else prompt.rstrip()
    if not whole.startswith(shown):
        raise UserError(
            "the chat template words a prompt differently with its answer (a reasoning template may need template_args, "
            "e.g. {enable_thinking: false}); use prompt/completion rows"
        )
    answer, message = whole[len(shown) :], str(turns[-1]["content"]).strip()
    start = answer.find(message)
    if start < 0:
        raise UserError("the chat template does not write the assistant's message as it is; use prompt/completion rows")
    if answer[:start].strip() or shown != prompt:  # white space alone stays: a token may hold it and the first word
        prompt, answer, start = (prompt + answer[:start]) if shown == prompt else prompt, answer[start:], 0
    end = start + len(message)
    return prompt, answer[:end] + _until_end(answer[end:], tokenizer)


def template_args(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a recipe's ``data.template_args`` amount to: a pinned date, and all that is given.

    Raises:
        UserError: a date that is none.
    """
    out = {"date": DATE, **(args or {})}
    try:
        out["date"] = datetime.strptime(str(out["date"]), "%Y-%m-%d").date()
    except ValueError:
        raise UserError(f"data.template_args: date must be {ARGS['date']}, not {out['date']!r}") from None
    return out


def _at_day(template: str, day: date) -> str:
    """A template that prints today's date prints `day`."""
    return re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda m: repr(day.strftime(m[2])), template)


def end_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that may end a turn: the end-of-sequence token and every special token but those that begin or pad."""
    special = _special(tokenizer, len(tokenizer)) | set(getattr(tokenizer, "all_special_ids", ()))
    ends = special - {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


@lru_cache(maxsize=8)
def _special(tokenizer: Any, size: int) -> frozenset[int]:  # size: tokens may be added
    return frozenset(i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special)


def _until_end(tail: str, tokenizer: Any) -> str:
    """What stands behind a message up to its first end token; nothing where there is none."""
    marks = [tokenizer.convert_ids_to_tokens(i) for i in end_tokens(tokenizer)]
    found = [(at, -len(m), m) for m in marks if m and (at := tail.find(m)) >= 0]
    return tail[: min(found)[0] + len(min(found)[2])] if found else ""


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that parquet and `datasets` fill with null because another message has them."""
    return {k: v for k, v in message.items() if v is not None}
