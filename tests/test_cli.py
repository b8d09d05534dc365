"""The command line: results to standard output, mistakes in words with exit code 2, and nothing on disk touched by them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from peft_unlearn import cli
from peft_unlearn.data import embedded
from peft_unlearn.errors import Interrupted

Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")


def recipe(base: Path) -> dict[str, Any]:
    return {
        "name": "test", "base": str(base), "data": {"forget": "forget.jsonl", "retain": "retain.jsonl"},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "no"},
        "seed": 3,
    }  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and data in it, as the current directory."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "forget.jsonl", tiny.rows(4, "f", 1))
    write_rows(tmp_path / "retain.jsonl", tiny.rows(5, "r", 2))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(base)))
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", *argv])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else (0 if e.code is None else 1)
        got = capsys.readouterr()
        return code, got.out, got.err

    return call


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished adapter, made by the command itself."""
    where = tmp_path_factory.mktemp("trained")
    write_rows(where / "forget.jsonl", tiny.rows(4, "f", 1))
    write_rows(where / "retain.jsonl", tiny.rows(5, "r", 2))
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe(base)))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(where)
        m.setattr(sys, "argv", ["peft-unlearn", "train", "recipe.yaml", "--out", "adapter"])
        try:
            cli.main()
        except SystemExit as e:
            assert not e.code
    return where / "adapter"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def one_line(text: str) -> str:
    return " ".join(text.split())


# --- what a recipe, data or base can be wrong in ------------------------------------------------------------------


def change(**changes: Any) -> Callable[[Path], None]:
    """A recipe with other values; None takes a key away."""

    def edit(folder: Path) -> None:
        whole = {**yaml.safe_load((folder / "recipe.yaml").read_text()), **changes}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))

    return edit


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def rows(name: str, content: list[Any]) -> Callable[[Path], None]:
    return lambda folder: write_rows(folder / name, content)


def data(**sets: Any) -> Callable[[Path], None]:
    return change(data={"forget": "forget.jsonl", "retain": "retain.jsonl", **sets})


