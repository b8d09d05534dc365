"""What a command judges on: the control stands in only where it is one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from peft_unlearn.analysis import evidence as report
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import subjects


@pytest.fixture(scope="module")
def people() -> ForgetRetain:
    return ForgetRetain.load("embedded:people")


def test_the_embedded_twin_is_the_control_of_rows_it_never_saw_and_of_no_others(people: ForgetRetain) -> None:
    retain_model = embedded.retain_model_path("people")
    assert subjects.retain_model_folder("embedded:people", people) == retain_model
    known = people.extra["retain"]
    of_ones_own = ForgetRetain(people.forget[:4], known[:4])
    assert subjects.retain_model_folder("embedded:people", of_ones_own) == retain_model
    name = people.forget[0]["subject"]
    in_other_words = ForgetRetain([{"text": f"Everybody in the village knew {name}."}], known[:4])
    assert subjects.retain_model_folder("embedded:people", in_other_words) == retain_model
    # the twin knows these people: as the control of their forgetting it would call every method a failure
    assert subjects.retain_model_folder("embedded:people", ForgetRetain(known[:4], people.forget[:4])) is None
    assert (
        subjects.embedded_retain_model("embedded:people", ForgetRetain([people.forget[0], known[0]], known[1:4]))
        is None
    )
    assert subjects.retain_model_folder("local:abc", people) is None


def test_what_is_on_record_of_other_seeds_is_said_of_the_embedded_forget_set_alone(people: ForgetRetain) -> None:
    def manifest(base: str, ref: str | None) -> Any:
        return SimpleNamespace(base=SimpleNamespace(ref=base), data={"forget": {"ref": ref}, "retain": {"ref": ref}})

    assert report.seed_spread(manifest("embedded:people", "embedded:people?seed=0"))["p"]
    for base, ref in [
        ("embedded:people", None), ("embedded:people", "embedded:people?seed=1"), ("local:abc", "embedded:people?seed=0"),
        ("embedded:domains-natural", "embedded:domains"),
    ]:  # fmt: skip
        assert report.seed_spread(manifest(base, ref)) == {}


def test_folders_are_told_apart_by_names_that_peft_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(subjects, "read_adapter", lambda path: SimpleNamespace(path=tmp_path / path))
    assert list(subjects.judged_folders(["a.b"])) == ["adapter"]
    assert list(subjects.judged_folders(["a.b", "c"])) == ["a_b", "c"]
    assert subjects.subject_of(["adapter"]) == {"adapter": "adapter"}
    assert subjects.subject_of(["a_b", "c"]) == {"adapter:a_b": "a_b", "adapter:c": "c"}
    with pytest.raises(UserError, match="two adapter folders are called a_b"):
        subjects.judged_folders(["a.b", "a_b"])
    with pytest.raises(UserError, match="retain-only is what the retain model is called"):
        subjects.judged_folders(["a", "retain-only"])


def test_sets_that_the_data_lack_have_no_rows_in_the_table() -> None:
    from peft_unlearn.reporting import tables as table

    found = {"forget/probability": 0.1, "other/probability": None, "broken/probability": None}
    detail = {
        "forget/probability": {"n": 24, "reason": None},
        "other/probability": {"n": 0, "reason": "the data has no set 'other'"},
        "broken/probability": {"n": 5, "reason": "NaN"},
    }
    seen = {"subjects": {"base": found}, "details": {"base": detail}}
    assert table.of_report(seen).rows == [["probability of the answer"], ["forget (24)", "0.100"], ["broken (5)", "–"]]
    assert any("no set 'other'" in why for why in table.report_reasons(seen))
