"""`ExpertLoraModel`: finds the named layers, refuses what cannot be adapted truthfully, and puts the layers in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..own import OwnTuner
from ..peft_type import PREFIX
from .blocks import MoeBlock, moe_blocks
from .config import ExpertLoraConfig
from .layer import ExpertsLayer, RouterLayer, TunerLayer


class ExpertLoraModel(OwnTuner):
    """The PEFT tuner of type ``PEFT_UNLEARN_EXPERT_LORA``; use it through PEFT's own functions."""

    prefix: str = PREFIX
    tuner_layer_cls = TunerLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._targets = resolve(peft_config, model)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ExpertLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ids = self._targets[current_key]
        extra = () if ids is None else (ids,)
        if isinstance(target, TunerLayer):
            target.update_layer(adapter_name, peft_config, *extra)  # type: ignore[operator]
            return
        layer: Any = RouterLayer if ids is None else ExpertsLayer
        new = layer(target, adapter_name, peft_config, *extra)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # added beside an active one: PEFT switches it on when it is wanted
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version moves a `.weight` about, and fused experts have none.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # Layers that hold different adapters would each pick a successor of their own.
        self.set_adapter(self.active_adapters)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := sorted({*names} - {"__base__", *self.peft_config}):
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams")
        names = [n for n in names for _ in range(beams if isinstance(beams, int) else 1)]

        def add_names(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, {**kwargs, "adapter_names": names}

        layers = [m for m in self.modules() if isinstance(m, TunerLayer)]
        handles = [m.register_forward_pre_hook(add_names, with_kwargs=True) for m in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def resolve(config: ExpertLoraConfig, model: nn.Module) -> dict[str, list[int] | None]:
    """Module path -> expert ids (None for a router) that `config` names in `model`; fills `num_experts` and `router_r`.

    Raises:
        ValueError: the model cannot be adapted so; the message names every reason.
    """
    _refuse_base(model)
    blocks = moe_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} is a dense model: it has no fused experts, and expert adapters need a "
            "mixture-of-experts model. Use LoRA here"
        )
    targets: dict[str, list[int] | None] = {}
    wrong: list[str] = []
    for layer, ids in config.chosen.items():
        block = blocks.get(layer)
        if block is None:
            wrong.append(f"layer {layer} has no experts (layers that have: {_ranges(list(blocks))})")
            continue
        wrong += _why_not(config, model, block, ids)
        if ids:
            targets[block.experts] = ids
        if config.train_router != "none" and block.router is not None:
            targets[block.router] = None
    if wrong:
        raise ValueError("expert adapter: " + "; ".join(wrong))
    chosen = [blocks[layer] for layer in config.chosen]
    config.num_experts = {str(b.layer): b.num_experts for b in chosen}
    if config.train_router == "lora":
        smallest = min(min(model.get_submodule(b.router or "").weight.shape) for b in chosen)  # type: ignore[arg-type]
        if config.router_r is not None and config.router_r > smallest:
            raise ValueError(
                f"expert adapter: router_r {config.router_r} is more than the {smallest} that a router's weight here can "
                "have; take less, or train_router='full'"
            )
        config.router_r = config.router_r or min(config.r, smallest)
    return targets


def _why_not(config: ExpertLoraConfig, model: nn.Module, block: MoeBlock, ids: list[int]) -> list[str]:
    wrong: list[str] = []
    at = f"layer {block.layer}"
    trained_on = (config.num_experts or {}).get(str(block.layer), block.num_experts)
    if trained_on != block.num_experts:
        wrong.append(
            f"{at}: the adapter was made for a base with {trained_on} experts there, and this one has {block.num_experts}"
        )
    elif bad := [e for e in ids if e >= block.num_experts]:
        wrong.append(f"{at} has experts 0 to {block.num_experts - 1}, not {', '.join(map(str, bad))}")
    if block.unsupported and ids:
        wrong.append(f"{at}: its experts cannot be adapted: {block.unsupported}")
    if config.train_router != "none" and block.router is None:
        wrong.append(f"{at}: no router was found beside {block.experts}, and train_router is {config.train_router!r}")
    for path in [block.experts] * bool(ids) + [block.router] * (config.train_router != "none"):
        module = model.get_submodule(path) if path else None
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TunerLayer):
            wrong.append(
                f"{path} already carries an adapter of another type ({type(module).__name__}), whose delta would be lost in "
                "the chosen experts; load both in the same form"
            )
    return wrong


def _refuse_base(model: Any) -> None:
    if getattr(model, "hf_quantizer", None) is not None or getattr(
        getattr(model, "config", None), "quantization_config", None
    ):
        raise ValueError("expert adapter: the base is quantized, which is not supported yet; load it unquantized")
    if getattr(model, "use_kernels", False):
        raise ValueError(
            "expert adapter: kernels from the Hub replace whole expert layers and would run past the adapter; load the base "
            "with use_kernels=False"
        )


def _ranges(layers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for n in layers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
