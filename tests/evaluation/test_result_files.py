"""Results that cannot be written: said in words, and never at the price of the numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.evaluate import check_out, save_report
from peft_unlearn.evaluation.score import Report
from peft_unlearn.folder.results import check_writable, store, write_file

REPORT = Report(suite="people", subjects={"base": {"forget/probability": 0.5}}, details={"base": {}})


def test_numbers_outlive_a_folder_that_is_read_only(tmp_path: Path) -> None:
    def denied() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.warns(UserWarning, match=r"eval\.json cannot be written \(Permission denied\).*keep what is printed"):
        store(tmp_path, denied)


def test_calibrating_a_read_only_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written into"):
        check_writable(tmp_path)


@pytest.mark.parametrize("layout", ["eval", "open-unlearning"])
def test_a_place_that_cannot_be_written_is_a_message(tmp_path: Path, layout: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        save_report(REPORT, tmp_path / "file" / "x", layout)
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_written_is_whole_and_alone(tmp_path: Path) -> None:
    (path,) = save_report(REPORT, tmp_path / "new" / "folder")
    assert json.loads(path.read_text()) == REPORT.to_dict() and [p.name for p in path.parent.iterdir()] == ["eval.json"]
    with pytest.raises(UserError, match="is a folder"):
        write_file(tmp_path / "new", b"")


@pytest.mark.parametrize("place", ["adapter", "adapter/eval.json", "adapter/part.json"])
def test_numbers_are_not_written_into_an_adapters_folder_beside_its_own(tmp_path: Path, place: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "forget.json").write_text("{}")
    with pytest.raises(UserError, match="in an adapter's folder"):
        check_out(tmp_path / place, "eval")
    check_out(tmp_path / "elsewhere", "eval")
