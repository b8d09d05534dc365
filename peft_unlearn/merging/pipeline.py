"""Reading, hashing and writing beside the arithmetic: a thread for each, and blocks of memory that are used again."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..folder.safetensors_io import TensorEntry

SIZE = 1 << 20  # bytes of a block: handing one on costs a switch of threads, and all of them should fit into the cache
_AHEAD = 4  # blocks that may wait for a thread


class Pipeline:
    """What goes through one shard: blocks are read, hashed, worked on, hashed and written, in the file's order."""

    def __init__(self, source: Any, target: Any, rings: tuple[Ring, Ring]) -> None:
        self._source, self._target = source, target
        self._for_reading, self._for_writing = rings
        self._lanes = [_Lane(), _Lane(), _Lane()]
        self._hash_in, self._hash_out, self._writer = self._lanes

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.stop()

    def finish(self) -> None:
        """Wait until all is written and hashed; raises what went wrong on the way."""
        for lane in self._lanes:
            lane.finish()

    def take(self, entry: TensorEntry, sha: Any, n: int) -> Tensor:
        """(n,) bytes: the next ones of the source, added to `sha`."""
        block = self._for_reading.take(n)
        self._read(entry, block)
        self._hash_in.put(sha.update, block.numpy().data)
        return block

    def room(self, n: int) -> Tensor:
        """(n,) bytes to fill and `write`, before the next ones are asked for."""
        return self._for_writing.take(n)

    def write(self, sha: Any, block: Tensor) -> None:
        """Write a block and add it to `sha`."""
        data = block.numpy().data
        self._hash_out.put(sha.update, data)
        self._writer.put(self._write, data)

    def copy(self, entry: TensorEntry) -> Any:
        """The tensor's bytes as they are; their hash."""
        sha, left = hashlib.sha256(), entry.end - entry.begin
        while left:
            block = self.room(min(SIZE, left))
            self._read(entry, block)
            self.write(sha, block)
            left -= block.numel()
        return sha

    def _read(self, entry: TensorEntry, into: Tensor) -> None:
        view, at = into.numpy().data, 0
        while at < len(view):
            got = self._source.readinto(view[at:])
            if not got:
                raise UserError(f"{entry.file.name}: ends inside the tensor {entry.name!r}; the file is truncated.")
            at += got

    def _write(self, data: memoryview) -> None:
        at = 0
        while at < len(data):
            at += self._target.write(data[at:])


class _Lane:
    """A thread that does what is put, in order. With `_AHEAD` waiting `put` waits too; it raises what went wrong before."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[Any]] = deque()

    def put(self, work: Callable[..., Any], *args: Any) -> None:
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(work, *args))

    def finish(self) -> None:
        while self._waiting:
            self._waiting.popleft().result()

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class Ring:
    """Memory used again and again: fresh pages would cost more than what is done with them.

    One block more than may wait for a lane: when a block's turn comes again, `_Lane.put` has waited for what was done with it.
    """

    def __init__(self) -> None:
        self._blocks = deque(torch.empty(SIZE, dtype=torch.uint8) for _ in range(_AHEAD + 1))

    def take(self, n: int) -> Tensor:
        self._blocks.rotate()
        return self._blocks[0][:n] if n <= SIZE else torch.empty(n, dtype=torch.uint8)
