"""Result files: never upon what is none of ours, never among the files of a model or an adapter; text in them cannot steer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.folder.results import KINDS, check_out, is_result, save, write_file
from peft_unlearn.reporting import figure as kit
from peft_unlearn.reporting.document import Heading, Lines, Part, Picture, Text
from peft_unlearn.reporting.result import Result
from peft_unlearn.reporting.tables import Table
from peft_unlearn.reporting.text import json_text, printable

EVIL = "\x1b]0;owned\x07 \u202egnp.exe\u202c \x9b31m \ud800 \u2066x\u2069 a\rb"


def picture() -> bytes:
    drawn = kit.figure(1, 1)
    drawn.subplots().plot([0, 1])
    return kit.png(drawn)


@dataclass
class Made(Result):
    text: str = "plain"
    title = "A result"

    def to_dict(self) -> dict[str, Any]:
        return {"verdicts": {"a": self.text}, "missing": {}, "notes": []}

    def __str__(self) -> str:
        return self.text

    def parts(self) -> list[Part]:
        return [
            Heading(self.text),
            Text(self.text),
            Lines(self.text),
            Table([self.text], [[self.text]]),
            Picture(picture(), "p", "p"),
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_replaces_its_own_earlier_one(tmp_path: Path, kind: str) -> None:
    out = tmp_path / f"r{kind}"
    for text in ("one", "two"):
        check_out(out)
        assert out in save(Made(text), out)
        assert is_result(out)
    folder = tmp_path / "all"
    for _ in range(2):
        check_out(folder)
        assert len(save(Made(), folder)) == 4


FOREIGN: dict[str, bytes] = {
    "notes.md": b"# Mine\n", "page.html": b"<!doctype html><title>mine</title>", "photo.png": b"\x89PNG\r\n\x1a\n mine", "empty.png": b"",
    "rows.json": b'[{"question": "a"}]', "config.json": b'{"format": 1}', "torn.json": b'{"verdicts": ', "deep.json": b"[" * 100_000,
    "empty.json": b"", "card.md": b"# Card\n<!-- peft-unlearn: generated, edits are lost -->\n", "latin.json": b"\xff\xfe",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_nothing_of_anybody_elses_is_replaced(tmp_path: Path, name: str) -> None:
    there = tmp_path / name
    there.write_bytes(FOREIGN[name])
    for write in (lambda: check_out(there), lambda: save(Made(), there), lambda: write_file(there, b"x")):
        with pytest.raises(UserError, match="no earlier result of peft-unlearn"):
            write()
    assert there.read_bytes() == FOREIGN[name] and list(tmp_path.iterdir()) == [there]


def test_nor_through_a_link_nor_as_one_of_several(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine.md", tmp_path / "link.md"
    mine.write_text("# Mine\n")
    link.symlink_to(mine)
    with pytest.raises(UserError, match="no earlier result"):
        save(Made(), link)
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "all.json").write_text("{}")
    with pytest.raises(UserError, match=r"all\.json"):
        save(Made(), folder)
    assert [p.name for p in folder.iterdir()] == ["all.json"]  # not the page before it either
    (folder / "p-p.png").write_bytes(b"photo")
    with pytest.raises(UserError, match=r"p-p\.png"):
        save(Made(), folder / "p.md")
    assert not (folder / "p.md").exists()


def test_no_device_no_pipe_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "pipe.png", tmp_path / "folder.png", tmp_path / "file", tmp_path / "file" / "x.json"):
        with pytest.raises(UserError):
            check_out(out)
        with pytest.raises(UserError):
            write_file(out, b"x")
    assert (tmp_path / "pipe.png").is_fifo()


@pytest.mark.parametrize("beside", [("adapter_config.json",), ("config.json", "model.safetensors")])
def test_among_the_files_of_an_adapter_or_a_model_nothing_that_could_be_one_of_them(
    tmp_path: Path, beside: Any
) -> None:
    for name in beside:
        (tmp_path / name).write_text("{}")
    for name in ("forget.json", "eval.json", "README.md", "config.json", "new.json"):
        with pytest.raises(UserError, match=r"folder of (an adapter|a model)"):
            check_out(tmp_path / name)
    with pytest.raises(UserError, match="folder of"):
        check_out(tmp_path)  # would be NAME.json and NAME.md in it
    check_out(tmp_path / "report.html")
    save(Made(), tmp_path / "curve.png")


def test_every_json_that_a_command_writes_is_known(tmp_path: Path) -> None:
    """The keys that `is_result` looks for are those that results have; each command's own test has the rest."""
    for keys in (
        ("format", "suite", "subjects", "details", "metrics", "adapter_id", "base", "versions"),
        ("format", "metric", "scale", "max_scale", "scale_before", "baked", "stored"),
        ("format", "metric", "base_levels", "ranking", "behind", "retain_only", "n"),
        ("format", "metric", "scales", "adapter_ids", "own", "cost"), ("format", "space", "objectives", "notes", "points"),
    ):  # fmt: skip
        path = tmp_path / "x.json"
        path.write_text(json.dumps(dict.fromkeys(keys)))
        assert is_result(path), keys


def steering(text: str) -> list[str]:
    return [c for c in text if (not c.isprintable() and c not in "\n\t")]


@pytest.mark.parametrize("kind", [".html", ".md", ".json"])
def test_what_is_written_cannot_steer_a_terminal_or_hide_text(tmp_path: Path, kind: str) -> None:
    (path, *_) = save(Made(EVIL), tmp_path / f"r{kind}")
    text = path.read_text(encoding="utf-8")
    assert (not steering(text) and "x1b" in text) or "u001b" in text
    if kind == ".json":
        assert json.loads(text) == Made(EVIL).to_dict()  # the same text, spelled another way


def test_printable_keeps_what_people_write() -> None:
    for text in ("Zürich, naïve – 你好 🙂 שלום مرحبا", "two\nlines\tand a tab", "क्\u200dष", "\N{NO-BREAK SPACE}"):
        assert printable(text) == text
    assert printable("a\nb\t", breaks=False) == "a\\nb\\t"
    assert printable(EVIL).isprintable() and json.loads(json_text({"a": EVIL})) == {"a": EVIL}
