"""The story on images, with fewer steps than it has."""

from __future__ import annotations

import json

import pytest

from peft_unlearn.data import embedded
from peft_unlearn.demo import vision_story
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.reporting.figure import PNG_MARK


@pytest.mark.slow
def test_it_tells_what_it_found(tmp_path):
    recipe = load_recipe(embedded.asset("recipes", vision_story.RECIPE))
    recipe["train"] = {**recipe["train"], "max_steps": 20}
    story = vision_story.run(tmp_path / "out", recipe=recipe)
    assert story.ok and story.exit_code == 0
    assert PNG_MARK in (tmp_path / "out" / "picture.png").read_bytes()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "inference-time suppression" in page and "CC BY" in page and "test image of a 3" in page
    assert read_adapter(tmp_path / "out" / "adapter").eval is not None
    found = json.loads(json.dumps(story.to_dict()))
    assert found["removal"]["verdict"] == "removed" and set(found["met"]) == set(vision_story.AIMS)
    assert found["met"]["forget/accuracy"]["value"] == found["report"]["subjects"]["adapter"]["forget/accuracy"] < 0.5
    assert [s["before"][0] for s in story.samples] == ["3", "3", "3", "0", "1", "2"]  # the base is right on all of them


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        vision_story.run(tmp_path / "out")
