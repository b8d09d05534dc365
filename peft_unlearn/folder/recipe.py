"""Recipes: flat YAML that a person can read and that means what it looks like.

YAML 1.2's core scalars, not PyYAML's YAML 1.1: ``1e-3`` is a number, ``no`` and ``12:30`` are text. No tags, no
aliases, no interpolation; a key given twice is an error, an unknown top-level key is an error with the nearest
spelling. What the values mean is for `peft_unlearn.config` to check. Importing this module loads neither torch nor
peft.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import Errors, UserError, nearest
from .manifest import path_like

TOP_LEVEL = (
    "name", "description", "base", "stack", "data", "adapter", "reference", "terms", "rule", "smoothing", "selection",
    "step_size", "averaging", "train", "eval", "seed", "compose",
)  # fmt: skip

_FLOAT = re.compile(
    r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_SCALARS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, no aliases, no repeated keys, text keys only."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(_at(event.start_mark, "aliases (*name) are not read in recipes; write the value out"))
        return super().compose_node(parent, index)

    def mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                # Names of layers may be numbers ({3: [0, 5]}): keep them as text, as JSON will.
                if isinstance(key, bool) or not isinstance(key, int):
                    raise yaml.YAMLError(_at(key_node.start_mark, f"the key {key!r} is not text"))
                key = str(key)
            if key in out:
                raise yaml.YAMLError(_at(key_node.start_mark, f"the key {key!r} is given twice"))
            out[key] = self.construct_object(value_node, deep=True)
        return out

    def integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)

    def real(self, node: yaml.ScalarNode) -> float:
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _at(mark: Any, message: str) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: {message}"


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which YAML 1.2 would read as a number ("1e-3"): readable by both dialects."""


for _name, _pattern, _first in _SCALARS:
    _whole = re.compile(f"(?:{_pattern.pattern})\\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
    if _name == "float":
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. Raises `UserError` that names `where`, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        problem = e.problem or e.context or "unreadable"
        raise UserError(f"{where}: {_at(mark, problem) if mark else problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f"{where}: {e}") from None


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
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"recipe {path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"recipe {path}: is a folder; name the YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"recipe {path}: not UTF-8 text.") from None
    except OSError as e:
        raise UserError(f"recipe {path}: cannot be read ({e.strerror}).") from None
    return parse_recipe(text, f"recipe {path}")


def dump_recipe(recipe: dict[str, Any]) -> str:
    """YAML text that `parse_recipe` reads back to the same values; keys in `TOP_LEVEL` order."""
    ordered = {k: recipe[k] for k in TOP_LEVEL if k in recipe}
    check_recipe(recipe, "recipe")
    try:
        return yaml.dump(
            ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
        )
    except yaml.representer.RepresenterError as e:
        raise UserError(f"recipe: holds a value that YAML cannot ({e}).") from None


def save_recipe(recipe: dict[str, Any], path: str | Path) -> None:
    Path(path).write_text(dump_recipe(recipe), encoding="utf-8")


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
    hashes = data_hashes or {}
    data = out.get("data")
    if isinstance(data, dict) and isinstance(data.get("bundle"), str) and is_file_reference(data["bundle"]):
        del data["bundle"]
        data.update({name: f"sha256:{sha}" for name, sha in hashes.items()})
    if isinstance(data, str) and is_file_reference(data):
        out["data"] = {name: f"sha256:{sha}" for name, sha in hashes.items()}
    elif isinstance(data, dict):
        for name, value in list(data.items()):
            if isinstance(value, str) and is_file_reference(value):
                if name in hashes:
                    data[name] = f"sha256:{hashes[name]}"
                else:
                    del data[name]
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
