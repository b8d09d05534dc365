"""What a search is after: how little may still be named, and how much has to be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..evaluation.shapes import Suite

Numbers = dict[str, float]

MOST: dict[str, float] = {"forget": 0.10, "wordings": 0.15, "reversed": 0.30}
"""Share of a forget set's answers that may still name the value; .10 of any other."""
LEAST: dict[str, float] = {"neighbors": 0.85, "general": 0.95, "code": 0.95}
"""Share of the base's own value that has to be kept of a retain set; .95 of any other."""
METRICS = ("value_accuracy", "python_parses", "extraction_strength", "probability")
"""What a set is judged by: the first of these that it has."""


def numbers_by_set(found: Mapping[str, float]) -> Numbers:
    """``set/metric`` numbers by set, of the metric that decides there."""
    out: Numbers = {}
    for metric in reversed(METRICS):
        out |= {k.partition("/")[0]: v for k, v in found.items() if k.endswith("/" + metric)}
    return out


@dataclass(frozen=True)
class Goal:
    """Aims of a search, set by set.

    base, rows: the base's own numbers, and of how many rows each is the mean.   most: forget set -> largest share.   least: retain
    set -> smallest share of the base's number.
    """

    base: Mapping[str, float]
    rows: Mapping[str, int]
    most: Mapping[str, float]
    least: Mapping[str, float]

    @staticmethod
    def of(
        suite: Suite,
        base: Mapping[str, float],
        rows: Mapping[str, int],
        most: Mapping[str, float] | None = None,
        least: Mapping[str, float] | None = None,
    ) -> Goal:
        """The goal of a suite by the roles of its sets. Where untrained neighbors are judged, trained retain rows are not: they are kept
        nearly always, and say little. most, least: aims of a user's own."""
        roles = {name: s.role for name, s in suite.sets.items() if name in base}
        forget = {n: MOST.get(n, 0.10) for n, role in roles.items() if role == "forget"}
        kept = {n: LEAST.get(n, 0.95) for n, role in roles.items() if role == "retain"}
        if "neighbors" in kept:
            kept.pop("retain", None)
        return Goal(base, rows, {**forget, **(most or {})}, {**kept, **(least or {})})

    def floor(self, name: str) -> float:
        """What has to be kept of a retain set: its share of the base's number, rounded down to a whole number of its rows."""
        wanted, n = self.least[name] * self.base[name], self.rows.get(name)
        return math.floor(wanted * n + 1e-9) / n if n else wanted

    def missing(self, numbers: Mapping[str, float]) -> Numbers:
        """What is not reached: set -> by how much. Empty: everything is."""
        out = {k: numbers[k] - aim for k, aim in self.most.items() if k in numbers and numbers[k] > aim + 1e-9}
        for k in self.least:
            if k in numbers and self.base.get(k) and numbers[k] < (floor := self.floor(k)) - 1e-9:
                out[k] = floor - numbers[k]
        return out

    def loss(self, numbers: Mapping[str, float]) -> float:
        """One number to minimize: what is still named, over the forget sets; states under a floor come after all that hold it."""
        named = [numbers[k] for k in self.most if k in numbers]
        short = sum(v for k, v in self.missing(numbers).items() if k in self.least)
        return sum(named) / max(1, len(named)) + (1 + short if short else 0)

    def aims(self) -> dict[str, str]:
        """Set -> its aim in a few characters."""
        below = {k: f"<= {v:.2f}" for k, v in self.most.items()}
        return below | {k: f">= {self.floor(k):.2f}" for k in self.least if self.base.get(k)}
