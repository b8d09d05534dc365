"""forget-stack.yaml: which adapters a deployment runs, for which requests, at which scale; a ledger and a lock file.

Every adapter is named by its id, the sha256 of its weights, and by one over the list of its other files' hashes: what is
loaded is what was added, or nothing is. Entries are never taken out of the ledger; revoking marks them. Writing is atomic,
and two writers at once wait for each other. Dates are UTC.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError, nearest
from ..folder import schema as s
from ..folder.atomic import locked, write_text
from ..folder.fetch import commit_of, is_hub_id, resolve_adapter, split_reference
from ..folder.manifest import BaseRef
from ..folder.read import MANIFEST, AdapterFolder, read_adapter
from ..folder.yaml_io import dump_yaml, read_yaml
from ..reporting.result import Result
from ..reporting.tables import Table, to_text
from .names import FORM, stem

FORMAT = 1
NAME = "forget-stack.yaml"


@dataclass
class Entry:
    """One adapter. source: a Hub id, or a folder relative to the stack file; request: id, date, reason; revoked: date, reason."""

    name: str
    source: str
    adapter_id: str
    files: str
    request: dict[str, Any]
    revision: str | None = None
    scale: float = 1.0
    status: str = "active"
    depends_on: list[str] = field(default_factory=list)
    revoked: dict[str, Any] | None = None


@dataclass
class Stack(Result):
    """A stack file as read; `entries` in stacking order, revoked ones among them. changed: names that `add` or `revoke` wrote."""

    path: Path
    base: BaseRef
    entries: list[Entry] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @property
    def active(self) -> list[Entry]:
        return [e for e in self.entries if e.status == "active"]

    def scales(self) -> dict[str, float]:
        return {e.name: e.scale for e in self.active}

    def entry(self, name: str) -> Entry:
        found = [e for e in self.entries if e.name == name]
        if not found:
            raise UserError(f"{self.path}: holds no adapter {name!r}.{nearest(name, [e.name for e in self.entries])}")
        return found[0]

    def folders(self) -> dict[str, AdapterFolder]:
        """The active adapters' folders, fetched if they lie on the Hub, read and compared with what was added.

        Raises:
            UserError: none is active; one is missing, damaged, or another adapter than the one added.
        """
        if not self.active:
            raise UserError(f"{self.path}: no adapter of this stack is active; the base itself is what it describes.")
        out = {}
        for e in self.active:
            where = e.source if e.revision else self.path.parent / e.source
            folder = read_adapter(resolve_adapter(where, e.revision))
            pairs = {"weights": (folder.adapter_id, e.adapter_id), "files": (files_id(folder), e.files)}
            for what, (found, added) in pairs.items():
                if found != added:
                    raise UserError(
                        f"{self.path}: {e.name} ({e.source}) is not the adapter that was added: its {what} are {found[:19]}, "
                        f"the stack has {added[:19]}. Put the old one back, or revoke {e.name} and add the new one."
                    )
            out[e.name] = folder
        return out

    def __str__(self) -> str:
        """The ledger for people: one line per adapter."""
        head = ("name", "request", "date", "status", "scale", "adapter", "reason")
        rows = []
        for e in self.entries:
            status = e.status if e.revoked is None else f"revoked {str(e.revoked['date'])[:10]}"
            why = str((e.revoked or {}).get("reason") or "")
            reason = f"{e.request['reason']} [revoked: {why}]" if why else str(e.request["reason"])
            asked = str(e.request["id"]), str(e.request["date"])[:10]
            rows.append((e.name, *asked, status, f"{e.scale:g}", e.adapter_id[7:19], reason))
        return to_text(Table(head, rows, words=True), width=1 << 30)

    def to_dict(self) -> dict[str, Any]:
        base = {k: getattr(self.base, k) for k in ("ref", "revision", "digest")}
        rows = [{k: v for k, v in asdict(e).items() if k != "revoked" or v is not None} for e in self.entries]
        return {"format": FORMAT, "base": base, "adapters": rows}


def files_id(folder: AdapterFolder) -> str:
    """One sha256 over what a manifest says of its files: configuration, compact form and tokenizer count, not the scale,
    evaluation and card, which may be written again."""
    listed = sorted((n, sha) for n, sha in folder.manifest.files.items() if sha is not None)
    return f"sha256:{hashlib.sha256(json.dumps(listed).encode()).hexdigest()}"


def is_stack(path: str | Path) -> bool:
    """Whether `path` means a stack file: a file, or a folder that holds one and is no adapter itself."""
    folder = Path(path).expanduser()
    return folder.is_file() or ((folder / NAME).is_file() and not (folder / MANIFEST).is_file())


def load(path: str | Path) -> Stack:
    """Read a stack file (or the folder that holds one).

    Raises:
        UserError: no file, not a stack, an unknown format; everything wrong with its entries at once.
    """
    path = _file(path)
    if not path.exists():
        raise UserError(f"{path}: no such stack file; `peft-unlearn stack add` makes one.")
    raw = read_yaml(path)
    if not isinstance(raw, dict) or "format" not in raw:
        raise UserError(f"{path}: not a stack file (a mapping with format, base and adapters).")
    if raw["format"] != FORMAT or isinstance(raw["format"], bool):
        raise UserError(
            f"{path}: stack format {raw['format']!r} is unknown to this version, which reads format {FORMAT}; a newer "
            "peft-unlearn wrote it (pip install -U peft-unlearn)."
        )
    errors = Errors()
    _STACK(raw, "", errors)
    errors.raise_if_any(str(path))
    entries = [Entry(**row) for row in raw["adapters"]]
    names = [e.name for e in entries]
    for twice in sorted({n for n in names if names.count(n) > 1}):
        errors.add(f"two adapters are called {twice!r}")
    for i, e in enumerate(entries):
        if (e.status == "revoked") != (e.revoked is not None):
            there = "is missing" if e.revoked is None else "is there"
            errors.add(f"adapters[{i}]: status is {e.status}, and `revoked` {there}")
    errors.raise_if_any(str(path))
    return Stack(path, BaseRef(**raw["base"]), entries)


def _holding(*keys: str) -> s.Shape:
    return s.shape(f"a mapping with {', '.join(keys)}", lambda v: isinstance(v, dict) and set(keys) <= set(v))


_ID = s.matching("sha256:[0-9a-f]{64}", "sha256:..")

_ENTRY = s.record(
    {
        "name": s.matching(FORM, "letters, digits, _ and - only"), "source": s.TEXT, "adapter_id": _ID, "files": _ID,
        "request": _holding("id", "date", "reason"), "revision": s.maybe(s.TEXT), "scale": s.FINITE,
        "status": s.one_of("active", "revoked"), "depends_on": s.list_of(_ID), "revoked": s.maybe(_holding("date", "reason")),
    },
    required=("name", "source", "adapter_id", "files", "request", "status"),
)  # fmt: skip
_BASE = s.record({"ref": s.TEXT, "digest": s.TEXT, "revision": s.maybe(s.TEXT)}, required=("ref", "digest"))
_STACK = s.record({"format": s.ANY, "base": _BASE, "adapters": s.list_of(_ENTRY)}, required=("base", "adapters"))


def save(stack: Stack) -> None:
    """Write the file whole; `load` reads the same back."""
    try:
        stack.path.parent.mkdir(parents=True, exist_ok=True)
        body = dump_yaml(stack.to_dict(), str(stack.path), width=120)
        write_text(stack.path, f"# The forget adapters of one deployment. Change it with `peft-unlearn stack`.\n{body}")
    except OSError as e:
        raise UserError(f"{stack.path}: cannot be written ({e.strerror}).") from None


def add(
    path: str | Path,
    adapter: str | Path,
    *,
    request_id: str,
    reason: str,
    scale: float | None = None,
    name: str | None = None,
    date: datetime | None = None,
) -> Stack:
    """Put an adapter on top of a stack and write the file, which the first one makes.

    Args:
        adapter: a folder, a Hub id or ``id@commit``; written down with the commit that was found.
        request_id, reason: of the request that the adapter answers.
        scale: default the adapter's own. name: default its folder's.

    Raises:
        UserError: the adapter is damaged, stands on another base, is there already, was revoked here, or needs adapters
            that are not active in this stack. Nothing is written then.
    """
    if not str(request_id).strip() or not str(reason).strip():
        raise UserError("stack: an entry of the ledger needs the request's id and its reason.")
    folder = read_adapter(resolve_adapter(adapter))
    file, label = _file(path), name or stem(adapter)
    chosen = float(folder.manifest.scale if scale is None else scale)
    if not math.isfinite(chosen):
        raise UserError(f"stack: scale should be a finite number, found {scale!r}.")
    if not re.fullmatch(FORM, label):
        raise UserError(
            f"stack: the name {label!r} cannot be used: letters, digits, _ and - only; give another (--name)."
        )
    if is_hub_id(adapter):
        source, revision = split_reference(str(adapter))[0], commit_of(folder.path)
    else:
        source, revision = os.path.relpath(folder.path.resolve(), file.resolve().parent), None
    entry = Entry(
        label, source, folder.adapter_id, files_id(folder),
        {"id": str(request_id), "date": _utc(date), "reason": str(reason)}, revision, chosen,
        depends_on=list(folder.manifest.depends_on),
    )  # fmt: skip
    with _locked(file):
        stack = load(file) if file.exists() else Stack(file, replace(folder.manifest.base, digest_targeted=None))
        _refuse_entry(stack, folder, label)
        stack.entries.append(entry)
        stack.changed = [label]
        save(stack)
    return stack


def _refuse_entry(stack: Stack, folder: AdapterFolder, label: str) -> None:
    where, base = stack.path, folder.manifest.base
    if base.digest != stack.base.digest:
        raise UserError(
            f"{folder.path}: was trained on the base {base.ref} with digest {base.digest[:12]}, and {where} stands on "
            f"{stack.base.ref} with digest {stack.base.digest[:12]}: other weights, on which this adapter means nothing."
        )
    if label in {e.name for e in stack.entries}:
        raise UserError(f"{where}: has an adapter called {label!r} already; give this one another name (--name).")
    ids = {e.adapter_id: e for e in stack.entries}
    if same := ids.get(folder.adapter_id):
        if same.revoked is None:
            raise UserError(f"{folder.path}: is in {where} already, as {same.name}.")
        raise UserError(
            f"{folder.path}: was revoked in {where} on {str(same.revoked['date'])[:10]} as {same.name} "
            f"({same.revoked['reason']}); a revoked adapter does not come back into its stack. Train a new one."
        )
    for need in folder.manifest.depends_on:
        below = ids.get(need)
        if below is None or below.status != "active":
            gone = "is not in" if below is None else f"({below.name}) was revoked in"
            raise UserError(
                f"{folder.path}: was trained on top of {need[:19]}, which {gone} {where}. "
                + ("Add that first." if below is None else "It means nothing without it; train it anew.")
            )


def revoke(
    path: str | Path, name: str, reason: str = "", *, cascade: bool = False, date: datetime | None = None
) -> Stack:
    """Mark an adapter as revoked and write the file; the names are in `changed`. What is loaded from it afterwards is what
    it would be had the adapter never been added.

    Raises:
        UserError: no such adapter, revoked already, or active ones were trained on top of it (with `cascade` they are
            revoked too).
    """
    file = _file(path)
    with _locked(file):
        stack = load(file)
        entry = stack.entry(name)
        if entry.revoked is not None:
            raise UserError(f"{file}: {name} was revoked on {str(entry.revoked['date'])[:10]} already.")
        gone = [entry]
        for e in stack.active:  # dependencies stand below, so one pass finds all
            if e not in gone and {g.adapter_id for g in gone} & set(e.depends_on):
                gone.append(e)
        if len(gone) > 1 and not cascade:
            above = ", ".join(e.name for e in gone[1:])
            raise UserError(
                f"{file}: {above} {'was' if len(gone) == 2 else 'were'} trained on top of {name} and would mean something "
                "else without it. Revoke those first, or all together with --cascade."
            )
        now, with_it = _utc(date), f"with {name}: {reason}" if reason else f"with {name}"
        for e in gone:
            e.status, e.revoked = "revoked", {"date": now, "reason": reason if e is entry else with_it}
        stack.changed = [e.name for e in gone]
        save(stack)
    return stack


def _utc(date: datetime | None) -> str:
    return (date or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    return path / NAME if path.is_dir() else path


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Writers of one stack wait for each other, else the later one would drop what the earlier one added."""
    with ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(file.with_name(f".{file.name}.lock")))
        except OSError as e:
            raise UserError(f"{file}: cannot be written ({e.strerror}).") from None
        yield
