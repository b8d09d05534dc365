"""Result files: where the user named a place, and in an adapter's own folder, which may be read-only."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..reporting.document import Part, Picture, to_html, to_markdown
from ..reporting.result import Result
from .atomic import write_bytes

KINDS = (".html", ".md", ".json", ".png")


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
        write_bytes(path, content.encode("utf-8") if isinstance(content, str) else content)
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


def check_out(out: str | Path | None, kinds: Sequence[str] = KINDS) -> None:
    """Refuse a file that `save` could not write; before any work."""
    path = Path(out or "").expanduser()
    if path.suffix and path.suffix.lower() not in kinds:
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise UserError(f"{path}: give a name that ends in {known}, or a folder for all of them")
    if path.suffix and path.is_dir():
        raise UserError(f"{path}: is a folder; name a file.")


def save(result: Result, out: str | Path, parts: Sequence[Part] = ()) -> list[Path]:
    """Write a result as .html, .md, .json or .png (its first picture), or all of them into a folder."""
    check_out(out)
    path = Path(out).expanduser()
    kind = path.suffix.lower()
    if kind == ".json":
        return [write_file(path, json.dumps(result.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n")]
    parts = parts or result.parts()
    if not kind:
        return [p for suffix in (".html", ".md", ".json") for p in save(result, path / f"{path.name}{suffix}", parts)]
    if kind == ".html":
        return [write_file(path, to_html(result.title, parts))]
    if kind == ".md":
        text, beside = to_markdown(result.title, parts, path.stem)
        return [write_file(path, text), *(write_file(path.parent / name, png) for name, png in beside.items())]
    picture = next((p.png for p in parts if isinstance(p, Picture)), None)
    if picture is None:
        raise UserError(f"{path}: there is nothing to draw here")
    return [write_file(path, picture)]
