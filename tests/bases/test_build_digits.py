"""The embedded classifiers: what lies in the repository is what it says, and a build that fails writes nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import build_digits
import pytest
from build_people import failures

from peft_unlearn.data import digits, embedded
from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base, load_tokenizer


@pytest.mark.parametrize("name", build_digits.RECIPES)
def test_the_shipped_ones_know_what_they_should(name):
    for path, bounds in (
        (embedded.base_path(name), build_digits.BASE_BOUNDS),
        (embedded.retain_model_path(name), build_digits.RETAIN_MODEL_BOUNDS),
    ):
        found = build_digits.accuracies(load_base(path), digits.generate())
        assert failures(found, bounds) == []
        stored = json.loads((path / "build.json").read_text())["accuracy"]
        assert found == pytest.approx(stored, abs=0.005)  # other kernels may tip an image or two
        assert load_tokenizer(path) is None


def test_a_build_that_fails_writes_nothing(tmp_path):
    short = {
        "digits-resnet": replace(build_digits.RECIPES["digits-resnet"], epochs=1, warmup_steps=1, learning_rate=1e-5)
    }
    with pytest.raises(UserError, match="failed its verification"):
        build_digits.build_digits(tmp_path / "out", recipes=short)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_retain_model_is_for_the_default_request_alone():
    for data, there in (
        ("embedded:digits?forget=3", True),
        ("embedded:digits", True),
        ("embedded:digits?forget=5", False),
    ):
        assert (embedded.retain_model_for("embedded:digits-vit", data) is not None) == there
    with pytest.raises(UserError, match="no embedded"):
        embedded.base_path("digits")
