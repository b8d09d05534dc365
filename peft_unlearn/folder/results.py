"""Result files: where the user named a place, and in an adapter's own folder, which may be read-only.

One rule for every ``--out``: a result replaces an earlier result of this package and nothing else. Earlier ones are known by
what is in them: a mark in a page or a picture, the keys of a JSON. Among the files of a model or an adapter no result is put
at all where it could be taken for one of them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reporting.document import HTML_MARK, Part, Picture, to_html, to_markdown
from ..reporting.figure import PNG_MARK
from ..reporting.result import Result
from ..reporting.text import json_text
from .atomic import NoRoom, write_bytes

KINDS = (".html", ".md", ".json", ".png")
MARKDOWN_MARK = "<!-- peft-unlearn: a result, replaced when its command runs again -->"
_JSON = tuple(map(frozenset, (
    ("format", "suite", "subjects", "details", "metrics", "versions"),  # eval
    ("verdicts", "missing", "notes"),  # report
    ("format", "max_scale", "scale_before", "baked"),  # calibrate
    ("format", "base_levels", "ranking", "behind"),  # compare
    ("format", "adapter_ids", "own", "cost"),  # interference
    ("format", "objectives", "points"),  # effect
    ("format", "method", "ratio", "density", "where"),  # attribute
)))  # fmt: skip
"""Keys that the JSON of a command always has."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing, as a user's error."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}).") from None


def check_place(path: Path, ours: Callable[[Path], bool] | None = None) -> Path:
    """Refuse a place where a result would lie upon something that is none, or pass for a file of a model or an adapter.

    ours: tells earlier results, default `is_result`.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name a file.")
    real = path.resolve()
    above = next(p for p in real.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path}: cannot be written ({above} is {'read-only' if above.is_dir() else 'a file'}).")
    if path.suffix.lower() not in (".html", ".png") and (what := _whose(real.parent)):
        raise UserError(
            f"{path}: is in the folder of {what}, among its files; nothing was written. Name another place."
        )
    if real.exists() and not (ours or is_result)(real):
        raise UserError(
            f"{path}: is there already, and is no earlier result of peft-unlearn; nothing was written. Name another file, or "
            "move that one away."
        )
    return path


def _whose(folder: Path) -> str | None:
    if (folder / "adapter_config.json").is_file():
        return "an adapter"
    holds = (folder / "config.json").is_file() and any(folder.glob("*.safetensors*"))
    return "a model" if holds else None


def is_result(path: Path) -> bool:
    """Whether a file is a result that this package wrote, by what is in it."""
    kind = path.suffix.lower()
    if not path.is_file() or kind not in KINDS:
        return False
    if kind == ".json":
        keys = read_keys(path)
        return any(known <= keys for known in _JSON)
    with path.open("rb") as file:
        if kind == ".md":
            file.seek(max(0, path.stat().st_size - 200))
            return file.read().rstrip().endswith(MARKDOWN_MARK.encode())
        mark = PNG_MARK if kind == ".png" else HTML_MARK.encode()
        return mark in file.read(2000)


def read_keys(path: Path, fits: Callable[[Any], bool] = lambda value: True) -> frozenset[str]:
    """The keys of the JSON object in a file, if every value `fits`; empty for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return frozenset()
    whole = isinstance(found, Mapping) and all(map(fits, found.values()))
    return frozenset(found) if whole else frozenset()


def write_file(out: str | Path, content: bytes | str, ours: Callable[[Path], bool] | None = None) -> Path:
    """A result file at a place the user named (see `check_place`), its folder made; whole or not at all."""
    path = check_place(Path(out).expanduser(), ours)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.encode("utf-8") if isinstance(content, str) else content)
    return path


def store(folder: Path, write: Callable[[], None]) -> None:
    """Keep numbers with the adapter they are of; where that cannot be, warn and go on, since measuring them took its time."""
    try:
        write()
    except (OSError, NoRoom) as e:
        why = e.strerror if isinstance(e, OSError) else "the disk is full"
        warnings.warn(
            f"{folder}: eval.json cannot be written ({why}), so these numbers are not stored; keep what is printed",
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
    if out is None or str(out) == "":
        return
    path = Path(out).expanduser()
    if path.suffix and path.suffix.lower() not in kinds:
        known = f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]
        raise UserError(f"{path}: give a name that ends in {known}, or a folder for all of them")
    if not path.suffix and path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, and its name says of no kind which; give a name that ends in {kinds[0]}")
    for place in _places(path):
        check_place(place)


def _places(path: Path) -> list[Path]:
    """What `save` writes, besides the pictures of a Markdown document."""
    return [path] if path.suffix else [path / f"{path.name}{suffix}" for suffix in (".html", ".md", ".json")]


def save(result: Result, out: str | Path, parts: Sequence[Part] = ()) -> list[Path]:
    """Write a result as .html, .md, .json or .png (its first picture), or all of them into a folder."""
    check_out(out)
    path = Path(out).expanduser()
    kind = path.suffix.lower()
    if kind == ".json":
        return [write_file(path, json_text(result.to_dict()) + "\n")]
    parts = parts or result.parts()
    if not kind:
        return [written for place in _places(path) for written in save(result, place, parts)]
    if kind == ".html":
        return [write_file(path, to_html(result.title, parts))]
    if kind == ".md":
        text, beside = to_markdown(result.title, parts, path.stem)
        pictures = {check_place(path.parent / name): png for name, png in beside.items()}
        return [
            write_file(path, f"{text}\n{MARKDOWN_MARK}\n"),
            *(write_file(name, png) for name, png in pictures.items()),
        ]
    picture = next((p.png for p in parts if isinstance(p, Picture)), None)
    if picture is None:
        raise UserError(f"{path}: there is nothing to draw here")
    return [write_file(path, picture)]
