"""`peft-unlearn attribute`: files that say where they come from, and nothing of anybody's overwritten."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from peft_unlearn import attribute, cli
from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.reporting.figure import PNG_MARK
from peft_unlearn.tuners.selection import Selection


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, n, seed in (("forget", 4, 1), ("retain", 5, 2)):
        text = "\n".join(json.dumps(r) for r in tiny.rows(n, name[0], seed))
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, data: Path
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(data.parent)

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", "attribute", "--base", str(base), "--data", str(data), *argv])
        with pytest.raises(SystemExit) as left:
            cli.main()
        got = capsys.readouterr()
        return int(left.value.code or 0), got.out, got.err

    return call


def test_files_tell_where_they_come_from(run: Any, base: Path, data: Path) -> None:
    code, out, err = run("--method", "wagle", "--ratio", "0.01", "--set", "gamma=0.5", "--out", "scores", "--json")
    assert code == 0 and "gradient of nll on retain" in err
    found = json.loads(out)
    assert found == json.loads(Path("scores/selection.json").read_text(encoding="utf-8"))
    kept = Selection.load("scores/selection.safetensors")
    assert kept.count == found["count"] == 184 and found["density"] == pytest.approx(0.01, rel=2e-3)
    assert kept.about["hyper"] == {"gamma": 0.5} and kept.about["base"]["digest"] == digest_checkpoint(base)
    assert sum(c["chosen"] for kinds in found["where"].values() for c in kinds.values()) == 184
    assert list(found["where"]) == ["0", "1"] and list(found["where"]["0"])[:2] == ["q_proj", "k_proj"]
    assert PNG_MARK in Path("scores/selection.png").read_bytes() and str(base) not in out

    code, out, _ = run(
        "--method", "random", "--ratio", "0.02", "--budget", "module", "--target", "q_proj", "--out", "scores"
    )
    assert code == 0 and "random: 40 entries" in out and "block 1   50.0%" in out, "an earlier result is replaced"
    assert Selection.load("scores/selection.safetensors").count == 40


def test_a_selection_is_of_its_base_and_its_data(base: Path, data: Path) -> None:
    from peft_unlearn.data.bundle import ForgetRetain

    found = attribute(str(base), str(data), method="snip", ratio=0.01).selection
    digest, rows = digest_checkpoint(base), ForgetRetain.load(str(data)).sha256
    found.check_origin(digest, rows)
    found.check_origin(digest, {**rows, "retain": "another"})  # which snip did not read
    with pytest.raises(
        UserError, match=r"the base has the digest abc.*the forget rows are others.*peft-unlearn attribute"
    ):
        found.check_origin("abc", {**rows, "forget": "another"})


def test_fewer_rows_of_each_set(base: Path, data: Path) -> None:
    found = attribute(str(base), str(data), method="wagle", ratio=0.01, n=3).selection
    assert found.about["rows"] == {"forget": 3, "retain": 3}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ratio", "0"], "ratio 0.0 must lie in (0, 1]"),
        (["--method", "wagel"], "Did you mean 'wagle'"),
        (["--set", "gama=1"], "no hyper-parameter 'gama'"),
        (["--set", "gamma"], "expected NAME=VALUE"),
        (["--accumulators", "int8"], "expected float32 or bfloat16"),
        (["--dtype", "int8"], "expected auto"),
        (["--target", "w_proj"], "called 'w_proj'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(run: Any, argv: list[str], says: str) -> None:
    code, out, err = run("--out", "new", *argv)
    assert (code, out) == (2, "") and says in err and not Path("new").exists()


def test_files_of_others_stay(run: Any, base: Path) -> None:
    Path("mine").mkdir()
    Path("mine/selection.safetensors").write_bytes(b"not yours")
    for where in ("mine", str(base)):
        code, _, err = run("--method", "random", "--out", where)
        assert code == 2 and ("no earlier result" in err or "in the folder of a model" in err)
    assert Path("mine/selection.safetensors").read_bytes() == b"not yours"
    assert [p.name for p in Path("mine").iterdir()] == ["selection.safetensors"]


def test_dense_selections_are_told_what_they_cost(base: Path, data: Path) -> None:
    with pytest.warns(UserWarning, match=r"20% of the entries were chosen.*as much as a LoRA of rank \d+"):
        attribute(str(base), str(data), method="magnitude", ratio=0.2)
