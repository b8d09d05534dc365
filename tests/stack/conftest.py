"""The same tiny base and adapter as in tests/folder."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tuners"))
from tinyfolder import save_base, write

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 base; read only."""
    return save_base(tmp_path_factory.mktemp("base") / "b")


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete forget adapter of `base_dir`; read only (copy it to damage it)."""
    out = tmp_path_factory.mktemp("adapter") / "forget"
    write(out, base_dir)
    return out


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts; read only."""
    from stacks import save_moe

    return save_moe(tmp_path_factory.mktemp("moe") / "b")
