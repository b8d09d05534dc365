"""`peft-unlearn attack`: JSON on standard output, a block in eval.json, refusals in words, nothing half-written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from peft_unlearn import cli
from peft_unlearn.attacks.attack import attack
from peft_unlearn.attacks.requests import requests_of, wanted
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import update_block, update_eval


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a bundle and an adapter trained on it, made by the command itself."""
    where = tmp_path_factory.mktemp("attacked")
    tiny.llama().save_pretrained(where / "base")
    tiny.tokenizer().save_pretrained(where / "base")
    (where / "data").mkdir()
    write_rows(where / "data" / "forget.jsonl", tiny.rows(6, "f", 1))
    write_rows(where / "data" / "retain.jsonl", tiny.rows(5, "r", 2))
    recipe = {
        "name": "test", "base": str(where / "base"), "data": {"bundle": str(where / "data")},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "terms": {"forget": {"npo": {}}, "retain": {"nll": {}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "no"},
    }  # fmt: skip
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(where)
        m.setattr(sys, "argv", ["peft-unlearn", "train", "recipe.yaml", "--out", "adapter"])
        try:
            cli.main()
        except SystemExit as e:
            assert not e.code
    return where


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "all")
    return tmp_path / "all"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", *argv])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        got = capsys.readouterr()
        return code, got.out, got.err

    return call


def flags(here: Path) -> list[str]:
    return ["--base", str(here / "base"), "--data", str(here / "data")]


def test_json_and_the_block_in_eval_json(here, run):
    adapter = str(here / "adapter")
    asked = [
        "--relearn",
        "2",
        "--quantize",
        "int8,int4",
        "--strip",
        "--set",
        "relearn.steps=[1, 2]",
        "--set",
        "relearn.learning-rate=1e-3",
    ]
    code, out, _ = run("attack", adapter, *flags(here), *asked, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found["attacks"]) == {"strip", "relearn", "quantize:int8", "quantize:int4"}
    assert found["attacks"]["relearn"]["settings"]["learning_rate"] == [1e-3]
    assert found["rows"] == {"scored": 4, "shown": 2, "seed": 0} and found["scale"] == {"adapter": 1.0}
    stored = json.loads((here / "adapter" / "eval.json").read_text())
    assert (
        stored["attacks"] == found and stored["adapter_id"] == found["adapter_id"] == read_adapter(adapter).adapter_id
    )
    assert str(here) not in (here / "adapter" / "eval.json").read_text()
    # another attack joins the block, and the same again replaces itself
    code, out, _ = run("attack", adapter, *flags(here), "--benign", "--set", "benign.steps=1", "--relearn", "2")
    assert code == 0 and "recovery" in out and "benign" in out
    both = json.loads((here / "adapter" / "eval.json").read_text())["attacks"]["attacks"]
    assert set(both) == {"strip", "relearn", "quantize:int8", "quantize:int4", "benign"}
    assert both["relearn"]["settings"]["steps"] == [20]
    # other rows: a fresh block
    assert run("attack", adapter, *flags(here), "--strip", "--seed", "1")[0] == 0
    assert set(json.loads((here / "adapter" / "eval.json").read_text())["attacks"]["attacks"]) == {"strip"}


def test_the_dtype_is_what_was_asked_for_and_is_said(here, run, monkeypatch):
    """Training every weight in bfloat16 rounds its steps away: where the user names no dtype such attacks are run in float32."""
    from peft_unlearn.stack import model

    monkeypatch.setattr(model, "dtype_of", lambda given, base: "bfloat16" if given == "auto" else given)
    command = ["attack", str(here / "adapter"), *flags(here), "--n", "2"]
    code, out, _ = run(*command, "--strip")
    assert code == 0 and "computed in bfloat16" in out
    for more, dtype in (
        (["--relearn", "1", "--set", "relearn.steps=1"], "float32"),
        (["--relearn", "1", "--set", "relearn.steps=1", "--set", "relearn.weights=lora"], "bfloat16"),
        (["--strip", "--dtype", "float16"], "float16"),
    ):
        code, out, _ = run(*command, *more, "--json")
        assert code == 0 and json.loads(out)["dtype"] == dtype
    code, out, _ = run("eval", str(here / "adapter"), *flags(here), "--n", "2", "--json")
    assert code == 0 and json.loads(out)["dtype"] == "bfloat16"
    monkeypatch.undo()


