"""`peft-unlearn demo --moe`: the whole story with few steps, and what its report says."""

from __future__ import annotations

import json

import pytest

from peft_unlearn.data import embedded
from peft_unlearn.demo import moe_story
from peft_unlearn.errors import UserError
from peft_unlearn.folder.recipe import load_recipe

SCRIPT = moe_story.SCRIPT


def report(forget: float, retain: float | None) -> dict:
    values = {f"{s}/value_accuracy": forget for s in ("forget", "forget_other", "forget_unseen")}
    subjects = {
        "adapter": {**values, "retain_unseen/value_accuracy": retain},
        "base": {"retain_unseen/value_accuracy": 0.8},
    }
    return {"subjects": subjects, "versions": {}}


def test_bounds_and_what_is_said_about_them() -> None:
    met = SCRIPT.bounds(report(0.05, 0.75))
    assert all(b["met"] for b in met.values()) and met["retain_unseen"]["share_of_base"] == pytest.approx(0.9375)
    missed = SCRIPT.bounds(report(0.06, 0.74))
    assert not any(b["met"] for b in missed.values())
    assert not SCRIPT.bounds(report(0.0, None))["retain_unseen"]["met"]
    said = " ".join(SCRIPT.conditions(report(0.06, 0.74), {"total": 3.0}, 1, SCRIPT.missed(report(0.06, 0.74))))
    assert "shows the method when experts specialize, it is no evidence that they do" in said
    assert "Aims missed in this run: forget, forget_other, forget_unseen, retain_unseen" in said


def test_planted_is_read_with_numbers() -> None:
    found = moe_story.planted()
    assert set(found) == {"people", "chem", "code", "lang", "geo"} and all(
        set(v) == {0, 1, 2, 3} for v in found.values()
    )


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        moe_story.run(tmp_path / "file")


@pytest.mark.slow
def test_the_whole_story(tmp_path, capfd) -> None:
    recipe = load_recipe(embedded.asset("recipes", SCRIPT.recipe))
    recipe["train"] |= {"max_steps": 4}
    recipe["eval"] |= {"every": 2, "n": 4}
    told = moe_story.run(tmp_path / "demo", seed=1, recipe=recipe, n=4)
    shown, result = capfd.readouterr(), told.to_dict()
    json.dumps(result, allow_nan=False)
    assert "Warning" not in shown.err and shown.out == "" and "retain model" in str(told)
    assert [c["held"] for c in result["checks"]] == [True, True, True] and result["ok"]
    assert {k: [e] for k, e in result["attribution"]["planted"].items()} == result["attribution"]["chosen"]
    assert result["overlap"]["retain"][0] == 1.0 and [c["step"] for c in result["curve"]] == [2, 4]
    assert result["removal"]["digest"] == result["removal"]["base_digest"]
    for name in ("affinity.png", "picture.png", "report.html", "adapter/expert_lora/adapter_config.json"):
        assert (tmp_path / "demo" / name).is_file()
    html = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image/png;base64,") == 2 and str(tmp_path) not in html
    assert "it is no evidence that they do" in html and "Forgetting ten people" not in html
