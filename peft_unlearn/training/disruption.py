"""The largest scale of an adapter whose disruption of what is to be kept stays within a budget: KL from the base, forward passes only.

A scale is a factor of a sum, so the search needs no gradient and writes no weights: bracket, then bisection of the logarithm. Strong
adapters live at scales far under .1, which a linear grid never looks at. Source of the search: RepSelect's adaptive form
(https://github.com/filyp/unlearning), where the factor is that of a full update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..data.collate import pad, padding_id
from ..errors import UserError
from ..evaluation.plan import Progress
from ..evaluation.rows import rows_of
from ..forward import Pass, Reference
from ..objectives.distillation import kl
from ..reporting.result import Result, fields_of
from ..reporting.tables import Table, to_text
from .reference import reference_values

SHRINK, GROW = 8.0, 2.0
ENOUGH = 0.95
"""A scale whose KL is at least this share of the budget is as large as need be."""
FINE = 1.01
"""Two scales nearer than this factor are one."""
LEAST = 1e-6


@dataclass
class Disrupted(Result):
    """What `calibrate` with a KL budget found: the largest scale within it, None where no scale is; every point that was measured.

    kl: nats per target token, base || adapter at `scale`, on set `rows_of` (`rows` rows).
    """

    budget: float
    scale: float | None
    kl: float | None
    curve: list[dict[str, float]]
    set: str
    rows: int
    scale_before: float
    adapter_id: str
    dtype: str
    stored: bool = False
    baked: bool = False
    title = "Calibration to a KL budget"

    @property
    def exit_code(self) -> int:
        return 1 if self.scale is None else 0

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, "metric": "kl", **fields_of(self)}

    def __str__(self) -> str:
        rows = [[f"{p['scale']:.4g}{' <' if p['scale'] == self.scale else ''}", f"{p['kl']:.4g}"] for p in self.curve]
        found = (
            f"no scale from {LEAST:g} on keeps the KL within {self.budget:g}"
            if self.scale is None
            else f"scale {self.scale:.4g}: KL {self.kl:.4g} nats a token of the {self.set} set, budget {self.budget:g}"
        )
        head = Table(["scale", f"KL from the base ({self.rows} {self.set} rows)"], rows)
        return f"{to_text(head)}\n{found}\ncomputed in {self.dtype}"


def within(
    measure: Callable[[float], float], budget: float, most: float, progress: Progress | None = None
) -> tuple[float | None, dict[float, float]]:
    """(largest scale in [`LEAST`, most] whose measure is within the budget, every point); the measure should rise with the scale.

    Raises:
        UserError: a budget or a largest scale that is not above 0.
    """
    if not (budget > 0 and math.isfinite(budget)):
        raise UserError(f"--kl is a budget in nats per token, above 0, e.g. 0.01, not {budget:g}")
    if not (most > 0 and math.isfinite(most)):
        raise UserError(f"--max-scale is the largest scale tried, above 0, not {most:g}")
    seen: dict[float, float] = {}

    def holds(scale: float) -> bool:
        found = seen[scale] = measure(scale)
        if progress is not None:
            progress("trying scales", len(seen), max(len(seen), 12))
        return found <= budget  # NaN does not

    low, high = None, None
    scale = min(1.0, most)
    while low is None and scale >= LEAST:
        if holds(scale):
            low = scale
        else:
            high, scale = scale, scale / SHRINK
    while low is not None and high is None and low < most:
        scale = min(GROW * low, most)
        if holds(scale):
            low = scale
        else:
            high = scale
    while low is not None and high is not None and high > FINE * low and seen[low] < ENOUGH * budget:
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        else:
            high = middle
    return low, seen


def make_kl(
    model: Any, tokenizer: Any, data: Any, name: str, n: int | None, at: Callable[[float], AbstractContextManager[Any]], size: int = 16
) -> tuple[Callable[[float], float], int]:  # fmt: skip
    """(scale -> mean KL(base || adapter at that scale) over the target tokens of set `name`, in nats; number of rows).

    The base's hidden states before the head are taken once; each scale is one forward over the rows.
    """
    if not (rows_of(data, name) or ()):
        raise UserError(
            f"a KL budget is held on the {name} set, and these data have none; give one with --data, or name a set with --on"
        )
    encoded = data.encode(name, tokenizer)
    some = encoded[:: -(-len(encoded) // n) if n else 1]  # evenly spaced: sets are often sorted by kind
    rows: Sequence[dict[str, Any]] = sorted(some, key=lambda r: -len(r["input_ids"]))
    pad_id, device = padding_id(tokenizer), next(model.parameters()).device
    for row, v in zip(rows, reference_values(model, list(rows), Reference("base"), pad_id, "ref_head"), strict=True):
        row["ref_head"] = v

    @torch.no_grad()
    def measure(scale: float) -> float:
        total, count = 0.0, 0
        with at(scale) as switched:
            for i in range(0, len(rows), size):
                batch: Mapping[str, Any] = {k: v.to(device) for k, v in pad(rows[i : i + size], pad_id).items()}
                found = kl(Pass(switched, batch, reference=Reference("base")))
                total, count = total + float(found.double().sum()), count + len(found)
        return total / count

    return measure, len(rows)
