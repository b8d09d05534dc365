"""A key, and a tiny adapter that was signed with it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder

from peft_unlearn.records.record import record
from peft_unlearn.stack.stackfile import add


def write_key(folder: Path, curve: ec.EllipticCurve, password: bytes | None = None) -> Path:
    key = ec.generate_private_key(curve)
    pem, der = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, der))
    return folder / "key.pem"


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
    write_key(place, ec.SECP256R1())
    record(place / "a", place / "key.pem", base=str(base_dir), stack=place / "stack.yaml", requests=["R-0"])
    return place


@pytest.fixture
def place(signed: Path, tmp_path: Path) -> SimpleNamespace:
    """A copy to be changed."""
    whole = Path(shutil.copytree(signed, tmp_path / "copy"))
    names = {"adapter": "a", "key": "key.pem", "pub": "key.pub", "stack": "stack.yaml"}
    return SimpleNamespace(root=whole, **{k: whole / v for k, v in names.items()})
