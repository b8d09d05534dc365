"""Checkpoints of a run: which are whole, whose they are, and how the trained adapter comes back from one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import UserError
from ..folder.read import file_sha256

STATE = (
    "unlearn_state.pt"  # written last into a checkpoint: the hashes of all other files, and what the run keeps in mind
)
_WEIGHTS = "adapter_model.safetensors"
_TRAINER = "trainer_state.json"
_BROKEN = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
_NEEDED = (_TRAINER, "optimizer.pt", "scheduler.pt")  # without these the Trainer starts anew in silence


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in `folder` that can be gone on from, or None. Newer ones that cannot are told of in a warning."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for place in sorted(found, key=lambda p: -int(p.name.rpartition("-")[2])):
        if (why := problem(place)) is None:
            return str(place)
        warnings.warn(f"{place} is no whole checkpoint and is passed over: {why}", stacklevel=2)
    return None


def problem(folder: str | Path) -> str | None:
    """Why the run cannot go on from a checkpoint as if it had never stopped; None where it can.

    A checkpoint is whole if every file that was written is there with the bytes that it had; the best one so far, where the run
    keeps one, must be so too.
    """
    folder = Path(folder)
    if why := damage(folder):
        return why
    if lost := [n for n in _NEEDED if not (folder / n).is_file()]:
        return f"{', '.join(lost)} missing (was it saved with save_only_model?)"
    best = best_beside(folder)
    if best is not None and best.name != folder.name and (why := damage(best)):
        return f"the best checkpoint of the run so far, {best.name}, is not whole: {why}"
    return None


def best_beside(folder: Path) -> Path | None:
    """The best checkpoint of the run when `folder` was written, which lies beside it, wherever both were moved to."""
    best = _trainer_state(folder).get("best_model_checkpoint")
    return folder.parent / Path(best).name if best else None


def damage(folder: Path) -> str | None:
    """What of a checkpoint's files is missing or changed, or None."""
    if not (folder / STATE).is_file():
        return f"{STATE} is missing, which is written last"
    try:
        files = _load(folder).get("files", {})  # earlier development versions wrote none
    except UserError as e:
        return str(e)
    if lost := sorted(n for n in files if not (folder / n).is_file()):
        return f"{', '.join(lost)} missing"
    changed = sorted(n for n, sha in files.items() if file_sha256(folder / n) != sha)
    return f"{', '.join(changed)} not as written (cut short or changed)" if changed else None


def stopped(folder: str | Path) -> bool:
    """Whether a callback had ended the run at this checkpoint, before its last step."""
    state = _trainer_state(Path(folder))
    control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
    ended = bool((control.get("args") or {}).get("should_training_stop"))
    return ended and state.get("global_step", 0) < state.get("max_steps", 0)


def _trainer_state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / _TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Seal a checkpoint: `state`, and the hashes of all files that lie there."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    stage = folder / f"{STATE}.part"
    files = {n: file_sha256(p) for n, p in files.items() if n not in (STATE, stage.name)}
    torch.save({**state, "files": files}, stage)
    os.replace(stage, folder / STATE)


def read_state(folder: str | Path, run: str) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        UserError: the checkpoint is cut short, or another run's (`run` is this run's fingerprint).
    """
    if why := problem(folder):
        raise UserError(f"{folder} is no whole checkpoint: {why}")
    state = _load(Path(folder))
    if state.get("run", run) != run:
        raise UserError(
            f"{folder} is a checkpoint of another run: terms, rule, reference, data, seed or rows per step differ; resume with "
            "the recipe it was started with, or start anew with another output folder"
        )
    return state


def _load(folder: Path) -> dict[str, Any]:
    state = None
    try:
        with zipfile.ZipFile(folder / STATE) as members:
            if members.testzip() is None:  # torch does not look at the checksums that it writes
                state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, NotImplementedError, *_BROKEN):
        pass
    if not isinstance(state, dict):
        raise UserError(f"{STATE} cannot be read (cut short or changed)")
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
