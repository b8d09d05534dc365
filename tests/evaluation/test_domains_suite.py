"""The suite of the five domains, and multiple choice by probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_unlearn.data import domains, embedded
from peft_unlearn.evaluation import suites
from peft_unlearn.evaluation.measured import Ragged
from peft_unlearn.evaluation.metrics.likelihood import choice_accuracy
from peft_unlearn.evaluation.score import score


def test_choice_accuracy_by_hand() -> None:
    right = np.array([-1.0, -2.0, -1.0, np.nan, -900.0, -1.0])
    wrong = Ragged.of([[-1.1, -3.0], [-5.0, -1.9], [-1.0, -2.0], [-1.0], [-901.0], [np.nan, -5.0]])
    np.testing.assert_array_equal(choice_accuracy(right, wrong), [1.0, 0.0, 0.0, np.nan, 1.0, np.nan])


@pytest.mark.parametrize("forget", domains.DOMAINS)
def test_every_set_of_the_suite_is_there_but_the_forgotten_domains(forget: str) -> None:
    data = domains.generate(0, forget, domains.Size(entities=4, holdout=1))
    sources = {s.source for s in suites.load("domains").sets.values()}
    assert sources - set(data) == {f"retain_unseen_{forget}"} and set(data) <= sources


def test_the_base_knows_everything_but_what_it_was_never_told() -> None:
    from contextlib import nullcontext

    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded.base_path("domains")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    data = embedded.rows("embedded:domains")
    subjects = {"base": lambda: nullcontext(model), "retain_only": None}
    out = score(subjects, "domains", data, AutoTokenizer.from_pretrained(path), n=13)
    found, details = out.subjects["base"], out.details["base"]
    for name in ("forget", "forget_other", "forget_unseen", "retain", "retain_unseen", "retain_unseen_geo"):
        assert found[f"{name}/value_accuracy"] >= 0.84, name
    assert found["forget/choice_accuracy"] >= 0.92 and found["retain_unseen/choice_accuracy"] >= 0.92
    assert found["holdout/value_accuracy"] <= 0.25
    assert found["retain_unseen_chem/value_accuracy"] is None
    assert "no set 'retain_unseen_chem'" in details["retain_unseen_chem/value_accuracy"]["reason"]
