"""Changing an adapter's scale on disk: in forget.json alone, or baked into what plain PEFT reads."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import staged, write_text
from .card import regenerated
from .manifest import Probes
from .read import CARD, CONFIG, MANIFEST, AdapterFolder, file_sha256, read_adapter
from .write import check_destination


def set_scale(folder: str | Path, scale: float) -> AdapterFolder:
    """Write `scale` into forget.json, whole or not at all, and the card anew. The adapter's id stays: it is its weights'.

    `ForgetModel`, `merge` and every command here use it; plain PEFT goes on at 1, since lora_alpha is untouched.
    """
    found = read_adapter(folder)
    manifest = replace(found.manifest, scale=_checked(scale))
    write_text(found.path / MANIFEST, manifest.text())
    if (card := regenerated(replace(found, manifest=manifest))) is not None:
        write_text(found.path / CARD, card)
    return read_adapter(found.path)


def bake(folder: str | Path, scale: float, probes: Probes | None = None) -> AdapterFolder:
    """Multiply lora_alpha (and alpha_pattern) by `scale` in every adapter_config.json, so that plain PEFT runs at it too.

    forget.json then says scale 1, names the factor under method.baked_scale, and has the new files' hashes; a second baking
    multiplies. The weights stay as they are, and so does the adapter's id. The folder is replaced as a whole.

    probes: those at the new scale; None drops the manifest's, whose adapter half would no longer be true.
    """
    found = read_adapter(folder)
    scale = _checked(scale)
    if not scale:
        raise UserError(f"{found.path}: baking scale 0 would leave an adapter that does nothing; take it off instead.")
    if found.config.get("lora_alpha") is None:
        raise UserError(
            f"{found.path}: is of type {found.config['peft_type']}, whose files have no factor to be multiplied; calibrate without "
            f"--bake, or write the adapter at that scale as one of its own: peft-unlearn compose {found.path}:{scale:g} --out DIR"
        )
    for path in sorted(found.path.rglob(CONFIG)):
        if json.loads(path.read_text(encoding="utf-8")).get("train_router") == "full":
            raise UserError(
                f"{found.path}: holds whole routers, whose change lora_alpha does not scale; calibrate without --bake."
            )
    check_destination(found.path)  # nobody else's files in it
    out = found.path.resolve()
    with staged(out, lambda _: None) as stage:
        shutil.copytree(out, stage, dirs_exist_ok=True)
        for path in sorted(stage.rglob(CONFIG)):
            path.write_text(_with_alpha(path, scale), encoding="utf-8")
        old = found.manifest
        files = {n: None if sha is None else file_sha256(stage / n) for n, sha in old.files.items()}
        before = float(old.method.get("baked_scale") or 1.0)
        manifest = replace(
            old, scale=1.0, files=files, probes=probes, method={**old.method, "baked_scale": before * scale}
        )
        (stage / MANIFEST).write_text(manifest.text(), encoding="utf-8")
        if (card := regenerated(read_adapter(stage))) is not None:
            (stage / CARD).write_text(card, encoding="utf-8")
    return read_adapter(found.path)


def _checked(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"scale: expected a finite number, found {scale!r}.")
    return float(scale)


def _with_alpha(path: Path, scale: float) -> str:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["lora_alpha"] = _number(config["lora_alpha"] * scale)
    if config.get("alpha_pattern"):
        config["alpha_pattern"] = {k: _number(v * scale) for k, v in config["alpha_pattern"].items()}
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
