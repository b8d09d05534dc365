"""Stock adapter layers that compute with a copy of the base's weight: no hook of the base layer runs and no gradient reaches the weight."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..folder.digest import adapter_modules

_KINDS = ("shira", "supertuning")  # PEFT's tuners/shira/layer.py, tuners/supertuning/layer.py


def refuse_bypass(model: Any, what: str) -> None:
    """Raise `UserError` where `what`, which needs the base layers themselves, would see nothing of some, and so be wrong in silence."""
    layers = {
        name: layer for name, layer in adapter_modules(model).items()
        if type(layer).__module__.split(".")[-2:-1] and type(layer).__module__.split(".")[-2] in _KINDS
    }  # fmt: skip
    on = [
        n
        for n, m in layers.items()
        if not m.disable_adapters and not m.merged and set(m.active_adapters) & set(_held(m))
    ]
    if on:
        kind = type(layers[on[0]]).__module__.split(".")[-2].upper()
        raise UserError(
            f"{what} works on the base's own layers, and PEFT's {kind} passes by them with a copy of each weight ({len(on)} layers, first "
            f"{on[0].removeprefix('base_model.model.')}): nothing would arrive there. A saved adapter loaded by ForgetModel does not; to "
            "train one, take adapter.type sparse with selection {method: random, ratio: ..}"
        )


def _held(layer: Any) -> list[str]:
    return [a for kind in layer.adapter_layer_names for a in getattr(layer, kind).keys()]  # noqa: SIM118  PEFT's own mappings
