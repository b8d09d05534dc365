"""The merged model beside the unmerged one, on the manifest's probe prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..folder.base import load_base, load_tokenizer
from ..folder.manifest import NEUTRAL_PROMPTS, probe_logits
from ..stack.model import ForgetModel


@dataclass
class ProbeCheck:
    """Largest |logit - logit| at the prompts' last positions, all computed in float32: merged against unmerged, and for
    comparison unmerged against the base. same_top: at how many prompts merged and unmerged agree on the likeliest token."""

    prompts: int
    difference: float
    effect: float
    same_top: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"on {self.prompts} probe prompts merged and unmerged differ by at most {self.difference:.2g} in a logit (the "
            f"adapters themselves move one by {self.effect:.2g}); the likeliest token is the same at {self.same_top}. What is "
            "forgotten is judged by `peft-unlearn eval`, not by these."
        )


def check_probes(
    merged: str | Path, base_dir: Path, adapters: dict[str, Path], scales: dict[str, float], prompts: list[str] | None
) -> ProbeCheck:
    """Load both models, one after the other."""
    asked = prompts or list(NEUTRAL_PROMPTS)
    tokenizer = load_tokenizer(*adapters.values(), base_dir)
    stack = ForgetModel.from_pretrained(base_dir, adapters, scales)  # type: ignore[arg-type]
    on = probe_logits(stack.model, tokenizer, asked)
    with stack.disabled() as plain:
        off = probe_logits(plain, tokenizer, asked)
    del stack, plain
    now = probe_logits(load_base(merged), tokenizer, asked)
    return ProbeCheck(
        len(asked), float((now - on).abs().max()), float((on - off).abs().max()),
        int((now.argmax(-1) == on.argmax(-1)).sum()),
    )  # fmt: skip
