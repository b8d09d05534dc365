"""Where a search for settings starts, and what a run's settings amount to as a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True)
class Settings:
    """The few knobs of a run.

    steps: optimizer steps at most.   forget_weight: of the forget term.   rows: forget rows in a step.   first_layer: of the
    adapted blocks, as a share of the depth.   r: LoRA rank; alpha is twice that.   cap: probability under which a value's token counts as
    forgotten.
    """

    learning_rate: float = 1e-4
    steps: int = 40
    forget_weight: float = 1.0
    rows: int = 7
    first_layer: float = 0.42
    r: int = 16
    cap: float = 0.001


PRESETS: tuple[tuple[str, float, Settings], ...] = (
    (
        "up to 2 billion parameters: measured on Qwen2.5-Coder-0.5B-Instruct (two requests, two seeds), docs/your-model.md",
        2e9,
        Settings(),
    ),
    ("larger: the same at half the learning rate, not run here", float("inf"), Settings(learning_rate=5e-5)),
)


def preset(parameters: int) -> tuple[str, Settings]:
    """(where it comes from, settings) for a base of that many parameters."""
    return next((why, s) for why, most, s in PRESETS if parameters <= most)


def seconds_of(budget: str | float) -> float:
    """Seconds of "90", "90s", "10m" or "1h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(budget).strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--budget {budget}: a time such as 90s, 10m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


# rows of each set beside each forget row, its objective and weight
_KEPT: dict[str, tuple[float, str, float]] = {
    "retain": (0.6, "kl", 2.0),
    "general": (0.4, "kl", 2.0),
    "kept": (0.4, "nll", 1.0),
}


def recipe_for(
    settings: Settings,
    *,
    base: str,
    data: str,
    template: str,
    sets: Mapping[str, int],
    blocks: int,
    seed: int = 0,
    bf16: bool = False,
) -> dict[str, Any]:
    """The recipe of one run; `peft-unlearn train` runs it as it is.

    sets: name -> number of rows that there are.   blocks: of the base.
    """
    s = settings
    rows = min(s.rows, sets["forget"])
    kept = {n: about for n, about in _KEPT.items() if sets.get(n)}
    terms: dict[str, Any] = {"forget": {"wga": {"beta": 1.0, "cap": s.cap, "weight": s.forget_weight}}}
    terms |= {n: {objective: {"weight": weight}} for n, (_, objective, weight) in kept.items()}
    shares = {n: max(share, 1 / rows) for n, (share, *_) in kept.items()}
    first = min(int(s.first_layer * blocks), blocks - 1)
    return {
        "name": "forget",
        "base": base,
        "data": {"bundle": data, "template": template, "target": "value", "per_anchor": shares},
        "adapter": {
            "type": "lora", "r": s.r, "lora_alpha": 2 * s.r, "target_modules": "all-linear",
            "layers_to_transform": list(range(first, blocks)),
        },
        "terms": terms,
        "reference": "precomputed",
        "train": {
            "learning_rate": s.learning_rate, "max_steps": s.steps, "per_device_train_batch_size": rows,
            "lr_scheduler_type": "linear", "warmup_steps": min(5, s.steps // 4), "adam_beta2": 0.99, "max_grad_norm": 1.0,
            "logging_steps": 1, "bf16": bf16,
        },
        "eval": {"suite": "own"},
        "seed": seed,
    }  # fmt: skip
