"""Reading safetensors files byte by byte, without building a model and without torch.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length N, N bytes of
JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the tensors' little-endian bytes. Every check
here ends in a `UserError` that names the file, because a damaged file is what a user has, not what this package did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are byte offsets from the start of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes in pieces of 4 MiB, so that memory stays flat whatever the tensor's size."""
        with open(self.file, "rb") as f:
            f.seek(self.begin)
            left = self.end - self.begin
            while left:
                piece = f.read(min(_CHUNK, left))
                if not piece:
                    raise UserError(f"{self.file.name}: ends inside the tensor {self.name!r}; the file is truncated.")
                left -= len(piece)
                yield piece

    def tensor(self) -> Any:
        """The tensor itself (torch), in memory of its own: nothing of the file stays mapped."""
        import torch

        kind = getattr(torch, TORCH_NAMES.get(self.dtype, ""), None)
        if kind is None:
            raise UserError(f"{self.file}: {self.name!r} is of the type {self.dtype}, which is not known here.")
        raw = bytearray(self.end - self.begin)
        at = 0
        for piece in self.chunks():
            raw[at : at + len(piece)] = piece
            at += len(piece)
        flat = torch.frombuffer(raw, dtype=kind) if raw else torch.empty(0, dtype=kind)
        return flat.reshape(self.shape)


def ordered(raw: bytes) -> bytes:
    """The bytes of a file with its header's keys in order: safetensors writes several texts of ``__metadata__`` in any order."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[end:]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the name {key!r} appears twice in its header")
        out[key] = value
    return out


def read_header(path: Path) -> dict[str, TensorEntry]:
    """name -> entry for one file. Raises `UserError` for an empty, truncated or foreign file."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty.")
    with open(path, "rb") as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length < 2 or length > _MAX_HEADER:
            raise UserError(f"{path}: not a safetensors file (no readable header length).")
        if 8 + length > size:
            raise UserError(f"{path}: truncated, or not a safetensors file (the header needs {8 + length} bytes, "
                            f"the file has {size}).")  # fmt: skip
        raw = f.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = {name: _entry(name, value, path, 8 + length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: not a valid safetensors file ({e}).") from None
    need = max((e.end for e in entries.values()), default=8 + length)
    if need != size:
        what = "truncated" if size < need else "followed by foreign bytes"
        raise UserError(f"{path}: {what} (its header describes {need} bytes, the file has {size}).")
    return entries


def _entry(name: str, value: dict[str, Any], path: Path, base: int) -> TensorEntry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
    if not whole or end < begin:
        raise ValueError(f"tensor {name!r} has an impossible shape or place")
    if dtype in _BYTES and math.prod(shape) * _BYTES[dtype] != end - begin:
        raise ValueError(f"tensor {name!r}: {dtype} {list(shape)} does not fill bytes {begin} to {end}")
    return TensorEntry(name, dtype, shape, path, base + begin, base + end)


def plain_name(name: str) -> bool:
    """A file name that stays inside its folder: relative, no ``..``, no backslash, no drive; one that file systems take."""
    parts = name.split("/")
    plain = "\\" not in name and ":" not in name and name.isprintable() and len(name) < 1000
    return plain and all(p not in ("", ".", "..") and len(p.encode()) < 256 for p in parts)


def checkpoint_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint folder by its on-disk name: ``model.safetensors``, or the shards its index names."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = (
            f"only pickled weights ({', '.join(pickled)}), which can run code when loaded; convert them to safetensors"
            if pickled
            else f"neither {WEIGHTS} nor {INDEX} in it"
        )
        raise UserError(f"{folder}: not a checkpoint this package reads: {why}.")
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{folder / INDEX}: not a readable index (JSON with a `weight_map`).") from None
    shards: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(names.values())):
        if not plain_name(shard):
            raise UserError(f"{folder / INDEX}: the shard name {shard!r} leaves the folder; refused.")
        if not (folder / shard).is_file():
            raise UserError(f"{folder / INDEX}: names the shard {shard!r}, which is missing.")
        shards[shard] = read_header(folder / shard)
    lost = [n for n, s in names.items() if n not in shards[s]]
    if lost:
        raise UserError(
            f"{folder / INDEX}: {len(lost)} tensors are not in the shard named for them, first {lost[0]!r}."
        )
    return {n: shards[s][n] for n, s in names.items()}
