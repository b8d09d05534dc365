"""What an audit answers: claim by claim, and of the whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..reporting.result import Result
from .statistics import Relative

CONFIRMED, SIGNED, CONTRADICTED = "confirmed here", "signed but not re-run", "contradicted"
Answer = Literal["confirmed here", "signed but not re-run", "contradicted"]


@dataclass
class Claim:
    """One thing that a record says, and what was found. detail: what was compared."""

    name: str
    answer: Answer
    detail: str


@dataclass
class Audit(Result):
    """All claims of a record. relative: the comparison with retain models, where enough were given."""

    source: str
    wording: str = ""
    claims: list[Claim] = field(default_factory=list)
    relative: Relative | None = None

    @property
    def verdict(self) -> Answer:
        found = {c.answer for c in self.claims}
        return CONTRADICTED if CONTRADICTED in found else SIGNED if SIGNED in found or not found else CONFIRMED

    @property
    def exit_code(self) -> int:
        """0 all confirmed, 1 something is contradicted, 5 nothing is, and something is only signed."""
        return {CONFIRMED: 0, CONTRADICTED: 1, SIGNED: 5}[self.verdict]

    def add(self, name: str, ok: bool | None, detail: str) -> None:
        self.claims.append(Claim(name, SIGNED if ok is None else CONFIRMED if ok else CONTRADICTED, detail))

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.claims), default=0)
        lines = [f"{c.answer:<21}  {c.name:<{width}}  {c.detail}" for c in self.claims]
        return "\n".join([f"{self.source}: {self.verdict}", *lines])
