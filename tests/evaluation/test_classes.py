"""Metrics of classifiers, against counts done by hand."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_vision
import torch

from peft_unlearn.data.images import bundle_of
from peft_unlearn.evaluation.metrics.classes import threshold
from peft_unlearn.evaluation.score import score


def test_the_threshold_is_the_best_there_is():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 60), rng.normal(0, 1, 40)

    def balanced(cut: float) -> float:
        return float((others < cut).mean() + (members >= cut).mean())

    cut = threshold(members, others)
    assert balanced(cut) == max(balanced(c) for c in [*members, *others, np.inf])
    assert threshold(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 2.0
    same = np.array([1.0, 1.0])
    assert (same < threshold(same, same)).mean() in (0.0, 1.0)


class Fixed(torch.nn.Module):
    """Names the class that the first pixel says, as surely as the second one says."""

    main_input_name = "pixel_values"
    config = SimpleNamespace(num_labels=4)

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values: Any) -> Any:
        first, sure = pixel_values[:, 0, 0, 0], pixel_values[:, 0, 0, 1]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(first.long(), 4) * sure[:, None])


def row(label: int, named: int, sure: float) -> dict[str, Any]:
    pixels = np.zeros((1, 2, 2), np.float32)
    pixels[0, 0] = named, sure
    pixels[0, 1, 0] = np.random.default_rng([label, named, int(10 * sure)]).normal()
    return {"pixel_values": pixels, "label": label}


def test_the_suite_counts_what_it_says():
    data = bundle_of({
        "forget": [row(1, 1, 2.0), row(1, 2, 9.0), row(1, 3, 4.0), row(1, 0, 5.0)],
        "retain": [row(k % 4, k % 4, 8.0 + k) for k in (0, 2, 3)] + [row(2, 0, 3.0)],
        "holdout": [row(0, 0, 1.0), row(2, 2, 1.5), row(3, 1, 2.0)],
        "forget_test": [row(1, 2, 6.0)],
    })  # fmt: skip
    report = score({"base": lambda: nullcontext(Fixed())}, "classes", data, None)
    found = report.subjects["base"]
    assert found is not None
    assert found["forget/accuracy"] == 0.25 and found["forget/unlearning_accuracy"] == 0.75
    assert found["forget_test/accuracy"] == 0 and found["retain/accuracy"] == 0.75
    assert found["test/accuracy"] == pytest.approx(2 / 3)
    sure = torch.tensor([2.0, 0, 0, 0]).softmax(0)[0]
    first = report.per_row["base"]["forget/probability"][0]
    assert first == pytest.approx(float(sure), abs=1e-6)
    assert (
        found["forget/mia_efficacy"] == 1.0
    )  # all four are less sure of class 1 than the retained rows that are known


def test_random_rows_have_no_test_set_of_their_own():
    data = bundle_of(
        {"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(4, 2), "holdout": tiny_vision.rows(4, 3)}
    )
    report = score({"base": lambda: nullcontext(tiny_vision.classifier())}, "classes", data, None)
    assert report.subjects["base"]["forget_test/accuracy"] is None  # type: ignore[index]
    assert "no set 'forget_test'" in report.details["base"]["forget_test/accuracy"]["reason"]
    report = score({"base": lambda: nullcontext(tiny_vision.classifier())}, "classes", data, None, n=2)
    assert report.details["base"]["forget/accuracy"]["n"] == 2
