"""Folders that appear whole or not at all, whatever happens to the process or the power.

A folder is staged under a hidden name beside its destination, flushed to disk, and swapped in by one system call: a
rename where nothing stands, an exchange of the two names (Linux ``renameat2``) where an older version does.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError


def fsync_path(path: Path) -> None:
    """Flush a file's, or a folder's, contents to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: a neighbour is written and flushed, then renamed over `path`. `UserError` where there is no room."""
    part = part_of(path)
    try:
        sweep_parts(path.parent, path.name)
        with room_for(path):
            part.write_bytes(content)
            fsync_path(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    fsync_path(path.parent)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` against other threads and processes; the system frees it with the process.

    Yields False, without the lock, where somebody else holds it and `wait` is off.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class NoRoom(UserError):
    """The disk is full."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def room_for(out: Path) -> Iterator[None]:
    """Make a full disk a `UserError` about `out`; safetensors names it only in the text of its own error."""
    try:
        yield
    except Exception as e:
        named = re.search(r"\(os error (\d+)\)", str(e))
        number = e.errno if isinstance(e, OSError) else int(named[1]) if named else None
        if number not in _NO_ROOM:
            raise
        raise NoRoom(f"{out}: cannot be written ({os.strerror(number)}); what stood there is as it was.") from None


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def part_of(path: Path) -> Path:
    """The neighbor that becomes `path` once it is whole; its name says whose it is, for `sweep_parts`."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part")


_PART = re.compile(r"\..+\.(?:(?P<host>[0-9a-f]{6})-)?(?P<pid>[0-9]{1,9})-[0-9a-f]{8}\.part", re.S)
_HOUR = 3600  # no file of ours takes that long to write


def sweep_parts(folder: Path, name: str = "*") -> None:
    """Remove the unfinished files that killed writers left in a folder (of one file, or of all); living ones keep theirs."""
    for left in folder.glob(f".{glob.escape(name) if name != '*' else name}.*.part"):
        found = _PART.fullmatch(left.name)
        if found is None or left.is_symlink() or not left.is_file():
            continue
        with suppress(OSError):
            here, pid = found["host"] in (None, _host()), int(found["pid"])
            dead = here and pid != os.getpid() and not _alive(pid)
            if dead or time.time() - left.stat().st_mtime > _HOUR:
                left.unlink()


def sweep_stale(out: Path) -> None:
    """Remove what killed writers of `out` left; those of living writers, and of other hosts, are left alone."""
    for left in out.parent.glob(f".{out.name}.stage-{_host()}-*"):
        pid = left.name.rsplit("-", 2)[-2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staged(out: str | Path, may_replace: Callable[[Path], str | None]) -> Iterator[Path]:
    """A folder to fill; on a clean exit it becomes `out`, on any error it is removed and `out` is as it was.

    may_replace(existing non-empty folder) returns None when it may be replaced, else the reason why not (`UserError`).
    """
    out = Path(out).expanduser()
    if out.is_symlink():
        out = out.resolve()
    check_free(out, may_replace)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep_stale(out)
        stage = out.with_name(f".{out.name}.stage-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
        stage.mkdir()
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}).") from None
    try:
        with room_for(out):
            yield stage
            make_readable(stage)
            fsync_tree(stage)
            check_free(out, may_replace)  # again: minutes may have passed
            swap_in(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def make_readable(stage: Path) -> None:
    """Every file readable as any file of this user would be: safetensors writes 0600, which no server account could load."""
    umask = os.umask(0)
    os.umask(umask)
    for path in stage.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o666 & ~umask))


def check_free(out: Path, may_replace: Callable[[Path], str | None]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder to write.")
    sweep_parts(out)
    if any(out.iterdir()) and (why := may_replace(out)) is not None:
        raise UserError(f"{out}: {why}; nothing was written. Name another folder, or empty this one first.")


def swap_in(stage: Path, out: Path) -> None:
    """Make `stage` appear as `out`. What stood there ends under the stage's name, for the caller to remove."""
    if out.exists() and any(out.iterdir()):
        if not _exchange(stage, out):
            # No exchange on this system: two renames. A kill between them leaves the old
            # folder whole beside it, under .old-.
            old = out.with_name(stage.name.replace(".stage-", ".old-"))
            os.rename(out, old)
            os.rename(stage, out)
            shutil.rmtree(old, ignore_errors=True)
    else:
        if os.name == "nt" and out.exists():
            out.rmdir()
        os.rename(stage, out)
    fsync_path(out.parent)


def _exchange(a: Path, b: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, flag_exchange = -100, 2
    return call(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), flag_exchange) == 0
