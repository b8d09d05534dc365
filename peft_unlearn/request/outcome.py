"""What `forget` found and did, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..reporting.result import Result, fields_of
from ..reporting.tables import Table, to_text


@dataclass
class Forgotten(Result):
    """What `forget` found and did.

    facts: (question, value) of what the base knew.   unknown: (question, answer, why it was left out).   before, after: set -> share of
    answers that name the value, or that parse, of base and adapter.   answers: (question, base's answer, adapter's answer).
    sizes: set -> rows that these are means of.   aims: set -> its aim.   lacking: set -> by how much that was missed.   kept_sets: sets
    that are to be kept.
    path: the adapter's folder; None where only the data were prepared.
    """

    facts: list[tuple[str, str]]
    unknown: list[tuple[str, str, str]]
    rows: dict[str, int]
    data: str
    notes: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    aims: dict[str, str] = field(default_factory=dict)
    kept_sets: list[str] = field(default_factory=list)
    lacking: dict[str, float] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    path: str | None = None
    title = "Forget"

    @property
    def exit_code(self) -> int:
        return 1 if self.lacking else 0

    def to_dict(self) -> dict[str, Any]:
        return {**fields_of(self), "reached": self.path is not None and not self.lacking}

    def remarks(self) -> list[str]:
        return [*self.notes, *(f"left out: {q} ({why}; answered: {a})" for q, a, why in self.unknown)]

    def verdict(self) -> str:
        """The result in one sentence."""
        if self.path is None:
            return f"Prepared; look at {self.data}, edit it, and go on with: peft-unlearn forget --file {self.data}"
        if not self.lacking:
            return "Reached: the value is no longer named, and what stands beside it was kept."
        far = ", ".join(f"{k} {self.after[k]:.2f} ({self.aims[k]})" for k in self.lacking)
        if 0 < len(self.lacking.keys() & set(self.kept_sets)) < len(self.lacking):
            return f"Not separable with these settings: neither side is reached: {far}."
        return f"Not reached: {far}."

    def __str__(self) -> str:
        rows = ", ".join(f"{k} {n}" for k, n in self.rows.items())
        lines = [f"{len(self.facts)} fact(s) to forget, {len(self.unknown)} left out; rows: {rows}"]
        if self.path is not None:
            table = [[k, f"{self.before[k]:.2f}", f"{v:.2f}", self.aims.get(k, "")] for k, v in self.after.items()]
            lines += ["", to_text(Table(("names the value", "base", "adapter", "aim"), table)), ""]
            lines += [f"{q}\n  before: {a}\n  after:  {b}" for q, a, b in self.answers]
            lines += ["", f"{self.path} ({self.seconds:.0f} s, {len(self.runs)} run(s))"]
        return "\n".join([*lines, self.verdict()])
