"""Where the experts and routers of a model are, found by their shape and not by family names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

GATE_UP, DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True)
class MoeBlock:
    """One mixture-of-experts layer.

    layer: index of the decoder block. experts, router: module paths in the base model (router None: not found).
    unsupported: why adapters cannot be put into these experts, or None.
    """

    layer: int
    experts: str
    router: str | None
    num_experts: int
    unsupported: str | None = None


def innermost(module: Any) -> Any:
    """`module` without the wrappers that PEFT put around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def is_llama4(experts: nn.Module) -> bool:
    """Experts that get every token, scaled by its score, in one (experts * tokens, hidden) tensor and no routing."""
    return type(innermost(experts)).__name__ == "Llama4TextExperts"


def is_transposed(experts: nn.Module) -> bool:
    """Weights lie as (experts, in, out) instead of (experts, out, in)."""
    inner = innermost(experts)
    return is_llama4(inner) or bool(getattr(inner, "is_transposed", False))


def moe_blocks(model: nn.Module) -> dict[int, MoeBlock]:
    """The mixture-of-experts layers of a model (or PeftModel), by layer; empty for a dense one.

    Raises:
        ValueError: two experts modules lie in blocks of the same index.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    blocks: dict[int, MoeBlock] = {}
    for name, module in base.named_modules():
        parts = name.split(".")
        inner = innermost(module)
        down = inner._parameters.get(DOWN)
        if "base_layer" in parts or down is None or down.dim() != 3:
            continue
        layer = next((int(p) for p in parts if p.isdigit()), None)
        if layer is None:
            continue
        if layer in blocks:
            raise ValueError(f"{name} and {blocks[layer].experts} both lie in a block {layer}; this is not supported")
        parent = base.get_submodule(name.rpartition(".")[0])
        blocks[layer] = MoeBlock(layer, name, _router(parent, name, down.shape[0]), down.shape[0], _why_not(inner))
    return dict(sorted(blocks.items()))


def _router(parent: nn.Module, experts: str, num_experts: int) -> str | None:
    for leaf in ("gate", "router"):
        weight = getattr(innermost(getattr(parent, leaf, None)), "weight", None)
        if weight is not None and weight.dim() == 2 and weight.shape[0] == num_experts:
            return f"{experts.rpartition('.')[0]}.{leaf}"
    return None


def _why_not(experts: Any) -> str | None:
    kind = type(experts).__name__
    gate_up = experts._parameters.get(GATE_UP)
    if gate_up is None or gate_up.dim() != 3:
        return f"{kind} has no fused {GATE_UP}"
    if not is_llama4(experts) and not (hasattr(experts, "_apply_gate") and hasattr(experts, "is_transposed")):
        return f"{kind} does not follow transformers' experts interface"
    if getattr(experts, "has_post_expert_norm", False):
        return f"{kind} normalizes every expert's output, which is not supported"
    if getattr(experts, "_is_expert_parallel", False):
        return "they are spread over several devices (expert parallel), which is not supported yet"
    if not gate_up.dtype.is_floating_point or gate_up.element_size() < 2:
        return f"they are quantized ({gate_up.dtype}), which is not supported yet"
    return None
