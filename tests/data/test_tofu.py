"""TOFU's own layout: which files make which set, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_unlearn.data import tofu
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError


def rows(kind: str, n: int) -> list[dict[str, Any]]:
    return [
        {"question": f"What did {kind} author number {i} write?", "answer": f"{kind} {i} wrote book {i}."}
        for i in range(n)
    ]


def perturbed(plain: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "paraphrased_answer": "A book.", "perturbed_answer": ["A song.", "A poem."]} for r in plain]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    forget, retain = rows("old", 4), rows("kept", 9)
    files = {
        "forget10": forget, "forget10_perturbed": perturbed(forget), "retain90": retain,
        "retain_perturbed": perturbed(retain[:3]), "holdout10": rows("nobody", 5),
        "real_authors_perturbed": perturbed(rows("real", 2)), "forget01": forget[-1:], "retain99": retain + forget[:-1],
    }  # fmt: skip
    for name, found in files.items():
        write(tmp_path / f"{name}.jsonl", found)
    return tmp_path


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")


def test_a_folder_with_its_file_names_is_a_bundle(folder: Path) -> None:
    got = ForgetRetain.load(str(folder))
    assert [len(got.forget), len(got.retain or ()), len(got.holdout or ())] == [4, 9, 5]
    assert "perturbed_answer" in got.forget[0] and set(got.extra) == {"retain_perturbed", "real_authors"}
    # the wrong answers beside the rows do not change what is forgotten
    assert got.sha256["forget"] == ForgetRetain(rows("old", 4)).sha256["forget"]
    small = ForgetRetain.load(f"{folder}?split=forget01")
    assert len(small.forget) == 1 and len(small.retain or ()) == 12 and len(small.holdout or ()) == 1
    assert small.sha256["forget"] != got.sha256["forget"]


def test_other_copies_call_the_fields_prompt_and_response(folder: Path) -> None:
    wanted = ForgetRetain.load(str(folder)).sha256
    write(folder / "forget10.jsonl", [{"prompt": r["question"], "response": r["answer"]} for r in rows("old", 4)])
    assert ForgetRetain.load(str(folder)).sha256 == wanted


def test_forget_rows_in_the_retain_file_are_refused_with_their_numbers(folder: Path) -> None:
    write(folder / "retain90.jsonl", [*rows("kept", 9), *rows("old", 4)[1:3]])
    with pytest.raises(
        UserError, match=r"2 example\(s\) stand in the forget set and in the retain set \(retain rows 9, 10\)"
    ):
        ForgetRetain.load(str(folder))


def test_perturbed_rows_of_other_questions_are_refused(folder: Path) -> None:
    write(folder / "forget10_perturbed.jsonl", perturbed(rows("old", 4)[::-1]))
    with pytest.raises(UserError, match=r"4 rows differ, first row 0"):
        ForgetRetain.load(str(folder))
    write(folder / "forget10_perturbed.jsonl", perturbed(rows("old", 3)))
    with pytest.raises(UserError, match="4 and 3 rows"):
        ForgetRetain.load(str(folder))


def test_what_is_not_tofu_is_left_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean 'forget10'"):
        ForgetRetain.load(f"{folder}?split=forget1")
    with pytest.raises(UserError, match="no forget05"):
        ForgetRetain.load(f"{folder}?split=forget05")
    write(folder / "forget.jsonl", rows("own", 2))  # a bundle of its own wins
    assert not tofu.recognizes(folder) and len(ForgetRetain.load(folder).forget) == 2
    assert tofu.recognizes("locuslab/TOFU") and tofu.recognizes("locuslab/TOFU@abc?split=forget01")
    assert not tofu.recognizes("owner/other") and not tofu.recognizes(tmp_path / "nowhere")


def test_the_hub_is_asked_for_its_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    forget, asked = rows("old", 3), []

    def load_dataset(repo: str, name: str, revision: Any = None, split: str = "") -> Any:
        asked.append((repo, name, revision, split))
        found = perturbed(forget) if name.endswith("_perturbed") and name.startswith("forget") else rows(name, 3)
        return forget if name == "forget01" else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = ForgetRetain.load("locuslab/TOFU@abc?split=forget01")
    assert "perturbed_answer" in got.forget[0] and got.refs["forget"] == "locuslab/TOFU@abc?split=forget01"
    assert ("locuslab/TOFU", "retain99", "abc", "train") in asked and (
        "locuslab/TOFU",
        "holdout01",
        "abc",
        "train",
    ) in asked
    assert set(got.extra) == {"retain_perturbed", "real_authors", "world_facts"}


def test_the_real_files() -> None:
    where = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu"
    if not where.is_dir():
        pytest.skip("shared/data/tofu is not there")
    got = ForgetRetain.load(str(where))
    assert [len(got.forget), len(got.retain or ()), len(got.holdout or ())] == [400, 3600, 400]
    assert {k: len(v) for k, v in got.extra.items()} == {
        "retain_perturbed": 400,
        "real_authors": 100,
        "world_facts": 117,
    }
    assert all(len(r["perturbed_answer"]) == 5 and r["paraphrased_answer"] for r in got.forget)
