"""`remove`: take a forget adapter off, with proof, from whatever the user holds (the proof itself is in `removal`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.base import resolve_base
from .model import ForgetModel
from .removal import RemovalReport, take_off


def remove(what: str | Path | ForgetModel | Any, base: str | Path | None = None) -> RemovalReport:
    """Unload every adapter and prove the result.

    what: an adapter folder (loaded on `base`, by default its manifest's), a `ForgetModel` (its `.model` becomes the
    plain base), or a PeftModel together with `base`. Raises `UserError` for input that cannot be loaded; never for a
    failed proof.
    """
    if isinstance(what, str | Path):
        what = ForgetModel.from_pretrained(base, what)
    if isinstance(what, ForgetModel):
        return what.remove()
    if base is None:
        raise UserError("remove(model): say which files the base came from, with base=.")
    return take_off(what, resolve_base(None, override=base))[1]
