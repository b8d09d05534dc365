"""The command line against hostile folders and careless places: what it prints cannot steer a terminal, what it writes harms nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_unlearn.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parent / "folder"))
import tinyfolder

EVIL = "\x1b]0;owned\x07\x1b[31m\u202egnp\x9b"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("cli")
    tinyfolder.write(root / "adapter", tinyfolder.save_base(root / "base"))
    return root / "base", root / "adapter"


@pytest.fixture
def at(made: tuple[Path, Path], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A base and an adapter, copied; what a test leaves changed in them fails it."""
    base, adapter = (Path(shutil.copytree(p, tmp_path / p.name)) for p in made)
    before = state(tmp_path)
    yield base, adapter
    assert state(tmp_path).items() >= before.items()


def state(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["peft-unlearn", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert not [c for c in out + err if not c.isprintable() and c not in "\n\t"], (out, err)
    return int(left.value.code or 0), out, err


def test_what_a_stranger_wrote_is_printed_as_text(made, tmp_path, monkeypatch, capsys) -> None:
    adapter = Path(shutil.copytree(made[1], tmp_path / "adapter"))
    (adapter / "README.md").write_text((adapter / "README.md").read_text() + f"\nMine: {EVIL}\n")
    code, out, _ = run(monkeypatch, capsys, "card", adapter)
    assert code == 0 and "\\x1b" in out and "\\u202e" in out
    manifest = json.loads((adapter / "forget.json").read_text())
    for change in ({"scale": EVIL}, {EVIL: 1}, {"base": {**manifest["base"], "ref": EVIL}}, {"files": {EVIL: "x"}}):
        (adapter / "forget.json").write_text(json.dumps({**manifest, **change}))
        code, _, err = run(monkeypatch, capsys, "card", adapter)
        assert code == 2 and "error:" in err
    (adapter / "forget.json").write_text(EVIL)
    code, out, _ = run(monkeypatch, capsys, "verify", adapter, "--json")
    assert code in (1, 2)


def test_json_on_a_terminal_is_the_same_json(monkeypatch, capsys) -> None:
    from peft_unlearn.cli.options import emit

    emit({"said": EVIL, "half": "\ud800"})
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out) == {"said": EVIL, "half": "\ud800"}


COMMANDS = (["calibrate"], ["compare"], ["interference"], ["report", "--no-samples"], ["eval"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_no_result_lands_on_an_input(at, tmp_path, monkeypatch, capsys, command) -> None:
    base, adapter = at
    notes, rows = tmp_path / "notes.md", tmp_path / "rows.json"
    notes.write_text("# Mine\n")
    rows.write_text("[]")
    for place in (
        adapter / "adapter_model.safetensors", adapter / "forget.json", adapter / "eval.json", adapter / "README.md",
        adapter / "recipe.yaml", adapter / "adapter_config.json", base / "config.json", base / "model.safetensors", notes, rows, adapter,
    ):  # fmt: skip
        if command == ["eval"] and place.suffix not in (".json", ""):
            continue  # names a folder to it
        code, _, err = run(monkeypatch, capsys, *command, adapter, "--base", base, "--out", place)
        assert code == 2 and (
            "nothing was written" in err or "give a name that ends in" in err or "another place" in err
        ), (place, err)
    assert notes.read_text() == "# Mine\n" and rows.read_text() == "[]" and not (adapter / "eval.json").exists()


def test_nor_that_of_the_other_commands(at, tmp_path, monkeypatch, capsys) -> None:
    base, adapter = at
    for place in (base / "model.safetensors", base / "config.json", adapter / "README.md"):
        code, _, err = run(monkeypatch, capsys, "experts", "--base", base, "--data", "embedded:people", "--out", place)
        assert code == 2 and ".png" in err
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"photo")
    code, _, err = run(monkeypatch, capsys, "experts", "--base", base, "--data", "embedded:people", "--out", mine)
    assert code == 2 and "no earlier result" in err
    code, _, err = run(monkeypatch, capsys, "effect", adapter, "--base", base, "--out", adapter)
    assert code == 2 and "folder of an adapter" in err
    for command in (
        ["compose", f"{adapter}:1", "--base", base, "--out", adapter], ["compose", f"{adapter}:-1", "--base", base, "--out", base],
        ["merge", adapter, "--base", base, "--out", adapter], ["merge", adapter, "--base", base, "--out", base],
        ["export", adapter, "--for", "vllm", "--out", adapter], ["export", adapter, "--for", "vllm", "--out", base],
        ["train", adapter / "recipe.yaml", "--base", base, "--out", base],
    ):  # fmt: skip
        code, _, err = run(monkeypatch, capsys, *command)
        assert code == 2 and err.startswith("error:"), (command, err)


def test_a_report_replaces_the_one_before_and_nothing_else(at, tmp_path, monkeypatch, capsys) -> None:
    _, adapter = at
    for name in ("page.html", "page.md", "page.json"):
        for _ in range(2):
            code, out, err = run(
                monkeypatch, capsys, "report", adapter, "--no-samples", "--out", tmp_path / "out" / name
            )
            assert code == 0 and name in out, err
    (tmp_path / "out" / "page.html").write_text("<p>mine now</p>")
    code, _, err = run(monkeypatch, capsys, "report", adapter, "--no-samples", "--out", tmp_path / "out" / "page.html")
    assert code == 2 and "no earlier result" in err
    assert (tmp_path / "out" / "page.html").read_text() == "<p>mine now</p>"
