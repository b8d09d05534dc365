"""Signatures with elliptic curves, as OpenSSF model signing and in-toto write them.

An envelope is DSSE (https://github.com/secure-systems-lab/dsse): what is signed is "DSSEv1", and length and text of the type and of the
payload. Curves and hashes are those that model signing takes; its own package is not needed to write or to check them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PASSWORD = "PEFT_UNLEARN_KEY_PASSWORD"
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


@dataclass(frozen=True)
class Key:
    """A key pair, or its public half. hint: sha256 of the public key's PEM, by which a signature names its key."""

    public: Any
    private: Any
    hint: str

    def sign(self, payload: bytes) -> bytes:
        return self.private.sign(_signed_text(payload), self._algorithm())

    def made(self, signature: bytes, payload: bytes) -> bool:
        """Whether this key made the signature."""
        try:
            self.public.verify(signature, _signed_text(payload), self._algorithm())
        except _part("cryptography.exceptions").InvalidSignature:
            return False
        return True

    def _algorithm(self) -> Any:
        hashes = _part("cryptography.hazmat.primitives.hashes")
        ec = _part("cryptography.hazmat.primitives.asymmetric.ec")
        return ec.ECDSA(getattr(hashes, _HASHES[self.public.curve.name])())


def load_key(path: str | Path, private: bool) -> Key:
    """A key from a PEM file; of a private one the public half is enough where nothing is signed.

    Raises:
        UserError: no file, no elliptic key of a known curve, encrypted without its password, or `cryptography` is not installed.
    """
    file, serialization = Path(path).expanduser(), _part("cryptography.hazmat.primitives.serialization")
    try:
        text = file.read_bytes()
    except OSError as e:
        make = "; openssl ecparam -name prime256v1 -genkey -noout -out key.pem makes one" if private else ""
        raise UserError(f"{file}: cannot be read ({e.strerror}){make}.") from None
    secret = b"PRIVATE KEY" in text
    if private and not secret:
        raise UserError(f"{file}: holds no private key; signing needs one (--key).")
    locked = b"ENCRYPTED" in text  # a password for a key that has none is refused by the library
    password = (os.environ.get(PASSWORD, "").encode() or None) if locked else None
    try:
        own = serialization.load_pem_private_key(text, password) if secret else None
        public = own.public_key() if own is not None else serialization.load_pem_public_key(text)
        curve = public.curve.name
    except (ValueError, TypeError, AttributeError, _part("cryptography.exceptions").UnsupportedAlgorithm) as e:
        hint = f"; its password belongs into {PASSWORD}" if locked else ""
        raise UserError(f"{file}: not an elliptic key in PEM ({type(e).__name__}){hint}.") from None
    if curve not in _HASHES:
        raise UserError(f"{file}: a key of the curve {curve}; expected one of {', '.join(_HASHES)}.")
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Key(public, own, hashlib.sha256(pem).hexdigest())


def envelope(payload: bytes, key: Key, keyid: str) -> dict[str, Any]:
    """A signed payload."""
    signature = {"sig": base64.b64encode(key.sign(payload)).decode(), "keyid": keyid}
    return {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


def opened(found: Any, where: str) -> tuple[bytes, bytes]:
    """(payload, signature) of an envelope, unchecked. Raises `UserError` for what is none."""
    try:
        (one,) = found["signatures"]
        if found["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(found["payloadType"])
        return base64.b64decode(found["payload"], validate=True), base64.b64decode(one["sig"], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error) as e:
        raise UserError(f"{where}: not an envelope with one signature ({type(e).__name__}).") from None


def _signed_text(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _part(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            "signatures need the package cryptography, which is not installed: pip install 'peft-unlearn[record]'."
        ) from None
