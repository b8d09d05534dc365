"""What an adapter's folder may ask of whoever loads it: no code, no size beyond its own tensors, no pattern that takes for ever.

A folder may come from a stranger, and PEFT allocates by ``r`` and matches regular expressions before it looks at the weights. So all
of this is checked first.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import Errors
from . import schema as s
from .safetensors_io import TensorEntry
from .schema import is_number
from .yaml_io import MAX_JSON, parse_json, read_text

_FLAG = s.maybe(s.shape("true or false", lambda v: isinstance(v, bool)))
_TEXTS = s.maybe(s.shape("a list of texts", lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)))
_NAMES = s.maybe(
    s.shape(
        "text or a list of texts",
        lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(t, str) for t in v)),
    )
)
_LAYERS = s.maybe(
    s.shape(
        "a number or a list of numbers", lambda v: s.is_whole(v) or (isinstance(v, list) and all(map(s.is_whole, v)))
    )
)
_BY_LAYER = s.maybe(
    s.shape(
        "a mapping of layers", lambda v: isinstance(v, Mapping) and all(str(k).isdecimal() and len(k) < 6 for k in v)
    )
)
_COUNTS = s.maybe(
    s.shape(
        "a mapping of whole numbers",
        lambda v: isinstance(v, Mapping) and all(s.is_whole(k) and k > 0 for k in v.values()),
    )
)
_CONFIG = s.record(
    {
        "peft_type": s.TEXT, "task_type": s.maybe(s.TEXT), "base_model_name_or_path": s.maybe(s.TEXT), "revision": s.maybe(s.TEXT),
        "lora_alpha": s.maybe(s.FINITE), "lora_dropout": s.maybe(s.FINITE), "target_modules": _NAMES, "exclude_modules": _NAMES,
        "target_parameters": _TEXTS, "modules_to_save": _TEXTS, "layers_pattern": _NAMES, "layers_to_transform": _LAYERS,
        "use_rslora": _FLAG, "use_dora": _FLAG, "fan_in_fan_out": _FLAG, "inference_mode": _FLAG, "lora_bias": _FLAG,
        "experts": _BY_LAYER, "num_experts": _BY_LAYER, "train_router": s.maybe(s.TEXT), "counts": _COUNTS,
    },
    required=("peft_type",), more=True,
)  # fmt: skip
"""Of what PEFT or we read of an adapter_config.json, the kinds of values."""
CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".exe", ".sh", ".js")
_WITH_CODE = ("config.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json",
              "preprocessor_config.json", "generation_config.json")  # fmt: skip
_SIZES = ("r", "init_r", "target_r", "router_r", "num_virtual_tokens")
_MOST_ITEMS, _MOST_LAYERS, _MOST_PATTERN = 10_000, 4096, 4000
_NAME, _STEPS = 60, 3_000_000  # characters of a module's name, and the ways of matching one that are still quick
_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_OPS: Any = importlib.import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")
_SINGLE = {_OPS.LITERAL, _OPS.NOT_LITERAL, _OPS.ANY, _OPS.IN, _OPS.CATEGORY}
_REPEATS = {_OPS.MAX_REPEAT, _OPS.MIN_REPEAT, getattr(_OPS, "POSSESSIVE_REPEAT", None)}


def check_code(folder: Path, files: Mapping[str, Any], errors: Errors) -> None:
    """Refuse a folder that brings code: ``auto_map`` makes transformers import a file of it."""
    for name in [
        *_WITH_CODE,
        *(p.relative_to(folder).as_posix() for p in sorted(folder.glob("*/adapter_config.json"))),
    ]:
        if (folder / name).is_file() and parse_json(
            read_text(folder / name, limit=MAX_JSON + 1), str(folder / name)
        ).get("auto_map"):
            errors.add(
                f"{name} has an auto_map, which names code to be run; an adapter needs none, and none is run. Take it out"
            )
    for name in sorted(n for n in files if n.lower().endswith(CODE)):
        errors.add(f"{name} is listed as one of its files, and is code; an adapter needs none, and none is run")


def check_config(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], errors: Errors) -> None:
    """Refuse what an adapter_config.json asks for beyond the file's tensors, and patterns that may take for ever."""
    before = len(errors.messages)
    _CONFIG(config, "", errors)
    if len(errors.messages) > before:
        return
    most = _largest_rank(entries) if config.get("peft_type") != "LOKR" else 10**9  # there a large r means: not factored
    for key in (k for k in _SIZES if config.get(k) is not None):
        _check_size(key, config[key], most, errors)
    wanted, held = sum((config.get("counts") or {}).values()), sum(math.prod(e.shape) for e in entries.values())
    if wanted > held:
        errors.add(f"counts ask for {wanted:,} values, and the file has {held:,}")
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key) or {}
        if not isinstance(found, Mapping):
            errors.add(f"{key} must be a mapping of names to numbers")
            continue
        if len(found) > max(64, len(entries)):
            errors.add(f"{key} has {len(found)} entries, and the file only {len(entries)} tensors")
        for name, value in found.items() if key == "rank_pattern" else ():
            _check_size(f"{key}[{name!r}]", value, most, errors)
        if any(not is_number(v) or not math.isfinite(v) for v in found.values()):
            errors.add(f"{key} holds a value that is no finite number")
    for key, pattern in _patterns(config):
        if why := too_slow(pattern):
            shown = pattern if len(pattern) < 60 else f"{pattern[:60]}.."
            errors.add(f"{key} {shown!r} {why}; name the modules instead")
    _check_lengths(config, len(entries), errors)


