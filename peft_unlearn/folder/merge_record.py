"""The record in a merged model's folder: of which base and which adapters it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .read import read_json

RECORD = "forget-merge.json"
"""Says that a folder is a merged model, of which base and adapters; nothing that loads models reads it."""


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False)
    (out / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """What `forget-merge.json` says, or None where there is none: the folder is not a model merged by this package."""
    path = Path(folder) / RECORD
    return read_json(path) if path.is_file() else None
