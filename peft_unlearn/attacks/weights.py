"""Changing a subject's own weights for the length of an attack, and putting every bit back.

An adapter that is on is first written into the base's weights, as somebody who is handed a merged model has it: PEFT's
own `merge`, layer by layer, in the dtype the base is loaded in (float32 in this package). Where it cannot be (a tied
weight, DoRA and other LoRA variants, fully trained modules, prompts, tuners without `merge`) it stays *live*: the
weights under it are attacked while it works on top. For training that is the same attack, since W + D has the gradient
of W and D stands still; for quantizing it is not (the sum is never rounded), so the outcome says which of the two it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from ..errors import UserError
from ..folder.digest import adapter_modules, base_tensors
from ..folder.quantized import options_of
from ..folder.safetensors_io import checkpoint_tensors
from ..head import causal_lm
from ..tuners.expert_lora.blocks import DOWN, GATE_UP, innermost, is_transposed, moe_blocks

Adapter = Literal["merged", "live", "off", "none"]  # how it takes part; "off": there but switched off
KEEP_BYTES = 1 << 30  # up to here a copy costs less than reading the files again


@dataclass(frozen=True)
class Linear:
    """The weight of a linear layer, or of the fused experts of one projection.

    transposed: it lies as (in, out), or (experts, in, out), instead of (out, in).
    """

    name: str
    weight: Any
    transposed: bool

    def matrices(self) -> Iterator[Tensor]:
        """Views (out, in), one per expert."""
        weight = self.weight.detach()
        for one in weight if weight.ndim == 3 else (weight,):
            yield one.t() if self.transposed else one


def base_parameters(model: Any) -> dict[str, Parameter]:
    """Base name -> floating-point parameter of the model without its adapters; a tied one once."""
    found: dict[str, Parameter] = {}
    seen: set[int] = set()
    for name, tensor in base_tensors(model).items():
        if isinstance(tensor, Parameter) and tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def linears(model: Any) -> list[Linear]:
    """Every linear layer of the base, fused experts too, but the output embeddings: what weight-only quantizers take.

    Routers of mixtures of experts are no linear modules in transformers and stay as they are, as they do there.
    """
    from transformers.pytorch_utils import Conv1D

    base: Any = causal_lm(model)
    named = {id(p): name for name, p in base_parameters(model).items()}
    head = base.get_output_embeddings()
    kept_out = {id(head.weight)} if head is not None else set()
    out = []
    for module in base.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | Conv1D) and id(weight) in named and id(weight) not in kept_out:
            out.append(Linear(named[id(weight)], weight, isinstance(module, Conv1D)))
    for block in moe_blocks(model).values():
        experts: Any = innermost(base.get_submodule(block.experts))
        for projection in (GATE_UP, DOWN):
            weight = experts._parameters.get(projection)
            if id(weight) in named:
                out.append(Linear(named[id(weight)], weight, is_transposed(experts)))
    return out


@contextmanager
def restored(parameters: Mapping[str, Parameter], checkpoint: str | Path | None = None) -> Iterator[Callable[[], None]]:
    """Inside, these parameters may be changed in place; afterwards they hold, bit for bit, what they held before.

    Yields a function that puts them back at once. Up to `KEEP_BYTES` a copy is kept in main memory; beyond that a
    tensor whose value is exactly what loading `checkpoint` gives is read from there again, and only the others are
    copied: a full-weight attack on a large base needs no second copy of it.
    """
    large = sum(p.numel() * p.element_size() for p in parameters.values()) > KEEP_BYTES
    source = _on_disk(parameters, checkpoint) if large and checkpoint is not None else {}
    kept = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items() if n not in source}
    flags = {n: p.requires_grad for n, p in parameters.items()}

    def put_back() -> None:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(kept[name] if name in kept else source[name]())
                p.grad = None

    try:
        yield put_back
    finally:
        put_back()
        for name, p in parameters.items():
            p.requires_grad_(flags[name])


def _on_disk(parameters: Mapping[str, Parameter], checkpoint: str | Path) -> dict[str, Callable[[], Tensor]]:
    """Name -> how to read the tensor again, for those whose value is bit for bit what the files give."""
    from safetensors import safe_open

    try:
        entries = checkpoint_tensors(checkpoint)
    except UserError:
        return {}
    found = {}
    for name, p in parameters.items():
        if name not in entries or entries[name].shape != tuple(p.shape):
            continue

        def read(path: Path = entries[name].file, name: str = name, dtype: torch.dtype = p.dtype) -> Tensor:
            with safe_open(str(path), framework="pt") as f:
                return f.get_tensor(name).to(dtype)

        mine, disk = (t.contiguous().reshape(-1).view(torch.uint8) for t in (p.detach().cpu(), read()))
        if torch.equal(mine, disk):
            found[name] = read
    return found


@contextmanager
def opened(model: Any, wanted: Mapping[str, Parameter], checkpoint: str | Path | None = None) -> Iterator[Adapter]:
    """Inside, the active adapters stand in the base's weights where they can be merged, and `wanted` may be changed;
    afterwards everything is as it was. Yields how the adapter takes part."""
    layers = list(adapter_modules(model).values())
    under = {id(p) for layer in layers for p in layer.parameters()}
    mergeable = {n: p for n, p in base_parameters(model).items() if id(p) in under}
    with restored({**mergeable, **wanted}, checkpoint) as put_back:
        adapter = _state(model, layers)
        if adapter == "merged":
            try:
                for layer in layers:
                    layer.merge()
            except (ValueError, NotImplementedError, RuntimeError, AttributeError):
                _unmark(layers)
                put_back()
                adapter = "live"
        try:
            yield adapter
        finally:
            if adapter == "merged":
                _unmark(layers)


def _state(model: Any, layers: list[Any]) -> Adapter:
    """How the active adapters can take part; "merged" says that it is to be tried."""
    config = getattr(model, "peft_config", None)
    if config is None:
        return "none"
    if model.active_peft_config.is_prompt_learning:
        return "off" if getattr(model, "_adapters_disabled", False) else "live"
    on = [m for m in layers if not getattr(m, "disable_adapters", False)]
    if not on:
        return "off"
    if any(not hasattr(m, "merge") or getattr(m, "lora_variant", None) for m in on) or options_of(model):
        return "live"  # a base in fewer bits would be rounded anew, and could not be put back
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        other = seen.setdefault(p.data_ptr(), name) if p.numel() else name
        if other != name and any("base_layer" in n for n in (name, other)):
            return "live"  # tied: merging into one would change both
    return "merged"


def _unmark(layers: list[Any]) -> None:
    """Make the layers forget that they were merged; the weights are put back from a copy, not by subtraction."""
    for layer in layers:
        layer.merged_adapters.clear()
        if hasattr(layer, "_backup"):
            layer._backup.clear()
