"""An adapter's two files as stock PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..folder.read import CONFIG, WEIGHTS
from ..folder.safetensors_io import ordered

COMPACT = "expert_lora"  # subfolder with the compact form of an expert adapter, beside its stock form
SPARSE_COMPACT = "sparse"  # and of a sparse adapter


def write_stock(
    folder: Path,
    config: Any,
    tensors: dict[str, Tensor],
    base_name: str = "",
    revision: str | None = None,
    metadata: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `tensors` and the ``PeftConfig`` into an existing folder; equal ones are equal bytes in every process.

    Args:
        base_name: what the configuration calls the base: a Hub id or nothing, never a path; with its `revision`.
        metadata: further texts in the header of the tensors' file.
        more: further keys of the configuration.
    """
    (folder / WEIGHTS).write_bytes(
        ordered(save(tensors, {"format": "pt", **metadata})) if metadata else save(tensors, {"format": "pt"})
    )
    values = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base_name, "revision": revision}
    values |= more or {}
    values = {
        k: sorted(v) if isinstance(v, set) else v for k, v in values.items()
    }  # a set's order is each process's own
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
