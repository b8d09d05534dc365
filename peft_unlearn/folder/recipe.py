"""Recipes: flat YAML that a person can read and that means what it looks like.

No tags, no aliases, no interpolation; an unknown top-level key is an error with the nearest spelling. What the values mean
is for `peft_unlearn.training.recipe` to check. Importing this module loads neither torch nor peft.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..data.formats import DATA_OPTIONS
from ..errors import Errors, UserError, nearest
from .manifest import path_like
from .yaml_io import dump_yaml, parse_yaml, read_yaml

TOP_LEVEL = (
    "name", "description", "base", "base_options", "stack", "data", "adapter", "reference", "terms", "rule", "smoothing", "selection",
    "step_size", "averaging", "train", "eval", "tune", "seed", "compose", "sanitize", "oneshot",
)  # fmt: skip


def check_recipe(recipe: Any, where: str) -> dict[str, Any]:
    """`recipe` itself when it is a mapping of known top-level keys; otherwise one `UserError` with every problem."""
    if not isinstance(recipe, dict):
        found = "nothing" if recipe is None else f"a {type(recipe).__name__}"
        raise UserError(f"{where}: a recipe is a mapping with keys such as base, data, terms; found {found}.")
    errors = Errors()
    for key in recipe:
        if key not in TOP_LEVEL:
            errors.add(f"unknown key {key!r}.{nearest(str(key), TOP_LEVEL)}")
    errors.raise_if_any(where)
    return recipe


def parse_recipe(text: str, where: str = "recipe") -> dict[str, Any]:
    return check_recipe(parse_yaml(text, where), where)


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read a recipe file; values are None, bool, int, float, str, lists and mappings with text keys."""
    return check_recipe(read_yaml(path, f"recipe {path}"), f"recipe {path}")


def dump_recipe(recipe: dict[str, Any]) -> str:
    """YAML text that `parse_recipe` reads back to the same values; keys in `TOP_LEVEL` order."""
    ordered = {k: recipe[k] for k in TOP_LEVEL if k in recipe}
    check_recipe(recipe, "recipe")
    return dump_yaml(ordered, "recipe", flow=None)


def apply_overrides(recipe: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `recipe` with ``["train.max_steps=50", ...]`` set; values are YAML, missing sections are made."""
    out = copy.deepcopy(recipe)
    for text in overrides:
        where = f"--set {text}"
        key, sign, value = text.partition("=")
        parts = key.strip().split(".")
        if not sign or not all(parts):
            raise UserError(f"{where}: expected KEY=VALUE with dots between levels, for example train.max_steps=50.")
        if parts[0] not in TOP_LEVEL:
            raise UserError(f"{where}: unknown key {parts[0]!r}.{nearest(parts[0], TOP_LEVEL)}")
        section = out
        for i, part in enumerate(parts[:-1]):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                raise UserError(f"{where}: {'.'.join(parts[: i + 1])} is {inner!r}, not a section with keys.")
            section = inner
        section[parts[-1]] = parse_yaml(value, where)
    return out


def portable_recipe(recipe: dict[str, Any], base_ref: str, data_hashes: dict[str, str] | None = None) -> dict[str, Any]:
    """A copy fit to publish: the base by its portable name, data files as ``sha256:<hash>``, other paths dropped.

    Such a recipe trains again with --base and --data; a command that lacks them stops and says so.
    """
    out = {k: v for k, v in copy.deepcopy(recipe).items() if k in TOP_LEVEL}
    if "base" in out:
        out["base"] = base_ref
    hashed = {name: f"sha256:{sha}" for name, sha in (data_hashes or {}).items()}
    data = out.get("data")
    if isinstance(data, str) and is_file_reference(data):
        out["data"] = hashed
    elif isinstance(data, dict):
        # Rows given in Python, and lists of files, are known by their hash as one file is.
        files = [k for k, v in data.items() if (is_file_reference(v) if isinstance(v, str) else k not in DATA_OPTIONS)]
        found = {k: hashed[k] if k in files else v for k, v in data.items() if k not in files or k in hashed}
        out["data"] = found | (hashed if "bundle" in files else {})
    return _without_paths(out)


def is_file_reference(text: str) -> bool:
    """True for a value that names a file of this machine, relative ones included."""
    if text.startswith("embedded:") or "\n" in text:
        return False
    if path_like(text) or text.lower().endswith((".json", ".jsonl", ".csv", ".parquet", ".txt", ".yaml", ".yml")):
        return True
    try:
        return Path(text).exists() and "/" in text
    except (OSError, ValueError):
        return False


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not (isinstance(v, str) and path_like(v))}
    if isinstance(value, list):
        return [_without_paths(v) for v in value if not (isinstance(v, str) and path_like(v))]
    return value
