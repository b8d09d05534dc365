"""A stranger's repository: what names code, or asks for more than its tensors hold, never becomes a folder here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client import Clients
from hub import Hub

from peft_unlearn.folder.read import file_sha256


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}, "auto_map"),
        ("adapter_config.json", {"target_modules": "(a+)+$"}, "may take for ever"),
        ("adapter_config.json", {"r": 400_000}, "rank of at most"),
    ],
)
def test_nothing_of_it_is_left_here(
    hub: Hub, clients: Clients, folder: Path, tmp_path: Path, name: str, change: dict[str, Any], words: str
) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = json.loads((folder / "forget.json").read_text())
    manifest["files"][name] = file_sha256(path)
    (folder / "forget.json").write_text(json.dumps(manifest))
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.put("me/evil", {**files, "evil.py": b"open('ran', 'w')\n"})
    answer = clients("pull", "me/evil", str(tmp_path / "out"))
    assert words in " ".join(answer["error"]), answer
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
