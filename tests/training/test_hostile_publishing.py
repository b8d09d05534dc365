"""No run publishes anything by itself: neither by a recipe, nor by a config, nor by the Trainer's own methods."""

from __future__ import annotations

from typing import Any

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("push_to_hub", True), ("hub_model_id", "me/x"), ("hub_token", "hf_x"), ("hub_private_repo", True),
        ("hub_strategy", "checkpoint"), ("hub_always_push", True), ("report_to", "wandb"), ("report_to", "all"),
        ("report_to", ["tensorboard", "mlflow"]), ("report_to", ["trackio"]),
    ],
)  # fmt: skip
def test_what_would_publish_a_run_is_refused_with_the_way_that_does(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name) as caught:
        UnlearnConfig(**{name: value})
    assert "peft-unlearn push" in str(caught.value)


@pytest.mark.parametrize("value", ["none", None, [], "tensorboard", ["tensorboard"]])
def test_what_stays_here_is_taken(value: Any) -> None:
    assert set(UnlearnConfig(report_to=value).report_to) <= {"tensorboard"}


def test_all_of_them_are_named_at_once() -> None:
    with pytest.raises(UserError) as caught:
        UnlearnConfig(push_to_hub=True, hub_token="hf_x", report_to="wandb")
    assert all(word in str(caught.value) for word in ("push_to_hub", "hub_token", "wandb"))
    assert "hf_x" not in str(caught.value)


def test_the_trainers_own_way_is_closed() -> None:
    for method in ("push_to_hub", "init_hf_repo"):
        with pytest.raises(UserError, match=r"peft_unlearn\.push"):
            getattr(UnlearnTrainer, method)(None)
