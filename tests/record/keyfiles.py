"""Key pairs for tests."""

from __future__ import annotations

from pathlib import Path


def write_key(folder: Path, curve: str = "SECP256R1", password: bytes | None = None) -> Path:
    """folder/key.pem, and its public half folder/key.pub."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    pem, der = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    (folder / "key.pub").write_bytes(key.public_key().public_bytes(pem, der))
    return folder / "key.pem"