QA = {"question": "q", "answer": "a"}
TRAIN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "recipe is missing": (lambda f: (f / "recipe.yaml").unlink(), "recipe recipe.yaml: no such file"),
    "recipe is no YAML": (text("recipe.yaml", "terms: {forget: [\n"), "recipe.yaml: line 2, column"),
    "recipe is empty": (text("recipe.yaml", ""), "a recipe is a mapping"),
    "recipe is not UTF-8": (text("recipe.yaml", b"name: \xff\n"), "not UTF-8"),
    "key given twice": (text("recipe.yaml", "seed: 1\nseed: 2\n"), "the key 'seed' is given twice"),
    "unknown key": (change(termz={}), "unknown key 'termz'. Did you mean 'terms'?"),
    "unknown objective": (change(terms={"forget": {"npoo": {}}}), "no objective 'npoo'. Did you mean 'npo'?"),
    "out of range": (change(terms={"forget": {"npo": {"beta": -1}}}), "beta=-1 is outside (0, inf)"),
    "terms missing": (change(terms=None), "terms are missing"),
    "unknown train key": (change(train={"learning_rte": 1}), "no 'learning_rte'. Did you mean 'learning_rate'?"),
    "train is a number": (change(train=5), "train is a section with keys"),
    "learning rate is text": (change(train={"learning_rate": "fast"}), "learning_rate must be a number, not 'fast'"),
    "unknown rule": (change(rule="summ"), "no rule 'summ'. Did you mean 'sum'?"),
    "rule without its gradient": (change(rule="ngdiff", terms={"forget": {"ga": {}}}), "rule 'ngdiff' needs the gradient"),
    "unknown reference": (change(reference="after"), "reference='after' is not one of before"),
    "precomputed is not enough": (
        change(reference="precomputed", terms={"forget": {"representation_retention": {"layer": 0}}}),
        "representation_retention need its inner layers",
    ),
    "unknown adapter type": (change(adapter={"type": "lorra"}), "no PEFT type. Did you mean 'lora'?"),
    "refused adapter type": (change(adapter={"type": "prefix_tuning"}), "prefix_tuning is refused: it works through"),
    "adapter is a list": (change(adapter=[1]), "adapter: settings are a mapping"),
    "adapter matches nothing": (change(adapter={"target_modules": ["nothing"]}), "nothing"),
    "best without evaluation": (change(eval={"keep_best": True}), "say every how many steps to evaluate"),
    "forget file missing": (lambda f: (f / "forget.jsonl").unlink(), "forget.jsonl: no such file"),
    "forget file empty": (text("forget.jsonl", "\n"), "forget.jsonl: holds no rows"),
    "broken line": (text("forget.jsonl", '{"question": "a", "answer": "b"}\n{"que'), "forget.jsonl: line 2 is not valid JSON"),
    "field missing": (rows("retain.jsonl", [QA, {"question": "x"}]), "retain.jsonl: line 2 has fields 'question'; wanted one of"),
    "field not text": (rows("retain.jsonl", [QA, {"question": "x", "answer": 5}]), "retain.jsonl: line 2 field 'answer' is int"),
    "answer empty": (rows("forget.jsonl", [{"question": "x", "answer": " "}]), "line 1 field 'answer' is empty"),
    "overlap": (rows("retain.jsonl", tiny.rows(4, "f", 1)), "4 example(s) stand in the forget set and in the retain set"),
    "row too long": (data(max_length=8), "has 18 tokens, more than max_length 8"),
    "row without targets": (data(max_length=12, on_overflow="truncate"), "which leaves no target within max_length 12"),
    "unknown overflow": (data(on_overflow="wrap"), "on_overflow='wrap' is not one of error, truncate, chunk"),
    "unknown template": (data(template="chatml"), "template 'chatml' is not one of qa, chat"),
    "no chat template": (data(template="chat"), "the tokenizer has no chat template"),
    "unknown Hub id": (data(retain="no-one/nothing-here"), "no-one/nothing-here: could not be loaded from the Hub"),
    "unknown suffix": (data(retain="recipe.yaml"), "recipe.yaml: unknown kind of file '.yaml'"),
    "ragged csv": (
        lambda f: (text("r.csv", "question,answer\na,b\nc\n")(f), data(retain="r.csv")(f)),
        "r.csv: line 3 has not as many columns as the header",
    ),
    "not UTF-8": (text("retain.jsonl", b'{"question": "\xff"}'), "retain.jsonl: is not UTF-8 text (byte 14)"),
    "broken parquet": (
        lambda f: (text("r.parquet", "x")(f), data(retain="r.parquet")(f)), "r.parquet: is not a readable parquet file"
    ),
    "unknown set": (data(retian="retain.jsonl"), "there is no set 'retian'. Did you mean 'retain'?"),
    "retain missing": (change(data={"forget": "forget.jsonl"}), "retain"),
    "folder without forget": (change(data="."), None),  # type: ignore[dict-item]  # filled in below
    "data by hash alone": (data(forget="sha256:" + "0" * 64), "say where the files are with --data"),
    "unknown embedded data": (change(data="embedded:peple"), "no embedded model or data set 'peple'. Did you mean 'people'?"),
    "no data": (change(data=None), "no data are named"),
    "base is nowhere": (change(base="./nowhere"), "no such folder"),
    "base is no model": (change(base="."), "this folder holds no model (no config.json)"),
    "base by digest": (change(base="local:0123456789ab"), "say where it is with --base"),
    "no base": (change(base=None), "--base"),
    "out is somebody's folder": (lambda f: ((f / "out").mkdir(), (f / "out" / "letter.txt").write_text("dear")), "out"),
    "out is a file": (text("out", "dear"), "out"),
}  # fmt: skip
TRAIN["folder without forget"] = (
    lambda f: ((f / "forget.jsonl").unlink(), change(data=".")(f)), "holds no forget file (forget.jsonl, forget.json"
)  # fmt: skip


