"""What each of several adapters is called, and at which scale it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError, nearest
from ..folder.fetch import is_hub_id, split_reference
from ..folder.read import AdapterFolder

Adapters = str | Path | Sequence[str | Path] | Mapping[str, str | Path]
Scales = Sequence[float] | Mapping[str, float] | None
FORM = r"(?!__base__\Z)[A-Za-z0-9_-]+"  # PEFT uses the name as a module's: no dots; and has a meaning for __base__


def stem(ref: str | Path) -> str:
    """A name for the adapter at `ref`: the last part of its folder or Hub id."""
    text = split_reference(str(ref))[0] if is_hub_id(ref) else str(ref)
    return re.sub(r"[^A-Za-z0-9_-]", "_", Path(text).expanduser().resolve().name)


def names_of(adapters: Adapters, alone: str = "default") -> dict[str, str | Path]:
    """Name -> folder or Hub id: a mapping's keys, else the folders' names; one adapter alone is called `alone`.

    Raises:
        UserError: no adapter, or a name that PEFT cannot use.
    """
    if isinstance(adapters, Mapping):
        named = {str(k): v for k, v in adapters.items()}
    else:
        refs = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        named = {}
        for ref in refs:
            first = stem(ref) if len(refs) > 1 else alone
            name, k = first, 2
            while name in named:
                name, k = f"{first}_{k}", k + 1
            named[name] = ref
    if not named:
        raise UserError("No adapter was given.")
    for name in named:
        if not re.fullmatch(FORM, name):
            raise UserError(f"The adapter name {name!r} cannot be used: letters, digits, _ and - only.")
    return named


def scales_of(folders: Mapping[str, AdapterFolder], scales: Scales) -> dict[str, float]:
    """Name -> scale: as given, by name or in order, else each manifest's own. Raises `UserError` for one of no adapter."""
    out = {name: float(f.manifest.scale) for name, f in folders.items()}
    if isinstance(scales, Mapping):
        for name in scales:
            if name not in out:
                raise UserError(f"scales: there is no adapter {name!r}.{nearest(str(name), out)}")
        out.update(scales)
    elif scales is not None:
        if len(scales) != len(out):
            raise UserError(f"scales: {len(scales)} given for {len(out)} adapters.")
        out = dict(zip(out, scales, strict=True))
    return out
