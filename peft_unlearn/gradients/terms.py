"""Terms: which objective counts, with which weight, towards which named gradient, on which batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import UserError
from ..registry import Method


@dataclass(frozen=True)
class Term:
    """weight * mean over units of objective(batch), counted towards the gradient of that name.

    joint: the sum is divided by the units of all joint terms together, not by its own: one mean over a mixed batch.
    """

    gradient: str
    batch: str
    objective: Method
    weight: float = 1.0
    hyper: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False

    @property
    def layers(self) -> tuple[int | str, ...]:
        """Blocks or modules whose hidden states the objective reads."""
        if not {"hidden", "ref_hidden"} & set(self.objective.needs):
            return ()
        one, many = self.hyper.get("layer"), self.hyper.get("layers")
        return tuple(many or ()) if one is None else (one,)

    @property
    def routers(self) -> tuple[int, ...]:
        """Blocks whose router logits the objective reads: the keys of its `experts`, or its `layers`."""
        if not {"router", "ref_router"} & set(self.objective.needs):
            return ()
        return tuple(int(k) for k in self.hyper.get("experts") or self.hyper.get("layers") or ())


def count_units(
    unit: str | Callable[..., int] | None, batch: Mapping[str, Any], hyper: Mapping[str, Any] | None = None
) -> int:
    """How many values an objective of that unit returns for a batch."""
    if callable(unit):
        return unit(batch, hyper or {})
    targets = batch["labels"][:, 1:] != -100
    if unit == "token":
        return int(targets.sum())
    if unit in ("sequence", "row"):
        return int(targets.any(1).sum())
    if unit == "position":
        return int(batch["attention_mask"].sum())
    raise ValueError(f"unknown unit {unit!r}")


def with_experts(terms: list[Term], experts: Mapping[str, list[int]] | None) -> list[Term]:
    """Terms on routing, with the adapter's own experts and layers where the recipe names none."""
    out = []
    for t in terms:
        hyper = dict(t.hyper)
        for key, own in (("experts", experts), ("layers", [int(k) for k in experts or ()])):
            if {"router", "ref_router"} & set(t.objective.needs) and key in hyper and not hyper[key]:
                if not experts:
                    raise UserError(f"{t.objective.name} needs {key}: the adapter is none of experts, so name them")
                hyper[key] = own
        out.append(replace(t, hyper=hyper))
    return out


def alternates_of(terms: Sequence[Term]) -> dict[str, set[str]]:
    """Batch name -> kinds of winner answers its objectives read."""
    out: dict[str, set[str]] = {}
    for t in terms:
        if kind := t.objective.extra.get("alternates"):
            out.setdefault(t.batch, set()).add(kind)
    return out
