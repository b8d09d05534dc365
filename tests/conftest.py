"""Shared by all tests: one thread, no network, quiet libraries."""

from __future__ import annotations

import gc
import os
import tempfile

os.environ["PEFT_UNLEARN_CACHE"] = tempfile.mkdtemp(
    prefix="peft-unlearn-tests-"
)  # what was measured here is remembered there
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import forking
import pytest
import torch

forking.bars_of_its_own()
torch.set_num_threads(1)  # two OpenMP threads on two contended cores are many times slower


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """accelerate collects garbage after every training, over all objects of all libraries: those that stay are left out."""
    gc.collect()
    gc.freeze()
