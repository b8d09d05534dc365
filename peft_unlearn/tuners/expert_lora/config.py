"""`ExpertLoraConfig`: which experts of which layers are adapted, and whether their routers are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig

from ...folder.schema import is_number, is_whole
from ..peft_type import peft_type

ROUTER_MODES = ("none", "lora", "full")


@dataclass
class ExpertLoraConfig(PeftConfig):
    """LoRA inside chosen experts (``W_e + lora_alpha / r * B_e A_e``), everything else frozen.

    Args:
        experts: ``{layer: [expert ids]}``; layer is the 0-based index of the decoder block. An empty list trains the
            layer's router alone, and needs `train_router`.
        r: rank of every adapted projection (gate and up together count as one, as they lie in the model).
        lora_alpha: the delta is scaled by ``lora_alpha / r``.
        train_router: of the layers in `experts`: "none"; "lora" (low rank on the router's weight); "full" (a delta of the
            whole weight, which is small).
        router_r: rank with ``train_router="lora"`` (default `r`, at most the number of experts); the delta is scaled by
            ``lora_alpha / router_r``.
        init_weights: False draws B at random instead of zero (for tests).
        num_experts: ``{layer: experts of the base}``, filled when the adapter is created and compared when it is loaded.

    Raises:
        ValueError: naming everything that is wrong.
    """

    experts: dict[str, list[int]] | None = field(default=None)
    r: int = field(default=8)
    lora_alpha: float = field(default=16)
    train_router: str = field(default="none")
    router_r: int | None = field(default=None)
    init_weights: bool = field(default=True)
    num_experts: dict[str, int] | None = field(default=None)

    # PEFT asks every config for this; experts are found by their layer, never by a pattern.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        wrong: list[str] = []
        self.experts = _experts(self.experts, wrong)
        if not is_whole(self.r) or self.r < 1:
            wrong.append(f"r {self.r!r}: expected a whole number from 1 on")
        if not is_number(self.lora_alpha) or not 0 < self.lora_alpha < math.inf:
            wrong.append(f"lora_alpha {self.lora_alpha!r}: expected a positive number")
        if self.train_router not in ROUTER_MODES:
            wrong.append(f"train_router {self.train_router!r}: expected one of {', '.join(ROUTER_MODES)}")
        elif self.train_router == "none":
            empty = [layer for layer, ids in self.experts.items() if not ids]
            if empty:
                wrong.append(
                    f"experts of layer {', '.join(empty)}: the list is empty and train_router is 'none', so nothing would "
                    "be trained there; name experts, leave the layer out, or train the router"
                )
        if self.router_r is not None:
            if self.train_router != "lora":
                wrong.append(f"router_r is for train_router='lora', and that is {self.train_router!r}")
            elif not is_whole(self.router_r) or self.router_r < 1:
                wrong.append(f"router_r {self.router_r!r}: expected a whole number from 1 on")
        if self.num_experts is not None:
            self.num_experts = {str(k): int(v) for k, v in self.num_experts.items()}
        if wrong:
            raise ValueError("ExpertLoraConfig: " + "; ".join(wrong))

    @property
    def chosen(self) -> dict[int, list[int]]:
        """`experts` with whole numbers for layers (JSON has strings)."""
        assert self.experts is not None
        return {int(layer): ids for layer, ids in self.experts.items()}


def _experts(given: Any, wrong: list[str]) -> dict[str, list[int]]:
    """Sorted, with string keys as JSON will have them."""
    if not isinstance(given, Mapping) or not given:
        wrong.append(
            f"experts {given!r}: expected {{layer: [expert ids]}} with at least one layer, e.g. {{12: [3, 41]}}"
        )
        return {}
    out: dict[int, list[int]] = {}
    for layer, ids in given.items():
        try:
            at = int(layer)
        except (TypeError, ValueError):
            at = -1
        if at < 0 or isinstance(layer, bool | float):
            wrong.append(f"experts: layer {layer!r} is no index of a decoder block (0, 1, ..)")
            continue
        if at in out:
            wrong.append(f"experts: layer {at} is named twice")
        if isinstance(ids, str | Mapping) or not hasattr(ids, "__iter__"):
            wrong.append(f"experts of layer {at}: expected a list of expert ids, found {ids!r}")
            continue
        found = [i.item() if hasattr(i, "item") else i for i in ids]
        if bad := [i for i in found if not is_whole(i) or i < 0]:
            wrong.append(f"experts of layer {at}: {', '.join(map(repr, bad))} is no expert id (0, 1, ..)")
            continue
        if len(set(found)) != len(found):
            wrong.append(f"experts of layer {at}: {sorted(i for i in set(found) if found.count(i) > 1)} named twice")
        out[at] = sorted(set(found))
    return {str(at): out[at] for at in sorted(out)}
