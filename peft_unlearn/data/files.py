"""Where rows come from: files of several kinds, sets on the Hub, tables and lists. What a row means is `formats`' business."""

from __future__ import annotations

import csv
import inspect
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.\[\]%-]+)?(\?config=[\w.-]+)?$")
_CELL = 2**31 - 1
"""The longest csv cell in characters; the csv module's own limit of 131,072 is shorter than many a document."""
Pairs = Iterator[tuple[str, Any]]


def pairs_of(source: Any, origin: str) -> Pairs:
    """(place, row) of a file, several files, a Hub id, a `datasets` object, a data frame or a list of rows or texts.

    Raises:
        UserError: it cannot be read, naming the file and the place in it.
    """
    if isinstance(source, (str, Path)):
        return read_file(source)
    if hasattr(source, "columns") and (rows := getattr(source, "to_dicts", None) or getattr(source, "to_dict", None)):
        return _numbered(rows() if hasattr(source, "to_dicts") else rows("records"))  # polars, pandas
    if isinstance(source, Mapping):
        raise UserError(f"{origin}: a mapping is not a list of rows; name one split")
    if not isinstance(source, Iterable):
        raise UserError(f"{origin}: cannot read rows from a {type(source).__name__}")
    given = list(source)
    if given and all(isinstance(s, Path) or (isinstance(s, str) and s.lower().endswith(SUFFIXES)) for s in given):
        return ((f"{file}: {where}", row) for file in given for where, row in read_file(file))
    return _numbered({"text": r} if isinstance(r, str) else r for r in given)


def _numbered(rows: Iterable[Any]) -> Pairs:
    return ((f"row {i}", row) for i, row in enumerate(rows))


def read_file(source: str | Path) -> Pairs:
    """(place, row) of one file, or of a Hub id (``owner/name``, ``owner/name@revision:split?config=NAME``)."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    try:
        there = path.exists()
    except OSError:  # e.g. a name longer than a file system takes
        there = False
    if not there:
        if isinstance(source, str) and suffix not in SUFFIXES and _HUB_ID.match(source):
            rest, _, config = source.partition("?config=")
            rest, _, split = rest.partition(":")
            repo, _, revision = rest.partition("@")
            return _numbered(hub_rows(source, repo, config or None, revision=revision, split=split or "train"))
        raise UserError(f"{source}: no such file, and not a Hub id (owner/name, owner/name@revision:split?config=NAME)")
    if path.is_dir():
        raise UserError(f"{source}: is a folder; a set is a file ({', '.join(SUFFIXES)})")
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file {suffix!r}; wanted {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _numbered(_parquet(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{source}: is not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise UserError(f"{source}: cannot be read ({e.strerror})") from e
    if suffix == ".txt":
        return iter([("the file", {"text": text})] if text.strip() else [])
    kinds = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
    return kinds[suffix](text, str(source))


def _json_lines(text: str, source: str) -> Pairs:
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {i}", parse_json(line, f"{source}: line {i}")


def _json(text: str, source: str) -> Pairs:
    """A list of rows; or JSON lines, which `datasets` and the TOFU set write under this name too."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    try:
        lines = bool(found := json.loads(first)) and isinstance(found, dict)
    except (ValueError, RecursionError):
        lines = False
    if lines:
        yield from _json_lines(text, source)
        return
    rows = parse_json(text, source)
    if not isinstance(rows, list):
        raise UserError(f"{source}: holds one {type(rows).__name__}, not a list of rows")
    yield from _numbered(rows)


def _csv(text: str, source: str) -> Pairs:
    before = csv.field_size_limit(_CELL)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = list(reader.fieldnames or ())
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise UserError(f"{source}: the header names {', '.join(map(repr, twice))} twice")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{source}: line {reader.line_num} has not as many columns as the header")
            yield f"line {reader.line_num}", row
    except csv.Error as e:
        raise UserError(f"{source}: line {reader.line_num} is not valid csv: {e}") from e
    finally:
        csv.field_size_limit(before)


def parse_json(text: str, where: str) -> Any:
    """JSON whose objects name every key once; `UserError` naming the place."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [k for k, _ in pairs]
            raise UserError(f"{where} names the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as e:
        raise UserError(f"{where} is not valid JSON: {e.msg} (column {e.colno})") from e
    except (ValueError, RecursionError) as e:  # a number of too many digits, or too deep a nesting
        raise UserError(f"{where} is not valid JSON: {e}") from e


def _parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as e:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'peft-unlearn[data]'") from e
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as e:  # pyarrow has no one error class for foreign and truncated files
        raise UserError(f"{path}: is not a readable parquet file: {e}") from e


def hub_rows(
    ref: str, repo: str, config: str | None = None, revision: str = "", split: str = "train"
) -> list[dict[str, Any]]:
    """Rows of a data set on the Hub; `ref` is what the user called it."""
    try:
        import datasets
    except ImportError as e:
        raise UserError(f"{ref}: a Hub data set needs datasets: pip install 'peft-unlearn[data]'") from e
    # datasets 3 asks on stdin whether to run a script of the repository; 4 knows no scripts
    asks = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
    no_code: dict[str, Any] = {"trust_remote_code": False} if asks else {}
    try:
        rows = datasets.load_dataset(repo, config, revision=revision or None, split=split, **no_code)
    except Exception as e:  # the Hub client raises a dozen unrelated classes
        raise UserError(f"{ref}: could not be loaded from the Hub: {e}") from e
    return [dict(row) for row in rows]


def find_file(folder: Path, *names: str) -> Path | None:
    """The first file of a kind in `SUFFIXES` that has one of these names, in a folder."""
    return next((f for name in names for s in SUFFIXES if (f := folder / f"{name}{s}").is_file()), None)
