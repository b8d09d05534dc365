"""Which weights adapters are merged into that were trained on a base in fewer bits: its files, or what it computed with, as floats."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.dtype import own_dtype
from ..folder.quantized import name_of, trained_on
from ..folder.read import AdapterFolder
from ..stack.model import held_as_trained

ORIGINAL, DEQUANTIZED = "original", "dequantized"


@contextmanager
def weights(
    folders: Mapping[str, AdapterFolder], base_dir: str | Path | None, onto: str | Path | None, out: str | Path
) -> Iterator[str | Path | None]:
    """The folder to take the weights from instead of the base's, None for the base's own; a temporary one beside `out` for ``dequantized``.

    Raises:
        UserError: an adapter was trained on a quantized base and `onto` does not say which of the two is meant; or nothing is quantized.
    """
    held = next((h for f in folders.values() if (h := trained_on(f.manifest.method)) is not None), None)
    if onto == ORIGINAL:
        yield None
        return
    if onto != DEQUANTIZED:
        if held is not None and onto is None:
            raise UserError(
                f"merge: trained on the base in {name_of(held[0])}, and there are two bases that it can be written into: --onto original "
                f"(the released files, which it never saw), --onto {DEQUANTIZED} (what it was trained on, as floats, as "
                "large as the original). Both losses are printed where the rows are at hand"
            )
        yield onto
        return
    if (held := held_as_trained(folders)) is None:
        raise UserError(
            f"merge: --onto {DEQUANTIZED} is for adapters that were trained on a quantized base, and these were not"
        )
    ref = next(iter(folders.values())).manifest.base
    base_path = resolve_base(ref.ref, override=base_dir, revision=ref.revision)
    near = Path(out).expanduser().resolve().parent
    near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dequantized-", dir=near) as place:
        model = load_base(base_path, held[1], next(iter(folders.values())).manifest.targets, held[0])
        as_floats(model).to(getattr(torch, own_dtype(base_path))).save_pretrained(place)
        del model
        load_tokenizer(base_path).save_pretrained(place)
        yield place


@torch.no_grad()
def as_floats(model: Any) -> Any:
    """A quantized model as one in floating point that computes with the same weights, in place."""
    if str(getattr(model.hf_quantizer.quantization_config.quant_method, "value", "")) == "bitsandbytes":
        return model.dequantize()
    for module in model.modules():  # torchao: transformers has no way back
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, "dequantize") and type(weight.data).__module__.startswith("torchao"):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    return model
