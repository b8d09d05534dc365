"""A folder written in parts over several runs, and never seen half written.

Beside the destination lies ``.NAME.merge-<fingerprint>/``: ``model/`` grows there shard by shard, ``journal/`` says which
shards are whole and holds the hashes of their tensors. A run that finds the same fingerprint goes on after the last whole
shard, whose bytes it reads and compares first. The last step is one rename of ``model/`` to the destination.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.atomic import check_free, fsync_path, fsync_tree, make_readable, swap_in, write_text
from ..folder.safetensors_io import read_header

_KEEP = "is not empty, and a merged model never replaces anything"


class MergeStage:
    """Open with ``with``: locks the stage against other runs. `finish` or `discard`; otherwise it is kept for the next."""

    def __init__(self, out: str | Path, about: Mapping[str, Any]) -> None:
        out = Path(out).expanduser()
        self.out = out.resolve() if out.is_symlink() else out.absolute()
        self.fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.root = self.out.with_name(f".{self.out.name}.merge-{self.fingerprint[:16]}")
        self.model, self.journal = self.root / "model", self.root / "journal"
        self._lock: int | None = None

    def __enter__(self) -> MergeStage:
        check_free(self.out, lambda _: _KEEP)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.model.mkdir(parents=True, exist_ok=True)
            self.journal.mkdir(exist_ok=True)
            self._lock = _locked(self.root)
        except OSError as e:
            raise UserError(f"{self.out}: cannot be written ({e.strerror}).") from None
        if self._lock is None:
            raise UserError(
                f"{self.out}: another run is writing this merged model now; wait for it, or name another folder."
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def done(self, shard: str) -> dict[str, Any] | None:
        """What an earlier run recorded of a whole shard, if the file is still exactly that; None: write it (again)."""
        try:
            record = json.loads(self._record(shard).read_text(encoding="utf-8"))
            tensors = read_header(self.model / shard)
            hashes = {n: row["out"] for n, row in record["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        if set(tensors) != set(hashes):
            return None
        for name, entry in tensors.items():
            sha = hashlib.sha256()
            for piece in entry.chunks():
                sha.update(piece)
            if sha.hexdigest() != hashes[name]:
                return None
        return record

    def record(self, shard: str, record: dict[str, Any]) -> None:
        """Say that `shard` is whole. Its bytes are on the disk before the record is."""
        fsync_path(self.model / shard)
        fsync_path((self.model / shard).parent)
        write_text(self._record(shard), json.dumps(record))

    def finish(self) -> None:
        make_readable(self.model)
        fsync_tree(self.model)
        check_free(self.out, lambda _: _KEEP)  # again: minutes may have passed
        swap_in(self.model, self.out)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _record(self, shard: str) -> Path:
        return self.journal / f"{hashlib.sha256(shard.encode()).hexdigest()[:16]}.json"

    def _sweep(self) -> None:
        """Remove what killed runs with other settings left for this destination; not what a living run writes."""
        for left in self.out.parent.glob(f".{self.out.name}.merge-*"):
            if left != self.root:
                _remove_dead(left)


def check_destination(out: Path) -> None:
    """Raise `UserError` for a destination that holds anything. Sweeps up after runs killed right after their last rename."""
    for left in out.absolute().parent.glob(f".{out.name}.merge-*"):
        if not (left / "model").exists():
            _remove_dead(left)
    check_free(out, lambda _: _KEEP)


def _remove_dead(stage: Path) -> None:
    try:
        lock = _locked(stage) if stage.is_dir() else None
    except OSError:
        return
    if lock is not None:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """An open file that holds the folder's lock, or None if another process does. The system frees it with the process."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such lock on this system
        pass
    except OSError:
        os.close(fd)
        return None
    return fd