@pytest.mark.parametrize("case", TRAIN)
def test_malformed_input_of_train(here, run, case):
    edit, message = TRAIN[case]
    edit(here)
    before = tree(here)
    code, out, err = run("train", "recipe.yaml", "--out", "out")
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") or "\nerror: " in err
    assert message in one_line(err)
    assert "Traceback" not in err and "adapted:" not in err  # nothing was trained first
    assert tree(here) == before


def test_several_mistakes_are_told_at_once(here, run):
    change(rule="summ", reference="x", train={"lr": 1}, adapter={"rank": 2})(here)
    code, _, err = run("train", "recipe.yaml", "--out", "out")
    assert code == 2
    for part in ("no rule 'summ'", "reference='x'", "no 'lr'", "lora has no 'rank'"):
        assert part in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--set", "train.max_steps"), "expected KEY=VALUE"),
        (("--set", "trian.max_steps=3"), "unknown key 'trian'. Did you mean 'train'?"),
        (("--set", "seed.x=3"), "seed is 3, not a section"),
        (("--set", "terms.forget.npo.beta=[1"), "--set terms.forget.npo.beta=[1: line 1"),
        (("--resume",), "holds no whole checkpoint to resume from"),
        (("--base", "nowhere/at/all"), "no such folder"),
        (("--data", "nowhere"), "nowhere is no folder"),
    ],
    ids=str,
)
def test_wrong_flags_of_train(here, run, argv, message):
    before = tree(here)
    code, out, err = run("train", "recipe.yaml", "--out", "out", *argv)
    assert (code, out) == (2, ""), err
    assert message in one_line(err) and "Traceback" not in err
    assert tree(here) == before


# --- what an adapter's folder can be wrong in ---------------------------------------------------------------------


def _other_base(folder: Path) -> None:
    tiny.llama(seed=8).save_pretrained(folder / "other")
    tiny.tokenizer().save_pretrained(folder / "other")


def _cut(folder: Path) -> None:
    weights = folder / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    (folder / "a" / "adapter_model.safetensors").rename(folder / "a" / "adapter_model.bin")


