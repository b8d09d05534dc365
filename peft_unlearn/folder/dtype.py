"""Which number format a base is computed in: its own, where this machine is fast in it."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from ..data import embedded
from ..errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def own_dtype(base: str | Path) -> str:
    """The dtype that the base's configuration names; float32 where it names none of `DTYPES`."""
    from .base import load_config

    own = str(getattr(load_config(Path(base)).get_text_config(), "dtype", None)).removeprefix("torch.")
    return own if own in DTYPES else "float32"


def fast_dtype(base: str | Path) -> str:
    """bfloat16 for a base in bfloat16 whose products are no slower in it here than in float32, else float32.

    CPUs without AVX512-BF16 or AMX emulate bfloat16 tens of times slower than float32; so both are tried. The embedded bases are always
    computed in float32, as they were trained.
    """
    import torch

    if own_dtype(base) != "bfloat16" or _embedded(Path(base)):
        return "float32"
    return "bfloat16" if torch.accelerator.is_available() or _seconds("bfloat16") < _seconds("float32") else "float32"


def dtype_of(given: str, base: str | Path) -> str:
    """What a user said (``auto``: `fast_dtype`), checked."""
    if given != "auto" and given not in DTYPES:
        raise UserError(f"dtype {given!r}: expected auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    return fast_dtype(base) if given == "auto" else given


def _embedded(base: Path) -> bool:
    try:
        return base.resolve().parent == embedded.asset("bases").resolve()
    except UserError:
        return False


@lru_cache(maxsize=4)
def _seconds(dtype: str) -> float:
    import torch

    a = torch.ones((128, 512), dtype=getattr(torch, dtype))
    b = torch.ones((512, 512), dtype=getattr(torch, dtype))
    torch.mm(a, b)
    began = time.perf_counter()
    for _ in range(3):
        torch.mm(a, b)
    return time.perf_counter() - began
