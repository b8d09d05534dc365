"""A key, and a tiny adapter that was signed with it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder
from keyfiles import write_key

from peft_unlearn.records.record import record
from peft_unlearn.stack.stackfile import add


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyfolder.save_base(tmp_path_factory.mktemp("base") / "b")


@pytest.fixture(scope="session")
def signed(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/a signed with folder/key.pem, in the ledger folder/stack.yaml with folder/b; read only."""
    place = tmp_path_factory.mktemp("signed")
    for seed, name in enumerate("ab"):
        tinyfolder.write(place / name, base_dir, seed=seed + 1)
        (place / name / "eval.json").write_text('{"format": 1}\n')
        add(place / "stack.yaml", place / name, request_id=f"R-{name}", reason=f"because of {name}")
    write_key(place)
    record(place / "a", place / "key.pem", base=str(base_dir), stack=place / "stack.yaml", requests=["R-0"])
    return place


@pytest.fixture
def place(signed: Path, tmp_path: Path) -> SimpleNamespace:
    """A copy to be changed."""
    whole = Path(shutil.copytree(signed, tmp_path / "copy"))
    names = {"adapter": "a", "key": "key.pem", "pub": "key.pub", "stack": "stack.yaml"}
    return SimpleNamespace(root=whole, **{k: whole / v for k, v in names.items()})
