"""What was found when a merged model was compared with the unmerged one, and whether it survived."""

from __future__ import annotations

from dataclasses import dataclass, field

MIN_KEPT = 0.9
"""Of the logits' change on the probe prompts: its least cosine with the unmerged one's, and its least share of it."""


@dataclass
class ProbeCheck:
    """The logits at the prompts' last positions, all computed in float32.

    difference, effect: the largest |logit - logit|, merged against unmerged, and unmerged against the base. same_top: at how many
    prompts merged and unmerged agree on the likeliest token. cosine, gain: of what merging changes in all logits with what the
    adapters change; None where that is nothing. why: the reason why nothing better than probes was asked.
    """

    prompts: int
    difference: float
    effect: float
    same_top: int
    cosine: float | None = None
    gain: float | None = None
    why: str | None = None

    @property
    def lost(self) -> str | None:
        """What of the behavior did not survive; None where all did, or where these prompts cannot tell."""
        if self.cosine is None or self.gain is None or min(self.cosine, self.gain) >= MIN_KEPT:
            return None
        return (
            f"on {self.prompts} probe prompts it changes the logits otherwise than the adapters do (cosine {self.cosine:.2f}, gain "
            f"{self.gain:.2f}, {MIN_KEPT:g} wanted)"
        )

    @property
    def conclusive(self) -> bool:
        return self.cosine is not None

    def __str__(self) -> str:
        kept = "" if self.cosine is None else f", cosine of the two changes {self.cosine:.4f}, gain {self.gain:.2f}"
        why = f" ({self.why})" if self.why else ""
        return (
            f"on {self.prompts} probe prompts{why} merged and unmerged differ by at most {self.difference:.2g} in a logit (the "
            f"adapters themselves move one by {self.effect:.2g}{kept}); the likeliest token is the same at {self.same_top}. What is "
            "forgotten is judged by `peft-unlearn eval`, not by these."
        )


@dataclass
class SuiteNumber:
    """One number of the suite on both models, None where the merged one has none. worse: by how much that is worse; allowed: by how
    much it may be."""

    key: str
    unmerged: float
    merged: float | None
    worse: float
    allowed: float
    n: int

    def __str__(self) -> str:
        merged = "no number" if self.merged is None else f"{self.merged:.3f}"
        return f"{self.key} {self.unmerged:.3f} -> {merged} ({self.n} rows)"


@dataclass
class SuiteCheck:
    """The suite's own forget and retain numbers. suite: its name; dtype: what both models were computed in."""

    suite: str
    dtype: str
    numbers: list[SuiteNumber] = field(default_factory=list)

    @property
    def lost(self) -> str | None:
        """As of `ProbeCheck`."""
        bad = [n for n in self.numbers if n.worse > n.allowed]
        return (
            f"by the suite {self.suite} in {self.dtype}, unmerged -> merged: {'; '.join(map(str, bad))}"
            if bad
            else None
        )

    @property
    def conclusive(self) -> bool:
        return bool(self.numbers)

    def __str__(self) -> str:
        return f"suite {self.suite} in {self.dtype}, unmerged -> merged: {'; '.join(map(str, self.numbers))}"
