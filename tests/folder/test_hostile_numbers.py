"""eval.json is a claim: shown only of these weights, in its shape and where such numbers can lie, and as whose it is."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_unlearn import registry
from peft_unlearn.analysis.evidence import report
from peft_unlearn.folder.card import card_of, render, split
from peft_unlearn.folder.card_numbers import headline
from peft_unlearn.folder.eval_json import not_measured_here, parts_of, record_measured, usable
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import update_block, update_eval
from peft_unlearn.reporting.figure import PNG_MARK

ID = "sha256:" + "d" * 64


def evaluation(of: str | None = ID) -> dict[str, Any]:
    number = {"n": 100, "ci95": [0.2, 0.4], "reason": None}
    values = {"forget/extraction_strength": 0.3, "forget/forget_quality": 0.2, "retain/extraction_strength": 0.97}
    ends = {"before": {"value_accuracy": 0.1}, "after": {"value_accuracy": 0.5}}
    base = {"before": {"value_accuracy": 0.9}, "after": {"value_accuracy": 0.9}}
    point = {"scale": 1.0, "forget": {"value": 0.3, **number}, "retain": {"value": 0.9, **number, "ci95": None}}
    return {
        "format": 1, "suite": "people", "subjects": {"base": dict.fromkeys(values, 1.0), "adapter": values, "retain_only": None},
        "details": {"adapter": dict.fromkeys(values, number), "retain_only": {"reason": "not given"}}, "metrics": {}, "versions": {},
        **({"adapter_id": of} if of else {}),
        "attacks": {"format": 1, "attacks": {"relearn": {
            "attack": "relearn", "settings": {"rows": 20}, "n": 80, "subjects": {"base": base, "adapter": ends, "retain_only": None},
            "recovery": {"adapter": {"value_accuracy": {"value": 0.5, "ci95": None, "reason": None}}}, "reasons": {"retain_only": "x"}}}},
        "calibration": {"format": 1, "metric": "extraction_strength", "floor": 0.95, "wanted": 0.9, "scale": 1.0, "chosen": point,
                        "curve": [point], "n": {"forget": 100, "retain": 900}, "reason": None, "monotone": True, "how": "grid"},
    }  # fmt: skip


def test_what_commands_write_is_shown() -> None:
    kept, wrong = usable(evaluation(), ID)
    assert kept == evaluation() and not wrong and usable({}, ID) == usable(None, ID) == ({}, [])


PLACES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "suite": lambda e, v: e["subjects"]["adapter"].update({"forget/forget_quality": v}),
    "suite ": lambda e, v: e["subjects"]["base"].update({"retain/extraction_strength": v}),
    "suite  ": lambda e, v: e["details"]["adapter"].update({"forget/extraction_strength": {"ci95": [0.1, v], "n": 1}}),
    "attacks": lambda e, v: e["attacks"]["attacks"]["relearn"]["subjects"]["adapter"]["after"].update(value_accuracy=v),
    "attacks ": lambda e, v: e["attacks"]["attacks"]["relearn"]["recovery"]["adapter"]["value_accuracy"].update(
        value=v
    ),
    "calibration": lambda e, v: e["calibration"]["curve"][0]["retain"].update(value=v),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [3.0, 7.0, -2, float("nan"), float("inf"), 10**400, "0.5", True, [0.5], {"a": 1}])
def test_a_number_that_cannot_be_is_not_shown_nor_is_its_block(place: str, value: Any) -> None:
    stored, name = evaluation(), place.strip()
    PLACES[place](stored, value)
    kept, wrong = usable(stored, ID)
    assert len(wrong) == 1 and f"the {name} numbers" in wrong[0] and "peft-unlearn" in wrong[0]
    assert ("subjects" if name == "suite" else name) not in kept and len(kept) > 0


def test_a_recovery_beyond_one_is_shown_where_the_values_give_it() -> None:
    stored = evaluation()
    relearn = stored["attacks"]["attacks"]["relearn"]
    relearn["subjects"]["base"]["before"]["value_accuracy"] = 0.2
    relearn["recovery"]["adapter"]["value_accuracy"]["value"] = 4.0
    assert "attacks" in usable(stored, ID)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"subjects": [1]}, {"subjects": {"adapter": 3}}, {"details": {"adapter": {"x": [1]}}}, {"details": 7}, {"metrics": {"a": 1}},
        {"metrics": {"a": {"better": "x"}}}, {"versions": []}, {"suite": {"a": 1}}, {"scale": "1"}, {"scale": {"a": "b"}}, {"base": 4},
        {"attacks": 3}, {"attacks": {"attacks": []}}, {"attacks": {"attacks": {"x": 1}}}, {"attacks": {"attacks": {"x": {"settings": 1}}}},
        {"attacks": {"attacks": {"x": {"n": "many"}}}}, {"attacks": {"attacks": {"x": {"recovery": {"adapter": {"m": 1}}}}}},
        {"attacks": {"attacks": {"x": {"reasons": ["no"]}}}}, {"calibration": {"scale": 1, "curve": []}}, {"calibration": [1]},
        {"calibration": {"scale": "half"}}, {"calibration": {**evaluation()["calibration"], "chosen": None}},
        {"calibration": {**evaluation()["calibration"], "n": {}}}, {"calibration": {**evaluation()["calibration"], "curve": [{}]}},
        {"format": 2}, {"format": None}, {"format": "1"}, {"format": [1]},
    ],
)  # fmt: skip
def test_any_shape_is_a_note_and_never_a_traceback(
    adapter_dir: Path, tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # every picture is made, none is turned into pixels: tests/reporting looks at those
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, out, **_: out.write(PNG_MARK))
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "mine"))
    own = read_adapter(folder).adapter_id
    (folder / "eval.json").write_text(json.dumps({**evaluation(own), **change}))
    found = read_adapter(folder)
    assert usable(found.eval, own)[1]
    assert "ot shown" in render(card_of(found))
    made = report([folder], samples=False)
    made.write(tmp_path / "page.html")
    made.write(tmp_path / "page.md")
    assert any("eval.json" in note for note in made.notes)


@pytest.mark.parametrize("of", [None, "sha256:" + "e" * 64, 7, "mine"])
def test_numbers_of_no_weights_or_of_others_are_shown_nowhere(adapter_dir: Path, tmp_path: Path, of: Any) -> None:
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "mine"))
    stored = copy.deepcopy(evaluation(None))
    (folder / "eval.json").write_text(json.dumps({**stored, **({} if of is None else {"adapter_id": of})}))
    found = read_adapter(folder)
    text = render(card_of(found))
    assert "0.97" not in text and "model-index" not in split(text)[0] and not headline(found.eval, found.adapter_id)
    made = report([folder], samples=False)
    assert "no evaluation is stored" in made.verdicts["mine"] and len(made.notes) >= 3


def test_what_was_not_measured_here_is_the_authors(adapter_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "mine"))
    found = read_adapter(folder)
    stored = evaluation(found.adapter_id)
    (folder / "eval.json").write_text(json.dumps(stored))
    assert not_measured_here(stored) == ["suite", "relearn", "calibration"]
    made = report([folder], samples=False)
    assert "numbers of its author, not measured here" in made.verdicts["mine"]
    assert "suite, relearn, calibration" in " ".join(made.missing["mine"])

    strip = {**stored["attacks"]["attacks"]["relearn"], "attack": "strip"}
    mixed = {"format": 1, "attacks": {**stored["attacks"]["attacks"], "strip": strip}}
    update_block(folder, "attacks", mixed, ["strip"])  # as `attack --strip` does beside what the author measured
    assert not_measured_here(read_adapter(folder).eval or {}) == ["suite", "relearn", "calibration"]
    suite = {k: v for k, v in stored.items() if k not in ("attacks", "calibration")}
    suite["subjects"]["adapter"]["forget/extraction_strength"] = 0.31
    update_eval(folder, suite)  # as `eval` does
    now = read_adapter(folder).eval or {}
    assert not_measured_here(now) == ["relearn", "calibration"]
    assert not_measured_here({**now, "scale": 0.5}) == ["relearn", "calibration"]  # calibrating states the scale anew
    assert "its author" not in report([folder], samples=False).verdicts["mine"]
    now["subjects"]["adapter"]["forget/extraction_strength"] = 0.1  # and nobody else's number passes for it
    assert "suite" in not_measured_here(now)


def test_a_place_that_cannot_be_written_only_claims_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("PEFT_UNLEARN_CACHE", str(tmp_path / "file"))
    record_measured(evaluation(), ["suite"])
    assert "suite" in not_measured_here(evaluation()) and len(list(parts_of(evaluation()))) == 3


def test_the_range_of_every_metric_is_known() -> None:
    """Whoever adds a metric says where it lies; these few alone have no end on either side."""
    found = {m.name: m.extra["within"] for m in registry.methods("metric")}
    assert {name for name, ends in found.items() if ends == (None, None)} == {"fact_recovered", "unlearning_depth"}
    assert all(low is None or high is None or low < high for low, high in found.values())
    assert registry.within("value_accuracy") == (0, 1) and registry.within("nobody's") == (None, None)
