"""Reading, hashing and writing beside the arithmetic: threads with a short queue each, and buffers that are used again."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..folder.safetensors_io import TensorEntry

SIZE = 1 << 20  # bytes of a buffer: handing one on costs a switch of threads, and all of them should fit into the cache
_AHEAD = 4  # buffers waiting in each queue


class Pipeline:
    """What goes through one shard: `take` a buffer, `read` into it, `hash` it and `write` it, in this order for each tensor."""

    def __init__(self, source: Any, target: Any, buffers: Buffers) -> None:
        self._source, self._target, self._buffers = source, target, buffers
        self._writer, self._in, self._out = Worker(self._write), Worker(_hash), Worker(_hash)

    def __enter__(self) -> Pipeline:
        for worker in (self._writer, self._in, self._out):
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._writer, self._in, self._out):
            worker.stop()

    def finish(self) -> None:
        """Wait until all is written and hashed; raises what went wrong on the way."""
        for worker in (self._writer, self._in, self._out):
            worker.finish()

    def take(self, n: int, users: int = 1) -> Buffer:
        return self._buffers.take(n, users)

    def read(self, entry: TensorEntry, into: Tensor) -> None:
        view = into.numpy().data
        at = 0
        while at < len(view):
            got = self._source.readinto(view[at:])
            if not got:
                raise UserError(f"{entry.file.name}: ends inside the tensor {entry.name!r}; the file is truncated.")
            at += got

    def hash_read(self, sha: Any, piece: Buffer) -> None:
        self._in.put(sha, piece)

    def write(self, sha: Any, piece: Buffer) -> None:
        """Write a buffer of two users and add it to `sha`."""
        self._writer.put(piece)
        self._out.put(sha, piece)

    def copy(self, entry: TensorEntry) -> Any:
        """The next `entry.end - entry.begin` bytes as they are; their hash."""
        sha = hashlib.sha256()
        left = entry.end - entry.begin
        while left:
            piece = self.take(min(SIZE, left), users=2)
            self.read(entry, piece.bytes)
            left -= piece.bytes.numel()
            self.write(sha, piece)
        return sha

    def _write(self, piece: Buffer) -> None:
        data = piece.bytes.numpy().data
        at = 0
        while at < len(data):
            at += self._target.write(data[at:])
        piece.release()


def _hash(sha: Any, piece: Buffer) -> None:
    sha.update(piece.bytes.numpy().data)
    piece.release()


class Worker:
    """A thread that calls `work` on what is put, in order; its error comes back at the next `put`."""

    def __init__(self, work: Callable[..., None]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def put(self, *item: Any) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(item)

    def finish(self) -> None:
        self._queue.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            try:
                if item is None:
                    return
                if self._error is None:
                    self._work(*item)
            except BaseException as e:
                self._error = e
            finally:
                self._queue.task_done()


class Buffer:
    """Some bytes that several users hold; the last to release them gives them back."""

    def __init__(self, pool: Buffers, whole: Tensor, n: int, users: int) -> None:
        self.bytes = whole[:n]
        self._pool, self._whole, self._users = pool, whole, users

    def release(self) -> None:
        with self._pool.lock:
            self._users -= 1
            if self._users == 0 and self._whole.numel() == SIZE:
                self._pool.free.append(self._whole)


class Buffers:
    """Memory for blocks, used again and again: fresh pages would cost more than what is done with them."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.lock = threading.Lock()

    def take(self, n: int, users: int = 1) -> Buffer:
        with self.lock:
            whole = self.free.pop() if self.free and n <= SIZE else None
        return Buffer(self, torch.empty(max(n, SIZE), dtype=torch.uint8) if whole is None else whole, n, users)
