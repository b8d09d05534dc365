"""One reader of YAML for every file: a stranger's file cannot unfold without bound, and no program reads a value otherwise."""

from pathlib import Path

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.folder import yaml_io
from peft_unlearn.folder.card import split
from peft_unlearn.folder.yaml_io import dump_yaml, parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_a_bomb_is_refused() -> None:
    with pytest.raises(UserError, match=r"f: line 1.*aliases"):
        parse_yaml("*a", "f")
    with pytest.raises(UserError, match=r"f: line \d, column \d+: more than 200,000 values"):
        parse_yaml(BOMB, "f", aliases=True)
    with pytest.raises(UserError, match="inside the value that it names"):
        parse_yaml("a: &a [*a]", "f", aliases=True)
    with pytest.raises(UserError, match="nested too deeply"):
        parse_yaml("[" * 5000, "f")


def test_aliases_and_defaults_where_they_are_allowed() -> None:
    text = "d: &d {x: 1, y: 2}\ne: {<<: *d, y: 3}\nf: [*d, *d]\n"
    d = {"x": 1, "y": 2}
    assert parse_yaml(text, "f", aliases=True) == {"d": d, "e": {"x": 1, "y": 3}, "f": [d, d]}
    with pytest.raises(UserError, match="<< wants a mapping"):
        parse_yaml("a: {<<: 3}", "f", aliases=True)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("a: 1e-1\nb:\n  c: 1\n  c: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"f\.yaml: line 4, column 3: the key 'c' is given twice"):
        read_yaml(file)
    monkeypatch.setattr(yaml_io, "MAX_CHARACTERS", 10)
    with pytest.raises(UserError, match=r"f\.yaml: YAML of more than 10 characters"):
        read_yaml(file)
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "no.yaml", "no such file")):
        with pytest.raises(UserError, match=message):
            read_yaml(path)


def test_foreign_tags_are_read_as_nothing_where_they_are_allowed() -> None:
    assert parse_yaml("a: !function f.g\nb: 1", "f", tags=True) == {"a": None, "b": 1}
    for text in ("a: !function f.g", "a: !!python/object/apply:os.abort []"):
        with pytest.raises(UserError, match="could not determine a constructor"):
            parse_yaml(text, "f", tags="python" in text)


def test_every_file_reads_a_number_as_a_number(tmp_path: Path) -> None:
    from peft_unlearn.analysis.effect_of_run import parse_objectives
    from peft_unlearn.attacks.jailbreak import templates
    from peft_unlearn.evaluation import suites

    assert parse_objectives("{ga: {weight: 1e-1}}")["ga"][0].weight == 0.1
    suite = tmp_path / "s.yaml"
    suite.write_text(
        "format: 1\nsets:\n  forget:\n    role: forget\n    metrics: [probability]\n"
        "    measurable_if: {subject: base, metric: probability, at_least: 1e-1}\n",
        encoding="utf-8",
    )
    gate = suites.load(suite).sets["forget"].measurable_if
    assert gate is not None and gate.at_least == 0.1
    tried = tmp_path / "t.yaml"
    tried.write_text("format: 1\ntemplates:\n  - {name: no, family: 12:30, text: '{question}'}\n", encoding="utf-8")
    assert [(t.name, t.family) for t in templates(tried)] == [("no", "12:30")]
    assert split("---\nlanguage: no\nlr: 1e-1\n---\n# x\n")[0] == {"language": "no", "lr": 0.1}


def test_what_is_written_is_read_back() -> None:
    value = {"a": "1e-3", "b": ["no", 0.1, None], "c": {"3": True}}
    for flow in (False, None, True):
        assert parse_yaml(dump_yaml(value, "f", flow=flow), "f") == value
    with pytest.raises(UserError, match="f: holds a value that YAML cannot"):
        dump_yaml({"a": object()}, "f")