def test_only_some_rows_or_two_folders_are_not_stored(here, run):
    shutil.copytree(here / "adapter", here / "second")
    before = [(here / name / "eval.json").is_file() for name in ("adapter", "second")]
    code, out, _ = run("attack", str(here / "adapter"), str(here / "second"), *flags(here), "--strip", "--json")
    assert code == 0 and {"adapter:adapter", "adapter:second"} <= set(json.loads(out)["attacks"]["strip"]["subjects"])
    assert run("attack", str(here / "adapter"), *flags(here), "--strip", "--n", "2")[0] == 0
    for name, there in zip(("adapter", "second"), before, strict=True):
        stored = json.loads((here / name / "eval.json").read_text()) if there else {}
        assert "attacks" not in stored


@pytest.mark.parametrize("which", ["retain", "other"])
def test_rows_that_are_not_the_forget_set_are_refused(here, run, which):
    """Relearning on the retain set by mistake gives a fine robustness, and no truth."""
    wrong = here / "wrong"
    wrong.mkdir()
    rows = tiny.rows(5, "r", 2) if which == "retain" else tiny.rows(6, "f", 1)[:-1]
    write_rows(wrong / "forget.jsonl", rows)
    code, out, err = run("attack", str(here / "adapter"), "--base", str(here / "base"), "--data", str(wrong), "--strip")
    assert code == 2 and not out and "not the one" in err


def test_mistakes_in_flags(here, run):
    adapter = str(here / "adapter")
    for asked, text in (
        ([], "name at least one"),
        (["--quantize", "int3"], "int3"),
        (["--strip", "--set", "relearn.steps=3"], "not among the attacks requested"),
        (["--relearn", "2", "--set", "relearn.stepps=3"], "Did you mean 'steps'"),
        (["--relearn", "2", "--set", "steps=3"], "expected ATTACK.NAME=VALUE"),
        (["--relearn", "2", "--set", "relearn.steps=[3"], "--set"),
        (["--relearn", "2", "--set", "relearn.steps=-3"], "wanted numbers from 0 up"),
    ):
        code, out, err = run("attack", adapter, *flags(here), *asked)
        assert code == 2 and not out and text in err, (asked, err)


def test_everything_is_every_attack_with_every_format():
    found = requests_of(everything=True, relearn=5)
    assert ("relearn", {"rows": 5}) in found and [n for n, _ in found].count("relearn") == 1
    assert [h["format"] for n, h in found if n == "quantize"] == ["int8", "int4", "nf4", "bf16"]
    wanted(found)


# --- eval.json ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("the user's"), RuntimeError("a defect")])
def test_an_end_in_the_middle_leaves_eval_json_as_it_was(here, monkeypatch, error):
    adapter = here / "adapter"
    update_block(adapter, "attacks", {"adapter_id": read_adapter(adapter).adapter_id, "attacks": {}})
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    from peft_unlearn.attacks.case import Case

    monkeypatch.setattr(Case, "score", _failing_after(2, Case.score, error))
    with pytest.raises(type(error) if not isinstance(error, type) else error):
        attack([adapter], [("quantize", {"format": "int8"})], base=str(here / "base"), data=str(here / "data"))
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before


def _failing_after(calls: int, fn: Any, error: Any) -> Any:
    left = iter(range(calls))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise error
        return fn(*args, **kwargs)

    return wrapped


def test_blocks_stay_for_the_same_adapter_and_go_with_another(here):
    adapter = here / "adapter"
    mine = read_adapter(adapter).adapter_id
    update_block(adapter, "attacks", {"adapter_id": mine, "x": 1})
    update_block(adapter, "calibration", {"scale": 0.5})  # without an id of its own: eval.json's counts
    update_block(adapter, "lm_eval", {"adapter_id": "sha256:other"})
    update_eval(adapter, {"format": 1, "suite": "people", "adapter_id": mine})
    stored = read_adapter(adapter).eval or {}
    assert stored["suite"] == "people" and stored["attacks"]["x"] == 1 and stored["calibration"] == {"scale": 0.5}
    assert "lm_eval" not in stored
    update_eval(adapter, {**stored, "attacks": {"adapter_id": mine, "x": 2}})
    assert (read_adapter(adapter).eval or {})["attacks"]["x"] == 2


def test_an_adapter_without_eval_json_gets_one(here):
    adapter = here / "adapter"
    (adapter / "eval.json").unlink(missing_ok=True)
    update_block(adapter, "attacks", {"x": 1})
    stored = read_adapter(adapter).eval or {}
    assert stored["attacks"] == {"x": 1} and stored["adapter_id"] == read_adapter(adapter).adapter_id
    update_eval(adapter, {"format": 1})
    assert (read_adapter(adapter).eval or {})["attacks"] == {"x": 1}
