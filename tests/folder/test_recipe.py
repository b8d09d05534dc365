"""Recipes mean what they look like."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from peft_unlearn.errors import UserError
from peft_unlearn.folder.recipe import apply_overrides, dump_recipe, load_recipe, parse_recipe, portable_recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("-2e+3", -2000.0), ("1.0e-3", 1e-3), (".5", 0.5), ("1.", 1.0), ("3", 3), ("010", 10),
        ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("'1e-3'", "1e-3"),
        ("true", True), ("null", None), ("~", None), ("", None), ("0x1F", 31), ("1e", "1e"), ("all-linear", "all-linear"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    got = parse_recipe(f"train: {{x: {text}}}")["train"]["x"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bse: x", "unknown key 'bse'. Did you mean 'base'"),
        ("base: x\nbase: y", "line 2, column 1: the key 'base' is given twice"),
        ("train:\n  lr: 1\n  lr: 2", "line 3, column 3: the key 'lr' is given twice"),
        ("base: &a x\nrule: *a", "aliases"),
        ("base: [", "line 1"),
        ("- 1", "a recipe is a mapping"),
        ("", "found nothing"),
        ("base: !!python/object:os.system x", "could not determine a constructor"),
        ("base: x\n---\nrule: y", "another document"),
        ("? [a]\n: 1", "is not text"),
        ("base: \x00", "special characters"),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        parse_recipe(text, "recipe r.yaml")
    assert message in str(e.value) and "r.yaml" in str(e.value)


def test_every_unknown_key_is_named_at_once() -> None:
    with pytest.raises(UserError, match="2 problems"):
        parse_recipe("bse: 1\ntrian: 2")


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "b.yaml")


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
)
_printable = _scalars.filter(lambda v: not isinstance(v, str) or all(c.isprintable() for c in v))
_values = st.recursive(
    _printable,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
)


@given(_values)
def test_what_is_saved_is_read_back(value: object) -> None:
    text = dump_recipe({"train": value})
    assert parse_recipe(text) == {"train": value}
    yaml.safe_load(text)  # other tools can read it too


def test_text_that_looks_like_a_number_is_quoted_for_both_dialects() -> None:
    for word in ("1e-3", "no", "12:30", "null", "1.5"):
        text = dump_recipe({"name": word})
        assert parse_recipe(text) == yaml.safe_load(text) == {"name": word}


def test_overrides() -> None:
    recipe = {"train": {"max_steps": 3}, "rule": "sum", "terms": None}
    sets = ["train.max_steps=50", "train.learning_rate=1e-3", "terms.forget.npo.beta=.1", "rule=null", "name=a=b"]
    got = apply_overrides(recipe, sets)
    assert got == {
        "train": {"max_steps": 50, "learning_rate": 1e-3},
        "rule": None,
        "terms": {"forget": {"npo": {"beta": 0.1}}},
        "name": "a=b",
    }
    assert recipe == {"train": {"max_steps": 3}, "rule": "sum", "terms": None}
    for text, message in (
        ("x", "expected KEY=VALUE"),
        ("train..x=1", "expected KEY=VALUE"),
        ("trian.x=1", "Did you mean 'train'"),
        ("rule.gru=1", "rule is 'sum', not a section"),
        ("train.x=[", "line 1"),
    ):
        with pytest.raises(UserError, match=message):
            apply_overrides(recipe, [text])


def test_portable_recipe_names_no_machine(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").touch()
    recipe = {
        "base": str(tmp_path), "train": {"output_dir": "/x/y", "max_steps": 3, "callbacks": ["~/a", "b"]},
        "data": {
            "forget": str(tmp_path / "f.jsonl"), "retain": "my/retain.csv", "holdout": "lost.json", "anchor": "forget",
        },
    }  # fmt: skip
    assert portable_recipe(recipe, "local:" + "a" * 12, {"forget": "1" * 64, "retain": "2" * 64}) == {
        "base": "local:aaaaaaaaaaaa",
        "train": {"max_steps": 3, "callbacks": ["b"]},
        "data": {"forget": "sha256:" + "1" * 64, "retain": "sha256:" + "2" * 64, "anchor": "forget"},
    }
    assert portable_recipe({"data": "embedded:people"}, "x")["data"] == "embedded:people"


def test_recipe_and_manifest_load_without_torch() -> None:
    code = """
import sys
import peft_unlearn.folder.manifest, peft_unlearn.folder.recipe
print({"torch", "peft", "transformers"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
