"""The rows and tiny models of tests/evaluation are used here too."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "evaluation"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "folder"))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from eval_helpers import byte_tokenizer

    return byte_tokenizer()
