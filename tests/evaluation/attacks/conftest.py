from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from eval_helpers import qa

from peft_unlearn.attacks.case import Case, split
from peft_unlearn.data.bundle import ForgetRetain


@pytest.fixture(scope="session")
def bundle() -> ForgetRetain:
    return ForgetRetain([qa(i, "old") for i in range(8)], [qa(i, "new") for i in range(6)])


@pytest.fixture
def case_of(bundle: ForgetRetain, tokenizer: Any):
    def make(model: Any, name: str = "adapter", **over: Any) -> Case:
        rows, shown = split(bundle.forget, 3)
        given = {"data": bundle, "rows": rows, "shown": shown, "max_new_tokens": 4, **over}
        return Case(name, tokenizer, subject=lambda: nullcontext(model), **given)

    return make


@pytest.fixture
def case(case_of: Any, model: Any) -> Case:
    return case_of(model)
