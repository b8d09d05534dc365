"""A tiny adapter of a tiny base that lies on a local Hub, and clients of it in processes of their own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder
from client import Clients
from hub import Hub

from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.manifest import BaseRef
from peft_unlearn.folder.write import write_adapter


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyfolder.save_base(tmp_path_factory.mktemp("base") / "b")


@pytest.fixture(scope="session")
def _hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(_hub: Hub) -> Iterator[Hub]:
    _hub.calm()
    yield _hub
    _hub.calm()


@pytest.fixture(scope="session")
def clients(_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    made = Clients(_hub.url, tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def made(_hub: Hub, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose base is ``me/base`` at its commit on the local Hub; read only."""
    commit = _hub.put("me/base", {p.name: p.read_bytes() for p in base_dir.iterdir()})
    out = tmp_path_factory.mktemp("made") / "adapter"
    model = tinyfolder.adapted(base_dir)
    manifest = tinyfolder.manifest_for(model, base_dir, name="made-up", description="Forgets what was made up.")
    base = BaseRef("me/base", digest_checkpoint(base_dir), commit, manifest.base.digest_targeted)
    data: dict[str, Any] = {"forget": {"sha256": "a" * 64, "n": 100}}
    manifest = replace(manifest, base=base, data=data)
    write_adapter(out, model, manifest, tinyfolder.RECIPE, tokenizer=tinyfolder.tokenizer())
    return out


@pytest.fixture(scope="session")
def local(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose base is a folder; read only."""
    out = tmp_path_factory.mktemp("local") / "adapter"
    tinyfolder.write(out, base_dir)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(made, tmp_path / "adapter"))
