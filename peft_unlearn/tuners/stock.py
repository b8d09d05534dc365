"""An adapter's two files as stock PEFT reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..folder.read import CONFIG, WEIGHTS

COMPACT = "expert_lora"  # subfolder with the compact form of an expert adapter, beside its stock form


def write_stock(
    folder: Path, config: Any, tensors: dict[str, Tensor], base_name: str = "", revision: str | None = None
) -> None:
    """Write `tensors` and the ``PeftConfig`` into an existing folder; equal ones are equal bytes in every process.

    Args:
        base_name: what the configuration calls the base: a Hub id or nothing, never a path; with its `revision`.
    """
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    values = {**config.to_dict(), "inference_mode": True, "base_model_name_or_path": base_name, "revision": revision}
    values = {
        k: sorted(v) if isinstance(v, set) else v for k, v in values.items()
    }  # a set's order is each process's own
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
