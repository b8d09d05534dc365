"""Quantizing the merged model: small changes of weights can vanish inside a quantizer's bins, and with them the
forgetting. Each format is a round trip (quantize, and back to float), so what is scored is what such a model computes
with, apart from the rounding of activations, which weight-only formats do not have."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..evaluation.measured import Unmeasured
from ..registry import Range, Source, attack
from .case import Case, Outcome
from .weights import linears, opened

SURE = Source(
    paper="Catastrophic Failure of LLM Unlearning via Quantization", url="https://arxiv.org/abs/2410.16454", year=2025
)


@attack("quantize", source=SURE)
def quantize(
    case: Case,
    *,
    format: Literal["int8", "int4", "nf4", "bf16"],
    group: Annotated[int, Range(1)] = 64,
    backend: Literal["torch", "bitsandbytes"] = "torch",
) -> Outcome:
    """Merges the adapter and rounds the weights of all linear layers to a short format.

    format: int8 = one scale per output channel, levels -127..127; int4 = one scale per `group` inputs of a channel,
    levels -7..7; nf4 = 16 normal-float levels, one scale per `group` consecutive weights; bf16 = cast.
    backend: torch = written out here; bitsandbytes = its own kernels (int8 and nf4), where it is installed.
    Output embeddings, token embeddings, norms and routers are left alone.
    """
    if backend == "bitsandbytes":
        _require_bitsandbytes(format, group)
    rounding = _by_bitsandbytes if backend == "bitsandbytes" else _by_torch
    change = changed = 0.0
    with case.subject() as model:
        before = case.before(model)
        layers = linears(model)
        if not layers:
            raise Unmeasured("the model has no linear layers in floating point to quantize")
        with opened(model, {layer.name: layer.weight for layer in layers}, case.checkpoint) as adapter, torch.no_grad():
            for i, layer in enumerate(layers):
                for matrix in layer.matrices():  # (out, in)
                    rounded = rounding(matrix, format, group)
                    change += float((rounded - matrix).double().square().sum())
                    changed += float(matrix.double().square().sum())
                    matrix.copy_(rounded)
                case.progress(f"quantize {format}", i + 1, len(layers))
            after = case.score(model)
    about = {
        "adapter": adapter,
        "layers": len(layers),
        "relative_error": (change / changed) ** 0.5 if changed > 0 else None,
        "left_alone": "embeddings, norms, routers",
    }
    return Outcome(before, after, len(case.rows), about)


def _by_torch(w: Tensor, format: str, group: int) -> Tensor:
    if format in ("int4", "nf4"):
        return int4(w, group) if format == "int4" else nf4(w, group)
    return int8(w) if format == "int8" else bf16(w)


# Scales are float64 until the last step: the largest weight of a group then comes out as it went in, and quantizing
# twice is quantizing once, bit for bit.


def int8(w: Tensor) -> Tensor:
    """(rows, n) rounded to 255 levels per row, scale = absmax / 127; same shape and dtype. A zero row stays zero.

    Source: LLM.int8(), https://arxiv.org/abs/2208.07339, the vector-wise weights; outliers are not taken apart.
    """
    return _symmetric(w, 127)


def int4(w: Tensor, group: int = 64) -> Tensor:
    """(rows, n) rounded to 15 levels per `group` neighbors within a row, scale = absmax / 7; a last shorter group has
    its own scale. Same shape and dtype.

    Source: group-wise round-to-nearest, the baseline of GPTQ, https://arxiv.org/abs/2210.17323.
    """
    return _ungrouped(_symmetric(_grouped(w, group), 7), w)


def nf4(w: Tensor, block: int = 64) -> Tensor:
    """(rows, n) rounded to 16 normal-float levels times the absmax of each `block` of weights, counted row after row
    through the matrix. Same shape and dtype. Scales stay exact: no double quantization.

    Source: QLoRA, https://arxiv.org/abs/2305.14314.
    """
    flat = _grouped(w.reshape(1, -1), block).double()  # (blocks, block)
    levels = nf4_levels(w.device)
    scale = flat.abs().amax(1, keepdim=True)
    unit = torch.where(scale == 0, 0.0, flat / scale)  # NaN stays NaN
    # levels are sorted: the nearest is the one whose cell, between the midpoints, it falls into
    index = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).clamp_max(15)
    return _ungrouped((levels[index] * scale).to(w.dtype), w.reshape(1, -1)).reshape(w.shape)


def nf4_levels(device: Any = None) -> Tensor:
    """(16,) float64, sorted from -1 to 1: quantiles of the normal distribution, with an exact zero.

    Eight equal steps of probability above the middle, seven below, up to a tail of (1/30 + 1/32) / 2 of each side,
    scaled to 1.
    """
    tail = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return (levels / levels.max()).to(device)


def bf16(w: Tensor) -> Tensor:
    """Cast to bfloat16 and back, round to nearest even."""
    return w.to(torch.bfloat16).to(w.dtype)


def _symmetric(w: Tensor, top: int) -> Tensor:
    """Each row rounded to the levels -top..top times absmax / top."""
    wide = w.double()
    scale = wide.abs().amax(1, keepdim=True) / top  # (rows, 1)
    whole = torch.where(scale == 0, 0.0, (wide / scale).round())  # NaN stays NaN
    return (whole * scale).to(w.dtype)


def _grouped(w: Tensor, group: int) -> Tensor:
    """(rows, n) -> (rows * groups, group), the last group of each row filled up with zeros."""
    missing = -w.shape[1] % group
    return torch.nn.functional.pad(w, (0, missing)).reshape(-1, group)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.reshape(like.shape[0], -1)[:, : like.shape[1]]


_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes has kernels for


def _require_bitsandbytes(format: str, block: int) -> None:
    if format not in ("int8", "nf4"):
        raise UserError(f"quantize: bitsandbytes has no {format}; use backend=torch")
    if format == "nf4" and block not in _BLOCKS:
        raise UserError(f"quantize: bitsandbytes has blocks of {', '.join(map(str, _BLOCKS))}, not {block}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantize: bitsandbytes is not installed; pip install bitsandbytes, or use backend=torch")


def _by_bitsandbytes(w: Tensor, format: str, block: int) -> Tensor:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    if format == "int8":
        q, scale, _ = functional.int8_vectorwise_quant(w.contiguous().half())
        return (q.float() * (scale[:, None] / 127.0)).to(w)
    packed, state = functional.quantize_4bit(w.contiguous(), blocksize=block, quant_type="nf4")
    return functional.dequantize_4bit(packed, state).to(w)
