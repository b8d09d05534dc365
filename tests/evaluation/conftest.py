from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_helpers import byte_tokenizer, qa, tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny()


@pytest.fixture(scope="session")
def data() -> dict[str, list[dict[str, Any]]]:
    sets = {
        "forget": [qa(i, "old") for i in range(6)],
        "forget_other": [qa(i, "other") for i in range(4)],
        "forget_heldout": [qa(i, "third") for i in range(4)],
        "retain": [qa(i, "new") for i in range(8)],
        "retain_other": [qa(i, "kept") for i in range(4)],
        "retain_heldout": [qa(i, "rare") for i in range(4)],
        "general": [qa(i, "world") for i in range(4)],
        "holdout": [qa(i, "nobody") for i in range(4)],
    }
    return sets


@pytest.fixture(scope="session")
def ground_truth() -> dict[str, Any]:
    """TOFU's published logs; outside the repository, so not everywhere."""
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu_groundtruth_llama2.json"
    if not path.is_file():
        pytest.skip("shared/data/tofu_groundtruth_llama2.json is not there")
    return json.loads(path.read_text(encoding="utf-8"))
