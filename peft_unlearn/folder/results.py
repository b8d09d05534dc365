"""Result files: where the user named a place, and in an adapter's own folder, which may be read-only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing, as a user's error."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}).") from None


def write_file(out: str | Path, content: bytes | str) -> Path:
    """A result file at a place the user named, its folder made; whole or not at all."""
    path = Path(out).expanduser()
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file.")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        part.replace(path)
    return path


def store(folder: Path, write: Callable[[], None]) -> None:
    """Keep numbers with the adapter they are of; where that cannot be, warn and go on, since measuring them took its time."""
    try:
        write()
    except OSError as e:
        warnings.warn(
            f"{folder}: eval.json cannot be written ({e.strerror}), so these numbers are not stored; keep what is printed",
            stacklevel=3,
        )


def check_writable(folder: Path) -> None:
    """Refuse, before the work, a folder that its result could not be written into."""
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"{folder}: cannot be written into, and the scale is stored there; copy the folder, or look with --n."
        )
