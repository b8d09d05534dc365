"""A recipe's ``selection`` on a LoRA: which output rows, input columns or modules it may change, or how much rank each module gets.

A mask of W is no product of masks of A and B, but rows of W are rows of B and columns of W columns of A. So scores of the base's weights
are summed up to structures, and the LoRA goes on what was chosen: an ordinary LoRA, trained under an update mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attribution.streamed import eligible, input_axis
from ..errors import Errors
from ..folder.digest import name_in_base
from ..folder.schema import one_of
from ..tuners.linear import ALL_LINEAR
from ..tuners.names import belongs
from ..tuners.selection import Selection
from .mask import UpdateMask
from .selecting import NEVER, Selecting, options

ROW, COLUMN, MODULE, RANK = "row", "column", "module", "rank"
UNITS = (ROW, COLUMN, MODULE, RANK)
_LORA = {"unit": one_of("entry", *UNITS), "clip": one_of("after", "before")}


@dataclass
class OnLora(Selecting):
    """config: the LoRA before anything was chosen. clip: the gradient's norm, after the mask or before it (as WAGLE's code does)."""

    config: Any = None
    clip: str = "after"

    def adapter(self, chosen: Selection) -> Any:
        """The config of the LoRA on the chosen modules, each with a share of all ranks for unit rank."""
        modules = [n.removesuffix(".weight") for n, i in chosen.indices.items() if len(i)]
        if self.unit != RANK:
            return replace(self.config, target_modules=modules)
        ranks = shared_out(self.config.r * len(modules), chosen.about["scores"], chosen.shapes)
        alpha = self.config.lora_alpha / self.config.r  # the same scaling everywhere
        given = {n.removesuffix(".weight"): r for n, r in ranks.items() if r}
        return replace(
            self.config,
            target_modules=list(given),
            rank_pattern=given,
            alpha_pattern={n: alpha * r for n, r in given.items()},
        )

    def planned(self, base: Any) -> Any:
        """The LoRA as if all of it could move: which of it may is not known yet."""
        return self.config

    def choose(self, *args: Any, **kwargs: Any) -> Selection:
        if self.unit == RANK:  # every module has a score; none is left out
            return replace(self, unit=MODULE, ratio=1.0).choose(*args, **kwargs)
        return super().choose(*args, **kwargs)


def on_lora(recipe: Mapping[str, Any], adapter: Mapping[str, Any], errors: Errors) -> OnLora | None:
    """What a recipe with a LoRA selects; None where it says nothing of it."""
    given = recipe.get("selection")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        errors.add(f"selection: settings are a mapping, e.g. {{method: wagle, ratio: 0.1, unit: row}}, not {given!r}")
        return None
    unit = given.get("unit", ROW)
    if unit == "entry":
        errors.add(
            "selection.unit entry on a LoRA: a fresh LoRA's scores are all zero, since where B is zero A has no gradient and B no value. "
            "Choose structures by the base's weights (unit: row, column, module or rank), or entries of the weights themselves "
            "(adapter.type sparse), or score a LoRA that was trained (attribution.weights.select with space='adapter')"
        )
    for key, odd in (("refresh", NEVER), ("file", None)):
        if given.get(key, odd) != odd:
            errors.add(
                f"selection.{key} goes with adapter.type sparse: structures of a LoRA are chosen once, before it is put on"
            )
    if unit == RANK and adapter.get("init_lora_weights") == "fila":
        errors.add("selection.unit rank: init_lora_weights fila is known for one rank on all modules")
    if unit == RANK and "ratio" in given:
        errors.add("selection.ratio: unit rank shares out the ranks of all modules; it leaves none out by a ratio")
    targets = adapter.get("target_modules", ALL_LINEAR)
    start = OnLora(target_modules=targets, unit=ROW, ratio=1.0 if unit == RANK else 0.0)
    return options(start, given, errors, _LORA)


def shared_out(total: int, scores: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """`total` ranks among modules in proportion to the roots of their scores, none beyond what its weight can have."""
    most = {n: min(shapes[n]) for n in scores}
    out, left = dict.fromkeys(scores, 0), min(total, sum(most.values()))
    while left:  # what is beyond a module's bound goes to the others
        weight = {n: math.sqrt(s) for n, s in scores.items() if out[n] < most[n]}
        whole = sum(weight.values())
        share = {n: left * w / whole if whole else left / len(weight) for n, w in weight.items()}
        for n, x in share.items():
            out[n] = min(most[n], out[n] + math.floor(x))
        rest = left - sum(math.floor(x) for x in share.values())
        for n in sorted(share, key=lambda n: math.floor(share[n]) - share[n])[:rest]:
            out[n] = min(most[n], out[n] + 1)
        left = min(total, sum(most.values())) - sum(out.values())
    return out


def lora_masks(model: Any, adapter: str, found: Selection, unit: str) -> dict[Tensor, Tensor]:
    """Parameter of the LoRA -> which of it may move, by the rows or columns of the base's weights that were chosen."""
    if unit not in (ROW, COLUMN):
        return {}
    names = [n.removesuffix(".weight") for n, i in found.indices.items() if len(i)]
    weights = eligible(model, names)
    axes = input_axis(model, weights)
    out = {}
    for live, p in model.named_parameters():
        factor = {ROW: ".lora_B.", COLUMN: ".lora_A."}[unit]
        module, there, _ = live.partition(factor)
        if not there or not belongs(live, adapter):
            continue
        name = f"{name_in_base(module)}.weight"
        chosen = torch.zeros(found.shapes[name], dtype=torch.bool)
        chosen.view(-1)[found.indices[name]] = True
        along = chosen.any(axes[name] if unit == ROW else 1 - axes[name])  # (out,) or (in,)
        mask = along[:, None] if unit == ROW else along[None]
        out[p] = mask.expand(p.shape).to(p.device)
    return out


def restrict(run: Any, trainer: Any) -> None:
    """Put the update mask of a run's structures, and of its start, on `trainer`."""
    spec = run.selecting
    masks = dict(run.frozen)
    if isinstance(spec, OnLora):
        for p, mask in lora_masks(trainer.bare, trainer.trained_adapter, run.selected, spec.unit).items():
            masks[p] = masks[p] & mask if p in masks else mask
    if masks:
        trainer.use_mask(UpdateMask(masks, clip_first=isinstance(spec, OnLora) and spec.clip == "before"))
