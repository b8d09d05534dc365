"""Selection shift while training: how many of a token's experts are still those that the base chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..forward import Reference
from .experts import overlap, selected, within


class SelectionOverlap(TrainerCallback):
    """Records the overlap of chosen experts with the base's, per set and block, every `every` steps and at the end.

    sets: name -> encoded rows (the paper's selection shift is read on the forget set; a drift on the retain set is collateral).
    budget: tokens of each set that are looked at. history: [{"step": n, "overlap": {set: {block: share}}}].
    """

    def __init__(
        self, sets: Mapping[str, Sequence[Mapping[str, Any]]], pad_id: int = 0, every: int = 0, budget: int = 4000
    ) -> None:
        self.sets = {name: within(rows, budget) for name, rows in sets.items()}
        self.pad_id, self.every = pad_id, every
        self.history: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}

    def look(self, model: nn.Module, step: int) -> dict[str, dict[int, float]]:
        """Overlap now, with the base (every adapter off) as the point of comparison."""
        training = model.training
        model.eval()
        for name, rows in self.sets.items():
            if name not in self._before:
                with Reference("base").on(model):
                    self._before[name] = selected(model, rows, self.pad_id)
        found = {n: overlap(self._before[n], selected(model, rows, self.pad_id)) for n, rows in self.sets.items()}
        model.train(training)
        self.history.append({"step": step, "overlap": found})
        return found

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self.look(getattr(model, "module", model), state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.history or self.history[-1]["step"] != state.global_step:
            self.look(getattr(model, "module", model), state.global_step)

    def __str__(self) -> str:
        if not self.history:
            return "selection overlap: not looked at"
        last = self.history[-1]
        lines = [f"selection overlap with the base at step {last['step']} (1 = every token keeps its experts):"]
        for name, blocks in last["overlap"].items():
            lines.append(f"  {name:<8}" + "  ".join(f"block {k} {v:.2f}" for k, v in blocks.items()))
        return "\n".join(lines)
