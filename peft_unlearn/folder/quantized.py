"""A base held in fewer bits than its files: which settings there are, what such a base is called, and its plain tensors.

What is quantized is the model while it loads, never its files: so the base stays known by the digest of the released files, together
with these settings and the dtype that the files were read in (rounding to it comes before quantizing). Loading the files again in the same
way gives the same bits, and that is how an equal base is recognised.

Source: QLoRA (arXiv 2305.14314) for nf4, LLM.int8 (arXiv 2208.07339) for int8, both as bitsandbytes computes them; torchao's weight-only
int8. All three by way of transformers' own configurations.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

from ..errors import Errors, UserError, nearest
from .schema import one_of, shape

RECORD = "quantized"  # in a manifest's `method`: {"options", "dtype", "digest", "probes"}
KEY = "base_options"  # in a recipe
_FLAG = shape("true or false", lambda v: isinstance(v, bool))
_KNOWN = {
    "load_in_4bit": _FLAG, "load_in_8bit": _FLAG, "torchao": one_of("int8"),
    "bnb_4bit_quant_type": one_of("nf4", "fp4"), "bnb_4bit_use_double_quant": _FLAG,
}  # fmt: skip
_OF_4BIT = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}


def understood(given: Any, errors: Errors) -> dict[str, Any]:
    """A recipe's ``base_options`` with every default written out; {} for a base in floating point. Complaints go to `errors`."""
    if not isinstance(given, Mapping | None):
        errors.add(f"{KEY}: settings are a mapping, e.g. {{load_in_4bit: true}}, not {given!r}")
        return {}
    given = dict(given or {})
    for key, value in given.items():
        if key not in _KNOWN:
            errors.add(f"{KEY} has no {key!r}.{nearest(str(key), _KNOWN)}")
        else:
            _KNOWN[key](value, f"{KEY}.{key}", errors)
    kinds = [k for k in ("load_in_4bit", "load_in_8bit", "torchao") if given.get(k)]
    if len(kinds) > 1:
        errors.add(f"{KEY}: {' and '.join(kinds)} are two ways to hold a base; give one")
    if kinds != ["load_in_4bit"] and (odd := [k for k in _OF_4BIT if k in given]):
        errors.add(f"{KEY}.{odd[0]} goes with load_in_4bit: true")
    if not kinds:
        return {}
    out = {kinds[0]: given[kinds[0]]}
    return out | ({k: given.get(k, default) for k, default in _OF_4BIT.items()} if kinds == ["load_in_4bit"] else {})


def name_of(options: Mapping[str, Any]) -> str:
    """In words, e.g. "nf4 (bitsandbytes)"."""
    if options.get("torchao"):
        return "int8 (torchao)"
    if options.get("load_in_8bit"):
        return "int8 (bitsandbytes)"
    double = ", double quantization" if options.get("bnb_4bit_use_double_quant") else ""
    return f"{options.get('bnb_4bit_quant_type', 'nf4')} (bitsandbytes{double})"


def config_of(options: Mapping[str, Any], dtype: Any) -> Any:
    """transformers' configuration for `options`; 4 bits are computed with in `dtype`.

    Raises:
        UserError: the library is not installed.
    """
    require_library(options)
    if options.get("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    if options.get("load_in_8bit"):  # one line of warning for every layer of every forward
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    given = {k: v for k, v in options.items() if k in _KNOWN}
    return BitsAndBytesConfig(**given, bnb_4bit_compute_dtype=dtype)


def require_library(options: Mapping[str, Any]) -> None:
    """Raise a `UserError` where what holds such a base is not installed."""
    library = "torchao" if options.get("torchao") else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"a base in {name_of(options)} needs the library {library}, which is not installed: pip install {library}. Or use the base "
            f"in floating point: no {KEY} in a recipe, --dtype float32 or bfloat16 in other commands"
        )


def options_of(model: Any) -> dict[str, Any]:
    """How transformers quantized `model` while loading it; {} for one in floating point.

    Raises:
        UserError: in a way that these settings cannot say, so that nobody could load the same again.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    quantizer = getattr(inner, "hf_quantizer", None)
    config: Any = getattr(quantizer, "quantization_config", None)
    config = getattr(getattr(inner, "config", None), "quantization_config", None) if config is None else config
    if config is None:
        return {}
    method = getattr(config, "quant_method", None) or type(config).__name__
    method = str(getattr(method, "value", method))
    if (
        quantizer is not None
        and not getattr(quantizer, "pre_quantized", False)
        and method in ("bitsandbytes", "torchao")
    ):
        found: dict[str, Any] = {"torchao": "int8"}
        if method == "bitsandbytes":
            found = {k: getattr(config, k, None) for k in _OF_4BIT} if config.load_in_4bit else {}
            found |= {k: True for k in ("load_in_4bit", "load_in_8bit") if getattr(config, k)}
        if _plain(config_of(found, None)) == _plain(config):
            return {k: found[k] for k in _KNOWN if k in found}
    raise UserError(
        f"the base is quantized ({method}) in a way that cannot be repeated from its released files and a few settings, so that nobody "
        "could tell whether theirs is the same. Load the files in floating point, or by "
        f"{KEY}: {{load_in_4bit: true}}, {{load_in_8bit: true}} or {{torchao: int8}}"
    )


def _plain(config: Any) -> str:
    """A configuration without the dtype that is computed in, as text."""
    found = {k: v for k, v in config.to_dict().items() if k != "bnb_4bit_compute_dtype"}
    return json.dumps(found, sort_keys=True, default=str)


def identity(digest: str, options: Mapping[str, Any], dtype: str) -> str:
    """64 hexadecimal digits that stand for the base in memory: `digest` of its files, and how they were read."""
    return hashlib.sha256(json.dumps([digest, dict(options), dtype], sort_keys=True).encode()).hexdigest()


def trained_on(method: Mapping[str, Any]) -> tuple[dict[str, Any], str] | None:
    """(options, dtype) of the quantized base that an adapter was trained on, as its manifest's `method` says; None: floating point.

    Raises:
        UserError: the record is damaged, or from a version that knows more.
    """
    record = method.get(RECORD)
    if record is None:
        return None
    errors = Errors()
    options = understood(record.get("options") if isinstance(record, Mapping) else record, errors)
    dtype = record.get("dtype") if isinstance(record, Mapping) else None
    if errors.messages or not options or not isinstance(dtype, str):
        raise UserError(f"method.{RECORD} of its manifest names no quantized base that this version knows: {record!r}")
    return options, dtype


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or, of one that is made of others (torchao's), those."""
    tensor = tensor.detach()
    if not type(tensor).__module__.startswith("torchao"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:  # type: ignore[operator]
        yield from plain_parts(f"{name}.{part}", getattr(tensor, part))
