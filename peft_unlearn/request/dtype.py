"""Which number format a base is computed in: its own, where this machine is fast in it."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path

from ..folder.base import load_config


def fast_dtype(base: str | Path) -> str:
    """The dtype that the base's files are in, "float32" where matrix products in it are slower here than those in float32.

    CPUs without AVX512-BF16 or AMX emulate bfloat16 tens of times slower than float32; so both are tried.
    """
    import torch

    own = str(getattr(load_config(Path(base)).get_text_config(), "dtype", None) or "float32").removeprefix("torch.")
    if own not in ("bfloat16", "float16") or torch.accelerator.is_available():
        return own if own != "float16" else "float32"
    return own if own == "bfloat16" and _seconds("bfloat16") < _seconds("float32") else "float32"


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
