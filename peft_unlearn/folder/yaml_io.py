"""Text files. The package's one reader of YAML: recipes, stack files, suites, attack templates, ``--set`` values, a card's front matter.

YAML 1.2's core scalars, not PyYAML's YAML 1.1: ``1e-3`` is a number, ``no``, ``12:30`` and ``2024-01-01`` are text. Keys
are text, and a key given twice is refused. What a small file can unfold to is bounded, so that a file from a stranger can
neither run code nor fill the memory. Importing this module loads neither torch nor peft.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError

MAX_CHARACTERS = 4_000_000
MAX_NODES = 200_000  # with every alias counted as what it stands for
MAX_JSON, MAX_DEPTH = 16_000_000, 64

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
    """SafeLoader with YAML 1.2 scalars, text keys, no repeated keys, aliases only where allowed, and a bound on nodes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str, aliases: bool) -> None:
        super().__init__(text)
        self.aliases, self.nodes, self.depth = aliases, 0, 0
        self.sizes: dict[int, int] = {}  # id of a composed node -> nodes in it, aliases unfolded

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark, before = self.peek_event().start_mark, self.nodes
        alias = self.check_event(yaml.AliasEvent)
        if alias and not self.aliases:
            raise yaml.YAMLError(_at(mark, "aliases (*name) are not read here; write the value out"))
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(_at(mark, f"nested too deeply to be read (more than {MAX_DEPTH} levels)"))
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.YAMLError(_at(mark, "an alias stands inside the value that it names"))
        self.nodes += self.sizes[id(node)] if alias else 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(_at(mark, f"more than {MAX_NODES:,} values with all aliases written out; refused"))
        self.sizes[id(node)] = self.nodes - before
        return node

    def mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        out: dict[str, Any] = {}
        defaults: dict[str, Any] = {}  # of ``<<: *name``, which YAML 1.1 has and 1.2 has not
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
        if self.aliases and "<<" in out:
            found = out.pop("<<")
            for part in found if isinstance(found, list) else [found]:
                if not isinstance(part, dict):
                    raise yaml.YAMLError(_at(node.start_mark, "<< wants a mapping, or a list of mappings"))
                defaults = {**part, **defaults}
        return {**defaults, **out}

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


def parse_yaml(text: str, where: str, *, aliases: bool = False, tags: bool = False) -> Any:
    """The value of one YAML document: None, bool, int, float, str, lists and mappings with text keys.

    Args:
        where: names the input in messages.
        aliases: read ``*name`` and ``<<: *name``, in files that other programs write or read too.
        tags: read a value with a tag of its own (``!function f``) as None instead of refusing it.

    Raises:
        UserError: not YAML, a key given twice, too large; with line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where}: YAML of more than {MAX_CHARACTERS:,} characters is not read.")
    try:
        loader = _Loader(text, aliases)
        if tags:
            loader.yaml_multi_constructors = {"!": lambda *_: None}
        return loader.get_single_data()
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        problem = f"not valid YAML: {e.problem or e.context or 'unreadable'}"
        raise UserError(f"{where}: {_at(mark, problem) if mark else problem}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{where}: {e}") from None


def read_yaml(path: str | Path, where: str = "", *, aliases: bool = False, tags: bool = False) -> Any:
    """`parse_yaml` of a file; `where` names it in messages, default its path."""
    where = where or str(path)
    return parse_yaml(read_text(Path(path), where, MAX_CHARACTERS + 1), where, aliases=aliases, tags=tags)


def parse_json(text: str, where: str, hint: str = "") -> dict[str, Any]:
    """The object that a JSON text holds; `hint` ends the message where it holds none, or is larger than any file of ours."""
    if len(text) > MAX_JSON:
        raise UserError(f"{where}: JSON of more than {MAX_JSON:,} characters is not read.{hint}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}).{hint}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object.{hint}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [v for found in level for v in (found.values() if isinstance(found, dict) else found)
                 if isinstance(v, dict | list)]  # fmt: skip
    if level:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep, as no file of ours is.{hint}")
    return value


def dump_yaml(value: Any, where: str, *, width: int = 100, flow: bool | None = False, sort_keys: bool = False) -> str:
    """YAML text that `parse_yaml` reads back to the same value.

    Args:
        flow: None writes the innermost lists and mappings on one line, True everything.

    Raises:
        UserError: a value that YAML cannot hold.
    """
    try:
        return yaml.dump(
            value, Dumper=_Dumper, sort_keys=sort_keys, allow_unicode=True, default_flow_style=flow, width=width
        )
    except yaml.representer.RepresenterError as e:
        raise UserError(f"{where}: holds a value that YAML cannot ({e}).") from None


def read_text(path: Path, where: str = "", limit: int = -1) -> str:
    """The first `limit` characters of a file, default all; `UserError` where there is none, or it cannot be read."""
    where = where or str(path)
    if path.is_dir():
        raise UserError(f"{where}: is a folder; name a file.")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(limit)
    except FileNotFoundError:
        raise UserError(f"{where}: no such file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text.") from None
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror}).") from None
