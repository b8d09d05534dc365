"""`forget` from end to end on the embedded base, and how its search decides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.evaluate import evaluate
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.request.forget import forget
from peft_unlearn.request.settings import Settings, preset, recipe_for

FAST = Settings(learning_rate=3e-3, steps=20, first_layer=0.0)


@pytest.fixture(scope="module")
def people() -> ForgetRetain:
    return ForgetRetain.load("embedded:people")


@pytest.fixture(scope="module")
def files(people: ForgetRetain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    about = [r for r in people.forget if r["subject"] == people.forget[0]["subject"]][:3]
    for name, rows in (("forget", about), ("retain", people.retain[:24])):
        kept = ({k: r[k] for k in ("question", "answer", "value", "subject") if k in r} for r in rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    return folder


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("out") / "F"
    lines: list[str] = []
    found = forget(
        base="embedded:people", file=files / "forget.jsonl", retain=files / "retain.jsonl", out=out, budget="4m", settings=FAST,
        log=lines.append,
    )  # fmt: skip
    return found, out, lines


def test_the_values_are_no_longer_named(done) -> None:
    found, out, lines = done
    assert found.before["forget"] >= 0.9 and found.after["forget"] <= 0.1
    assert len(found.facts) == 3 and found.path == str(out)
    assert found.exit_code == (1 if found.lacking else 0) and found.verdict() in str(found)
    assert all(b != a for _, b, a in found.answers)
    assert any("target: " in line for line in lines) and any("step " in line for line in lines)


def test_the_folder_is_an_adapter_with_its_numbers_and_nothing_private(done, files: Path) -> None:
    found, out, _ = done
    folder = read_adapter(out)
    numbers = json.loads((out / "eval.json").read_text())
    assert numbers["suite"] == "own" and numbers["adapter_id"] == folder.adapter_id
    assert numbers["subjects"]["adapter"]["forget/value_accuracy"] == found.after["forget"]
    texts = "".join(
        p.read_text("utf-8")
        for p in out.iterdir()
        if p.suffix in (".md", ".json", ".yaml") and p.name != "tokenizer.json"
    )
    for question, value in found.facts:
        assert question not in texts
        assert (
            re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", texts) is None
        )  # a year may stand among a number's digits
    assert set(folder.manifest.data) >= {"forget", "general", "kept"}
    work = out.with_name("F.work")
    assert {p.stem for p in (work / "data").iterdir()} >= {"forget", "general", "kept"}
    assert json.loads((work / "trials.json").read_text())["trials"][0]["judged"]


def test_eval_finds_the_rows_beside_the_adapter(done) -> None:
    found, out, _ = done
    report = evaluate([out], write=False)
    assert report.subjects["adapter"] is not None
    assert report.subjects["adapter"]["forget/value_accuracy"] == pytest.approx(found.after["forget"])


def test_prepared_rows_can_be_edited_and_used(files: Path, tmp_path: Path) -> None:
    first = forget(
        base="embedded:people", file=files / "forget.jsonl", out=tmp_path / "P", prepare_only=True, log=lambda _: None
    )
    data = tmp_path / "P.work" / "data"
    assert first.path is None and first.exit_code == 0 and "--file" in str(first) and not (tmp_path / "P").exists()
    rows = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()][:1]
    (data / "forget.jsonl").write_text(json.dumps(rows[0]) + "\n")
    again = forget(base="embedded:people", file=data, out=tmp_path / "Q", prepare_only=True, log=lambda _: None)
    assert again.rows["forget"] == 1 and again.facts == [(rows[0]["question"], rows[0]["value"])]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "say what is to be forgotten"),
        ({"questions": "Q?", "file": "x.jsonl"}, "not both"),
        ({"questions": ["A?", "B?"], "value": "x"}, "--value belongs to a single question"),
        ({"file": ".", "retain": "r.jsonl"}, "--retain belongs to making rows"),
        ({"questions": "Q?", "budget": "soon"}, "--budget soon"),
        ({"questions": "Q?", "budget": "0m"}, "--budget 0m"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(given, why, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        forget(**given, base="embedded:people", out=tmp_path / "F", log=lambda _: None)
    assert not (tmp_path / "F").exists()


def test_a_budget_that_is_too_small_says_what_is_needed(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one step takes .* at least \d+ s more"):
        forget(
            base="embedded:people", file=files / "forget.jsonl", out=tmp_path / "F", budget="0.1s", log=lambda _: None
        )
    assert not (tmp_path / "F").exists()


def test_settings_become_a_recipe_that_train_understands(people: ForgetRetain) -> None:
    from peft_unlearn.training.recipe import from_recipe

    _, start = preset(500_000_000)
    made = recipe_for(
        start, base="B", data="D", template="chat", sets={"forget": 6, "retain": 20, "general": 80}, blocks=24
    )
    config = from_recipe(made, "out")
    assert made["adapter"]["layers_to_transform"] == list(range(10, 24))
    assert config.sets == ["forget", "general", "retain"] and config.rows_per_step == 6
    assert made["data"]["target"] == "value"
