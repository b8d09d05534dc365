from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

sys.path.extend(str(Path(__file__).resolve().parents[1] / room) for room in ("", "evaluation", "folder", "tuners"))
from eval_helpers import byte_tokenizer, qa, tiny

from peft_unlearn.attacks.case import Case, split
from peft_unlearn.data.bundle import ForgetRetain


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny()


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
