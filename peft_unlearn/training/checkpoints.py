"""Checkpoints of a run: which are whole, whose they are, and how the trained adapter comes back from one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import UserError

STATE = "unlearn_state.pt"  # written last into a checkpoint: its presence means that the checkpoint is whole
_WEIGHTS = "adapter_model.safetensors"


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in `folder`, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / STATE).is_file()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Seal a checkpoint."""
    stage = folder / f"{STATE}.part"
    torch.save(dict(state), stage)
    os.replace(stage, folder / STATE)


def read_state(folder: str | Path, run: str) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        UserError: the checkpoint is cut short, or another run's (`run` is this run's fingerprint).
    """
    if not Path(folder, STATE).is_file():
        raise UserError(f"{folder} is no whole checkpoint: {STATE} is missing")
    state = torch.load(Path(folder, STATE), map_location="cpu", weights_only=True)
    if state.get("run", run) != run:
        raise UserError(
            f"{folder} is a checkpoint of another run: terms, rule, reference, data, seed or rows per step differ; resume with "
            "the recipe it was started with, or start anew with another output folder"
        )
    return state


def fingerprint(*parts: Any) -> str:
    """sha256 of what decides the stream of steps; lengths and schedules may change between start and resume."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def load_adapter(model: Any, folder: str | Path, name: str) -> None:
    """Put the adapter `name` of a checkpoint into `model`.

    Not the Trainer's own way: that loads into the *first* active adapter, which on a stack is somebody else's.
    """
    from peft import set_peft_model_state_dict

    path = Path(folder, _WEIGHTS) if name == "default" else Path(folder, name, _WEIGHTS)
    if not path.is_file():
        raise UserError(f"{folder} holds no adapter {name!r}")
    device = str(next(model.parameters()).device)
    set_peft_model_state_dict(model, load_file(path, device=device), adapter_name=name)
