"""`remove`: take forget adapters off, with proof, from whatever the user holds (the proof itself is in `removal`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.base import resolve_base
from ..folder.merge_record import RECORD, read_record
from .model import ForgetModel
from .removal import RemovalReport, take_off
from .stackfile import is_stack


def remove(
    what: str | Path | ForgetModel | Any,
    base: str | Path | None = None,
    name: str | None = None,
    cascade: bool = False,
) -> RemovalReport:
    """Unload every adapter, or the one called `name`, and prove the result.

    what: an adapter's folder or Hub id (loaded on `base`, by default its manifest's), a stack file, a `ForgetModel` (its
    `.model` becomes the plain base, or goes on without that one), or a PeftModel together with `base`. cascade: with `name`
    also those that were trained on top of it.

    Raises:
        UserError: input that cannot be loaded, a merged model, an adapter that others stand on; never a failed proof.
    """
    if isinstance(what, str | Path):
        refuse_merged(what)
        if is_stack(what):
            what = ForgetModel.from_stack(what, base)
        elif name is not None:
            raise UserError(f"remove {what}: --name says which adapter of a stack file, and this is no stack file.")
        else:
            what = ForgetModel.from_pretrained(base, what)
    if isinstance(what, ForgetModel):
        return what.remove(name, cascade)
    if base is None:
        raise UserError("remove(model): say which files the base came from, with base=.")
    return take_off(what, resolve_base(None, override=base))[1]


def refuse_merged(folder: str | Path) -> None:
    """Raise the `UserError` that says what to do where `folder` is a model into which adapters were merged."""
    path = Path(folder).expanduser()
    record = read_record(path) if path.is_dir() else None
    if record is not None:
        base = record.get("base") or {}
        ref = str(base.get("ref", "its base")) + (f" at {base['revision']}" if base.get("revision") else "")
        ids = [str(a.get("adapter_id", ""))[:19] for a in record.get("adapters") or [] if isinstance(a, dict)]
        raise UserError(
            f"{path}: is a merged model ({RECORD}): {', '.join(ids) or 'its adapters'} {'are' if len(ids) > 1 else 'is'} in the "
            "rounded weights, and subtracting gives other bits than the base's. To be rid of it, delete this folder and load the "
            f"base again: {ref}, whose digest is {str(base.get('digest', 'unknown'))[:12]}."
        )
    if path.is_dir() and (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: is a whole model, not an adapter; there is nothing on it to take off. If an adapter was merged into it, "
            "delete it and load the base again."
        )
