"""What stands beside the weights of a merged model: its configuration, tokenizer, index, and where it comes from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..folder.manifest import path_like
from ..folder.read import read_json
from ..folder.safetensors_io import INDEX, read_header

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NOT_COPIED = ("_name_or_path", "name_or_path", "auto_map", "torch_dtype")
"""Machine paths; code, which is not copied; and the old name of `dtype`."""


def write_sidecars(out: Path, base_dir: Path, tokenizers: Sequence[Path], dtype: str) -> None:
    """config.json, generation_config.json and the first tokenizer found, without any path of a machine."""
    config = read_json(base_dir / "config.json")
    config = {**_with_dtype(_scrubbed(config), dtype), "dtype": dtype}
    _write(out / "config.json", config)
    if (base_dir / "generation_config.json").is_file():
        _write(out / "generation_config.json", _scrubbed(read_json(base_dir / "generation_config.json")))
    write_processor(out, base_dir)
    for place in tokenizers:
        if any((place / name).is_file() for name in _MARKS):
            for name in _TOKENIZER:
                if (place / name).is_file():
                    shutil.copyfile(place / name, out / name)
            for template in sorted((place / "additional_chat_templates").glob("*.jinja")):
                (out / "additional_chat_templates").mkdir(exist_ok=True)
                shutil.copyfile(template, out / "additional_chat_templates" / template.name)
            scrub(out / "tokenizer_config.json")
            return


def write_processor(out: Path, base_dir: Path) -> None:
    """How images are prepared, where the base says it."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (base_dir / name).is_file():
            _write(out / name, _scrubbed(read_json(base_dir / name)))


def scrub(path: Path) -> None:
    """Rewrite a JSON object without machine paths, if it holds any."""
    if path.is_file():
        raw = read_json(path)
        kept = _scrubbed(raw)
        if kept != raw:
            _write(path, kept)


def write_index(out: Path, shards: Iterable[str]) -> None:
    """The index of several shards that lie in `out`, as transformers writes it."""
    entries = {n: (e, shard) for shard in shards for n, e in read_header(out / shard).items()}
    metadata = {
        "total_parameters": sum(math.prod(e.shape) for e, _ in entries.values()),
        "total_size": sum(e.end - e.begin for e, _ in entries.values()),
    }
    _write(out / INDEX, {"metadata": metadata, "weight_map": {n: shard for n, (_, shard) in sorted(entries.items())}})


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _scrubbed(value: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, item in value.items():
        # A path is told by its form, but only under keys that name places: a chat template may look like anything.
        if key in _NOT_COPIED or (isinstance(item, str) and path_like(item) and key.endswith(("path", "file", "dir"))):
            continue
        out[key] = _scrubbed(item) if isinstance(item, dict) else item
    return out


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype wherever the configuration names one, so that a nested one does not contradict the files."""
    out = {k: _with_dtype(v, dtype) if isinstance(v, dict) else v for k, v in config.items()}
    if isinstance(out.get("dtype"), str):
        out["dtype"] = dtype
    return out
