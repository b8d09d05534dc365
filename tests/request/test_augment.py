"""Rows of a request made on their own, by the base or by another generator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.request.augment import augment

CITIES = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Cuba": "Havana"}


def generate(prompts: list[str], most: int) -> list[str]:
    def answer(p: str) -> str:
        for land, city in CITIES.items():
            if land in p:
                return f"{city}." if "one or two words" in p else f"The capital of {land} is {city}."
            if city in p:
                return f"{city} is the capital of {land}."
        return "Country" if "What kind of thing" in p else "Something else."

    return [answer(p) for p in prompts]


def test_rows_by_another_generator_are_a_bundle(tmp_path: Path) -> None:
    asked: list[int] = []

    def counted(prompts: list[str], most: int) -> list[str]:
        asked.append(len(prompts))
        return generate(prompts, most)

    given = {"base": "embedded:people", "out": tmp_path / "R", "log": lambda _: None}
    made = augment("What is the capital of France?", **given, generate=counted)
    assert made.facts == [("What is the capital of France?", "Paris")] and made.path is None and made.exit_code == 0
    assert str(tmp_path / "R") in made.verdict()
    bundle = ForgetRetain.load(tmp_path / "R")
    assert {"forget", "retain", "general", "wordings"} <= set(bundle.names()) and len(bundle.forget) == made.rows[
        "forget"
    ]
    assert all("Paris" in r["accepted"] or "France" in r["accepted"] for r in bundle.forget)
    asked.clear()
    augment("What is the capital of France?", **given, generate=counted)  # every answer is known by its hash
    assert asked == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "say what is to be forgotten"),
        ({"questions": "Q?", "file": "x.jsonl"}, "not both"),
        ({"file": "."}, "has its rows already"),
        ({"questions": "Q?", "out": "."}, "holds other things than rows"),
    ],
)
def test_bad_input(given, why, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=why):
        augment(base="embedded:people", log=lambda _: None, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_the_base_does_not_know_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to forget"):
        augment(
            "Who wrote Faust?",
            base="embedded:people",
            out=tmp_path / "R",
            value="Goethe",
            generate=generate,
            log=lambda _: None,
        )
    assert not list(tmp_path.glob("R/*.jsonl"))
    json.loads((tmp_path / "R" / "answers.json").read_text())
