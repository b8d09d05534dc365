"""`SparseModel`: finds the parameters that a `SparseConfig` names, and puts the layers in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...errors import nearest
from ..expert_lora.blocks import innermost
from ..own import OwnTuner
from ..peft_type import SPARSE_PREFIX
from .config import SparseConfig
from .layer import SparseLayer


class SparseModel(OwnTuner):
    """The PEFT tuner of type ``PEFT_UNLEARN_SPARSE``; use it through PEFT's own functions."""

    prefix: str = SPARSE_PREFIX
    tuner_layer_cls = SparseLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._targets = resolve(peft_config, model)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: SparseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        parts = self._targets[current_key]
        while isinstance(target, BaseTunerLayer) and not isinstance(target, SparseLayer):
            # Under the LoRA that is there already: that adds to the output of whatever it wraps.
            parent, target_name, target = target, "base_layer", target.base_layer  # type: ignore[assignment]
        if isinstance(target, SparseLayer):
            target.update_layer(adapter_name, peft_config, parts)
            return
        new = SparseLayer(target, adapter_name, peft_config, parts)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # added beside an active one: PEFT switches it on when it is wanted
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version moves a `.weight` about, and not every module has one.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "mixed batches (adapter_names) are not supported with sparse adapters; run one adapter at a time"
            )
        yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # Layers that hold different adapters would each pick a successor of their own.
        self.set_adapter(self.active_adapters)


def resolve(config: SparseConfig, model: nn.Module) -> dict[str, dict[str, str]]:
    """Module path -> (its parameter -> the parameter's name in the base) that `config` names in `model`.

    Raises:
        ValueError: parameters that are not there, have another shape, or cannot be adapted; the message names every reason.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("sparse adapter: the base is quantized, which is not supported; load it unquantized")
    modules = dict(model.named_modules())
    targets: dict[str, dict[str, str]] = {}
    wrong: list[str] = []
    for name, shape in (config.shapes or {}).items():
        path, _, last = name.rpartition(".")
        found = innermost(modules[path])._parameters.get(last) if path in modules else None
        if found is None:
            wrong.append(
                f"the base has no parameter {name!r}.{nearest(name, [n for n, _ in model.named_parameters()])}"
            )
        elif list(found.shape) != list(shape):
            wrong.append(f"{name} is {list(found.shape)} here, and the entries were chosen in {list(shape)}")
        elif config.chosen is not None and not _rising(config.chosen.indices[name], found.numel()):
            wrong.append(f"the positions chosen in {name} are not rising numbers below {found.numel()}")
        elif not found.is_floating_point():
            wrong.append(f"{name} is quantized ({found.dtype})")
        elif any(True for child in innermost(modules[path]).children() for _ in child.parameters()):
            wrong.append(
                f"{name} belongs to a module that holds others with weights; only parameters of innermost modules are adapted"
            )
        elif why := _occupied(modules[path]):
            wrong.append(f"{path} {why}")
        else:
            targets.setdefault(path, {})[last] = name
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise ValueError("sparse adapter: " + "; ".join(wrong[:8]) + more)
    return targets


def _rising(i: Tensor, size: int) -> bool:
    return i.dim() == 1 and int(i[0]) >= 0 and int(i[-1]) < size and not bool((i[1:] <= i[:-1]).any())


def _occupied(module: Any) -> str | None:
    """Why a module that carries adapters already cannot have a sparse one inside; None where it can."""
    while isinstance(module, BaseTunerLayer):
        if not isinstance(module, SparseLayer) and (
            not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper)
        ):
            return (
                f"carries an adapter of another type already ({type(module).__name__}), which computes with the base's weight itself; "
                "merge one of the two, or stack them on different modules"
            )
        if getattr(module, "lora_variant", None):
            return "carries a variant of LoRA (DoRA or its kin), which computes with the weights under it"
        module = module.base_layer  # type: ignore[assignment]
    return None