def _largest_rank(entries: Mapping[str, TensorEntry]) -> int:
    """The largest rank that the file's tensors may have: of A's rows where there are any, else any dimension."""
    first = [e.shape[0] for n, e in entries.items() if ("lora_A" in n or "lora_embedding_A" in n) and e.shape]
    return max(first or [d for e in entries.values() for d in e.shape], default=0)


def _check_size(key: str, value: Any, most: int, errors: Errors) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        errors.add(f"{key} must be a whole number, not {str(value)[:40]!r}")
    elif value > most:
        errors.add(f"{key} is {value}, and the file's tensors have a rank of at most {most}")


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Everything that PEFT takes for a regular expression."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str) and config[key] != "all-linear":
            yield key, config[key]
    layers = config.get("layers_pattern") or []
    yield from (("layers_pattern", p) for p in ([layers] if isinstance(layers, str) else layers) if isinstance(p, str))
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key)
        yield from ((key, str(name)) for name in (found if isinstance(found, Mapping) else ()))


def _check_lengths(config: Mapping[str, Any], tensors: int, errors: Errors) -> None:
    for key, value in config.items():
        if isinstance(value, list | dict) and len(value) > max(_MOST_ITEMS, 4 * tensors):
            errors.add(f"{key} has {len(value):,} entries, for {tensors} tensors")
    copies = config.get("layer_replication")
    if copies:
        try:
            count = sum(max(0, end - start) for start, end in copies)
        except (TypeError, ValueError):
            errors.add("layer_replication must be a list of pairs of layer numbers")
        else:
            if count > _MOST_LAYERS:
                errors.add(f"layer_replication makes {count:,} layers")


def too_slow(pattern: str) -> str | None:
    """Why matching a regular expression against the names of modules could take for ever, or None where it cannot.

    What a pattern may hold: characters, classes of them, alternatives, and repeats of one character or class. A repeat of more
    than that, and a reference back, can take time that doubles with every character of a name; many repeats and overlapping
    alternatives multiply, so their product is bounded.
    """
    if len(pattern) > _MOST_PATTERN:
        return f"is a pattern of more than {_MOST_PATTERN:,} characters"
    try:
        repeats, ways = _effort(_PARSER.parse(pattern))
    except (re.error, RecursionError, OverflowError) as e:
        return f"is no pattern ({e})"
    except _Refused as e:
        return str(e)
    if math.comb(_NAME + repeats, repeats) * ways > _STEPS:
        return "has so many repeats and alternatives that matching it may take for ever"
    return None


class _Refused(Exception):
    pass


def _effort(items: Any) -> tuple[int, int]:
    """(repeats one after the other, ways to choose alternatives) of a parsed pattern."""
    repeats, ways = 0, 1
    for op, arg in items:
        more, choices = 0, 1
        if op in _REPEATS:
            _, most, inner = arg
            single = _unwrapped(inner)
            if most > 1 and not single:
                raise _Refused("repeats more than a single character, which may take for ever")
            more, choices = (1, 1) if single and most > 1 else _effort(inner)
            choices *= 2 if most == 1 else 1
        elif op is _OPS.BRANCH:
            branches = [_effort(b) for b in arg[1]]
            more, choices = max(r for r, _ in branches), max(w for _, w in branches) * _overlap(arg[1])
        elif op is _OPS.SUBPATTERN:
            more, choices = _effort(arg[3])
        elif op is getattr(_OPS, "ATOMIC_GROUP", ""):
            more, choices = _effort(arg)
        elif op in (_OPS.ASSERT, _OPS.ASSERT_NOT):
            more, choices = _effort(arg[1])
        elif op not in _SINGLE and op is not _OPS.AT:
            raise _Refused("refers back to what it matched, which may take for ever")
        repeats, ways = repeats + more, min(ways * choices, _STEPS + 1)
    return repeats, ways


def _unwrapped(items: Any) -> bool:
    """Whether a repeat is of one character or class, in brackets or not."""
    while len(items) == 1 and items[0][0] is _OPS.SUBPATTERN:
        items = items[0][1][3]
    return len(items) == 1 and items[0][0] in _SINGLE


def _overlap(branches: Any) -> int:
    """How many alternatives may match at one place: those with the same first character, and all without a certain one."""
    first = [b[0][1] if len(b) and b[0][0] is _OPS.LITERAL else None for b in branches]
    return first.count(None) + max((first.count(c) for c in first if c is not None), default=0)
