"""A folder written in parts over several runs, and never seen half written.

Beside the destination lies ``.NAME.merge-<fingerprint>/``: ``model/`` grows there shard by shard, ``journal/`` says which
shards are whole and holds the hashes of their tensors. A run that finds the same fingerprint goes on after the last whole
shard, whose bytes it reads and compares first. The last step is one rename of ``model/`` to the destination.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.atomic import check_free, fsync_path, fsync_tree, locked, make_readable, swap_in, write_text
from ..folder.safetensors_io import read_header

KEEP = "is not empty, and a merged model never replaces anything"


class MergeStage:
    """Open with ``with``: locks the stage against other runs. `finish` or `discard`; otherwise it is kept for the next."""

    def __init__(self, out: str | Path, about: Mapping[str, Any]) -> None:
        out = Path(out).expanduser()
        self.out = out.resolve() if out.is_symlink() else out.absolute()
        self.fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self.root = self.out.with_name(f".{self.out.name}.merge-{self.fingerprint[:16]}")
        self.model, self.journal = self.root / "model", self.root / "journal"
        self._held = ExitStack()

    def __enter__(self) -> MergeStage:
        check_free(self.out, lambda _: KEEP)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self.model.mkdir(parents=True, exist_ok=True)
            self.journal.mkdir(exist_ok=True)
            alone = self._held.enter_context(locked(self.root / "lock", wait=False))
        except OSError as e:
            raise UserError(f"{self.out}: cannot be written ({e.strerror}).") from None
        if not alone:
            raise UserError(
                f"{self.out}: another run is writing this merged model now; wait for it, or name another folder."
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

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
        check_free(self.out, lambda _: KEEP)  # again: minutes may have passed
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
    sweep(out)
    check_free(out, lambda _: KEEP)


def sweep(out: Path) -> None:
    """Remove what runs killed right after their last rename left of their stage."""
    for left in out.absolute().parent.glob(f".{out.name}.merge-*"):
        if not (left / "model").exists():
            _remove_dead(left)


def _remove_dead(stage: Path) -> None:
    with suppress(OSError), locked(stage / "lock", wait=False) as dead:
        if dead:
            shutil.rmtree(stage, ignore_errors=True)
