"""Opening a forget adapter's folder, with one clear message for each way it can be wrong."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from .bounds import check_code, check_config
from .manifest import Manifest
from .recipe import parse_recipe
from .safetensors_io import plain_name, read_header
from .yaml_io import MAX_JSON, parse_json, read_text

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "forget.json"
RECIPE, EVAL, CARD = "recipe.yaml", "eval.json", "README.md"
RECORDED = ("model.sig", "erasure.intoto.jsonl")
"""The signed record, where `record` made one."""
COMPACT = ("expert_lora", "sparse")
"""Subfolders with an adapter's own form, beside the stock form on top: of an expert adapter, of a sparse one."""
TOGETHER = "also_load_and_activate"
"""In the configuration of a stock adapter that is a part of one: the subfolders with the others. PEFT repeats the key in a warning."""


@dataclass
class AdapterFolder:
    """A complete forget adapter on disk. config: PEFT's adapter_config.json; eval: the stored evaluation or None."""

    path: Path
    manifest: Manifest
    recipe: dict[str, Any]
    config: dict[str, Any]
    eval: dict[str, Any] | None

    @property
    def adapter_id(self) -> str:
        return self.manifest.adapter_id or f"sha256:{file_sha256(self.path / WEIGHTS)}"

    @property
    def compact(self) -> Path | None:
        """Where the adapter's own form lies, if it has one beside the stock form."""
        return next((self.path / n for n in COMPACT if (self.path / n / CONFIG).is_file()), None)


def file_sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as f:
        while piece := f.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def read_adapter(folder: str | Path, check_hashes: bool = True) -> AdapterFolder:
    """Read and check a folder: files, manifest, recipe, weights (finite, not all zero), hashes. Raises `UserError`."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file, not an adapter folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}.")
    _check_present(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config.get("peft_type"), str):
        raise UserError(f"{folder / CONFIG}: no `peft_type`; this is not the configuration of a PEFT adapter.")
    check_weights(folder / WEIGHTS, config)
    manifest = Manifest.from_text(read_text(folder / MANIFEST, limit=MAX_JSON + 1), str(folder / MANIFEST))
    recipe = parse_recipe(read_text(folder / RECIPE), str(folder / RECIPE))
    hint = " Delete it, and `peft-unlearn eval` makes it anew."
    evaluation = read_json(folder / EVAL, hint) if (folder / EVAL).is_file() else None
    errors = Errors()
    check_code(folder, manifest.files, errors)
    errors.raise_if_any(str(folder))
    for name, sha in manifest.files.items():
        if not plain_name(name):
            raise UserError(f"{folder / MANIFEST}: the file name {name!r} leaves the folder; refused.")
        if not (folder / name).is_file():
            if sha is None:
                continue
            raise UserError(f"{folder}: {name} is missing; the manifest lists it.")
        if check_hashes and sha is not None and file_sha256(folder / name) != sha:
            raise UserError(f"{folder / name}: is not the file that was written (its sha256 differs from {MANIFEST}).")
    check_asked(folder, config)
    return AdapterFolder(folder, manifest, recipe, config, evaluation)


def _check_present(folder: Path) -> None:
    missing = [n for n in (CONFIG, WEIGHTS, MANIFEST, RECIPE) if not (folder / n).is_file()]
    if not missing:
        return
    if not any(folder.iterdir()):
        raise UserError(f"{folder}: the folder is empty.")
    pickled = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
    if WEIGHTS in missing and pickled:
        raise UserError(
            f"{folder}: its weights are pickled ({', '.join(pickled)}), which can run code when loaded; "
            "only safetensors are read. Convert them where you trust their author."
        )
    if missing[0] == MANIFEST:
        raise UserError(
            f"{folder}: a PEFT adapter without {MANIFEST}: not a forget adapter, or one not written to its end."
        )
    if missing == [RECIPE]:
        raise UserError(f"{folder}: {RECIPE} is missing.")
    raise UserError(f"{folder}: not a forget adapter: {', '.join(missing)} missing.")


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file; `hint` ends the message where there is none."""
    text = read_text(path, limit=MAX_JSON + 1)
    if not text.strip():
        raise UserError(f"{path}: the file is empty.{hint}")
    return parse_json(text, str(path), hint)


def check_asked(folder: Path, config: dict[str, Any]) -> None:
    """Refuse configurations, of the stock and of the compact form, that ask for more than the weights beside them hold."""
    errors = Errors()
    check_config(config, read_header(folder / WEIGHTS), errors)
    for place in sorted(p.parent for p in folder.glob(f"*/{CONFIG}")):
        if (place / WEIGHTS).is_file():
            check_config(read_json(place / CONFIG), read_header(place / WEIGHTS), errors)
    errors.raise_if_any(str(folder / CONFIG))


def check_weights(path: Path, config: dict[str, Any]) -> None:
    """Raise `UserError` for an empty, truncated, foreign, empty-tensor, non-finite or all-zero adapter file."""
    entries = read_header(path)
    if not entries:
        raise UserError(f"{path}: holds no tensors.")
    foreign = [n for n in entries if not n.startswith("base_model.")]
    kind = str(config.get("peft_type"))
    if foreign and (kind in ("LORA", "SHIRA") or kind.startswith("PEFT_UNLEARN_")):
        raise UserError(f"{path}: not an adapter's tensors ({foreign[0]!r} does not start with base_model.).")
    hollow = [n for n, e in entries.items() if e.begin == e.end]
    if hollow:
        raise UserError(f"{path}: {len(hollow)} tensors are empty, first {hollow[0]!r} (saved from a sharded model?).")

    import torch
    from safetensors import SafetensorError, safe_open

    decisive = [n for n in entries if any(part in n for part in _DECISIVE)]
    moved = not decisive and config.get("peft_type") != "LORA"
    try:
        with safe_open(str(path), framework="pt") as f:
            for name in entries:
                tensor = f.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise UserError(f"{path}: {name!r} holds NaN or infinite values.")
                moved = moved or (name in decisive and bool(tensor.any()))
    except SafetensorError as e:
        raise UserError(f"{path}: not a readable safetensors file ({e}).") from None
    if not moved:
        raise UserError(
            f"{path}: the adapter does nothing: every {_part_of(decisive)} is zero, so nothing was trained into it."
        )


_DECISIVE = (
    "lora_B",
    "lora_embedding_B",
    "shira_weight",
    "supertuning_values",
    "peft_unlearn_sparse_values",
    "forget_vector_delta",
)
"""Tensors without which, if they are all zero, an adapter does nothing."""


def _part_of(names: list[str]) -> str:
    return next((part for part in _DECISIVE if any(part in n for n in names)), "lora_B")
