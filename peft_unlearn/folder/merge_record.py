"""The record in a merged model's folder: of which base and which adapters it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import schema as s
from .read import read_json

RECORD = "forget-merge.json"
"""Says that a folder is a merged model, of which base and adapters; nothing that loads models reads it."""


_ADAPTER = s.record(
    {"name": s.TEXT, "adapter_id": s.TEXT, "scale": s.FINITE}, ("name", "adapter_id", "scale"), more=True
)
_BASE = s.record({"ref": s.TEXT, "revision": s.maybe(s.TEXT), "digest": s.TEXT}, ("ref", "digest"), more=True)
_NUMBERS = {"cosine": s.maybe(s.FINITE), "changed": s.FINITE, "relative": s.FINITE, "gain": s.maybe(s.FINITE)}
_LAYERS = s.list_of(s.record({"name": s.TEXT, **_NUMBERS}, ("name", *_NUMBERS)))
_RECORD = s.record(
    {"base": _BASE, "adapters": s.list_of(_ADAPTER), "layers": _LAYERS, "worst_cosine": s.maybe(s.FINITE)},
    ("base", "adapters"), more=True,
)  # fmt: skip


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    (out / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """What `forget-merge.json` says, or None where there is none: the folder is not a model merged by this package.

    Raises:
        UserError: it is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    s.require(record, _RECORD, str(path))
    return record