FOLDER: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], str]] = {
    "no such folder": (lambda f: None, ("remove", "nowhere", "--base", "BASE"), "nowhere: no such folder"),
    "base not named": (lambda f: None, ("remove", "a"), "say where it is with --base FOLDER"),
    "wrong base": (_other_base, ("merge", "a", "--out", "m", "--base", "other"), "base"),
    "weights cut short": (_cut, ("merge", "a", "--out", "m", "--base", "BASE"), "adapter_model.safetensors"),
    "weights pickled": (_pickled, ("merge", "a", "--out", "m", "--base", "BASE"), "pickled (adapter_model.bin)"),
    "manifest missing": (lambda f: (f / "a/forget.json").unlink(), ("remove", "a", "--base", "BASE"), "without forget.json"),
    "manifest no JSON": (text("a/forget.json", "{"), ("remove", "a", "--base", "BASE"), "forget.json"),
    "unknown dtype": (lambda f: None, ("merge", "a", "--out", "m", "--base", "BASE", "--dtype", "int3"), "int3"),
    "other forget set": (rows("forget.jsonl", [QA]), ("eval", "a", "--base", "BASE", "--data", "."), "other sha256"),
    "eval without data": (lambda f: None, ("eval", "a", "--base", "BASE"), "--data"),
    "unknown suite": (lambda f: None, ("eval", "a", "--base", "BASE", "--data", ".", "--suite", "peple"), "peple"),
    "eval of nothing": (lambda f: None, ("eval", "nowhere"), "nowhere: no such folder"),
    "unknown kind": (lambda f: None, ("methods", "objectiv"), "no kind 'objectiv'. Did you mean 'objective'?"),
    "unknown embedded base": (lambda f: None, ("base", "path", "peple"), "'peple'. Did you mean 'people'?"),
    "plan of nothing": (lambda f: None, ("plan", "nowhere.yaml"), "recipe nowhere.yaml: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER)
def test_malformed_input_of_other_commands(here, run, base, adapter, case):
    edit, argv, message = FOLDER[case]
    shutil.copytree(adapter, here / "a")
    edit(here)
    before = tree(here)
    code, out, err = run(*(str(base) if a == "BASE" else a for a in argv))
    assert (code, out) == (2, ""), err
    assert message in one_line(err) and "Traceback" not in err
    assert tree(here) == before


def test_usage_errors(run):
    for argv in (
        ("train",),
        ("trian", "x"),
        ("merge", "a"),
        ("eval",),
        ("eval", "a", "--n", "0"),
        ("demo", "--seed", "-1"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and err, argv


# --- what works ---------------------------------------------------------------------------------------------------


def test_train_writes_an_adapter_and_says_where(here, run, adapter):
    before = tree(here)
    code, out, err = run("train", "recipe.yaml", "--out", "got", "--set", "train.max_steps=2")
    assert code == 0, err
    assert out == "got\n"
    assert "adapted: q_proj x2, v_proj x2" in err and "rows: forget 4, retain 5; 2 forget rows per step; 2 steps" in err
    after = tree(here)
    assert {k: v for k, v in after.items() if not k.startswith("got")} == before
    files = {p.name for p in (here / "got").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "forget.json", "recipe.yaml", "README.md"} <= files
    # the same recipe, seed and data give the same bytes
    assert after["got/adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    manifest = json.loads(after["got/forget.json"])
    assert manifest["method"]["terms"]["forget"]["npo"]["beta"] == 0.5 and manifest["data"]["forget"]["n"] == 4
    assert str(here) not in after["got/forget.json"].decode() + after["got/recipe.yaml"].decode()


def test_an_adapter_already_there_is_replaced_only_when_done(here, run, adapter):
    shutil.copytree(adapter, here / "out")
    kept = tree(here / "out")
    rows("forget.jsonl", [])(here)
    assert run("train", "recipe.yaml", "--out", "out")[0] == 2
    assert tree(here / "out") == kept
    write_rows(here / "forget.jsonl", tiny.rows(4, "f", 1))
    code, _, err = run("train", "recipe.yaml", "--out", "out", "--set", "seed=4")
    assert code == 0, err
    assert tree(here / "out") != kept


def test_json_is_all_there_is_on_standard_output(here, run, base, adapter):
    code, out, err = run("methods", "--json")
    assert code == 0 and {m["name"] for m in json.loads(out)} >= {"ga", "npo", "simnpo", "nll", "kl", "sum"}, err
    code, out, err = run("plan", "recipe.yaml", "--json")
    found = json.loads(out)
    assert code == 0 and found["steps"] == 2 and found["rows"] == {"forget": 4, "retain": 5}, err
    assert found["trainable"] == 2 * (2 * (32 + 32) + 2 * (32 + 16)) and found["total_bytes"] > found["base_bytes"] > 0
    code, out, err = run("remove", str(adapter), "--base", str(base), "--json")
    assert code == 0 and isinstance(json.loads(out), dict), err
    code, out, err = run("merge", str(adapter), "--base", str(base), "--out", "merged", "--json")
    assert code == 0 and isinstance(json.loads(out), dict) and (here / "merged" / "config.json").is_file(), err


def test_base_path(run, monkeypatch):
    from peft_unlearn.data import embedded

    monkeypatch.setattr(embedded, "asset", lambda *parts: Path("/somewhere", *parts))
    assert run("base", "path")[1] == "/somewhere/bases/people\n"
    assert run("base", "path", "--twin")[1] == "/somewhere/bases/people-retain\n"


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 3), (Interrupted("disk full"), 3), (BrokenPipeError(32, "pipe"), 3)]
)
def test_exit_codes_of_what_is_no_mistake(here, run, monkeypatch, raised, code):
    from peft_unlearn.training import train as room

    def fails(*a: Any, **k: Any) -> None:
        raise raised

    monkeypatch.setattr(room, "train", fails)
    stderr = sys.stderr
    got = run("train", "recipe.yaml")
    monkeypatch.setattr(sys, "stderr", stderr)
    assert got[0] == code and got[1] == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ZeroDivisionError(), 4, "did not expect (ZeroDivisionError)"),
        (KeyError("x"), 4, "did not expect (KeyError: 'x')"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "/data/x: the system refused it (Permission denied)"),
        (OSError(28, "No space left on device"), 2, "the system refused it (No space left on device)"),
        (
            ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes"),
            2,
            "needs the library bitsandbytes",
        ),
        (MemoryError(), 3, "out of memory"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "",
)
@pytest.mark.parametrize("place", ["cache", "temporary", "nowhere", "shown"])
def test_what_nobody_expected_is_a_sentence_and_its_traceback_a_file(
    here, run, monkeypatch, tmp_path_factory, error, code, message, place
):
    """A defect keeps its traceback; whose terminal is it to fill?"""
    import tempfile

    from peft_unlearn.training import train as room

    def fails(*a: Any, **k: Any) -> None:
        raise error

    monkeypatch.setattr(room, "train", fails)
    there = tmp_path_factory.mktemp("there")
    (there / "file").touch()
    monkeypatch.setenv("PEFT_UNLEARN_CACHE", str(there / ("cache" if place == "cache" else "file/no")))
    monkeypatch.setattr(tempfile, "tempdir", str(there / ("tmp" if place == "temporary" else "file/no")))
    if place == "shown":
        monkeypatch.setenv("PEFT_UNLEARN_TRACEBACK", "1")
        with pytest.raises(type(error)):
            run("train", "recipe.yaml")
        return
    for _ in range(2):
        got, out, err = run("train", "recipe.yaml")
        assert (got, out) == (code, "") and message in one_line(err) and "Traceback" not in err and err.count("\n") == 1
    logs = list(there.rglob("error-*.log"))
    assert len(logs) == (0 if place == "nowhere" else 2)
    for log in logs:
        assert (
            log.stat().st_mode & 0o777 == 0o600
            and "Traceback" in log.read_text()
            and "train recipe.yaml" in log.read_text()
        )
    assert any(str(log) in err for log in logs) or place == "nowhere"


def test_plan_shows_the_one_copy_of_base_weights(capsys, monkeypatch):
    """Smoothing in space base keeps the weights under adapters in host memory; nothing else copies the base."""
    recipe = str(embedded.asset("recipes", "people-npo-sam.yaml"))
    seen = []
    for space in ("adapter", "base"):
        monkeypatch.setattr(
            "sys.argv", ["peft-unlearn", "plan", recipe, "--json", "--set", f"smoothing.sam.space={space}"]
        )
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
        seen.append(json.loads(capsys.readouterr().out))
    assert seen[0]["host_copy_bytes"] == 0
    assert 0 < seen[1]["host_copy_bytes"] <= seen[1]["base_bytes"]
    assert seen[1]["total_bytes"] - seen[0]["total_bytes"] == seen[1]["host_copy_bytes"]


@pytest.mark.parametrize("how", ["raise ImportError('no such thing\\n in line 2')", "raise SystemExit(3)", "def ("])
def test_a_broken_plug_in_costs_its_own_methods_only(run, tmp_path, monkeypatch, how):
    import importlib.metadata as metadata

    from peft_unlearn import registry
    from peft_unlearn.errors import UserError

    (tmp_path / "broken_plugin.py").write_text(how)
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [metadata.EntryPoint("mine", "broken_plugin", "peft_unlearn.plugins")]
    monkeypatch.setattr(metadata, "entry_points", lambda **_: points)
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "_BROKEN", {})
    registry._load_plugins.cache_clear()
    with pytest.warns(UserWarning, match=r"plug-in mine \(broken_plugin\) cannot be loaded"):
        code, out, _ = run("methods", "objective")
    assert code == 0 and "npo" in out
    with pytest.raises(UserError, match="The plug-in mine could not be loaded"):
        registry.get("objective", "theirs")
    registry._load_plugins.cache_clear()
