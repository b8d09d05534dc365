"""A run that destroys what it is to keep is stopped, with the last state from before it on disk."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from transformers import TrainerCallback

from ..errors import Diverged
from .checkpoints import last_checkpoint

RISE = 4.0
"""Nats per token that the loss of a kept set may rise by: a model that fell that far writes noise."""
STEPS = 3
"""Steps whose mean is looked at, so that one hard batch does not end a run."""


class RetainGuard(TrainerCallback):
    """Raises Diverged once a retained set's loss, a mean over `STEPS` steps, stands `rise` nats per token over its start.

    Only gradients whose objectives are means over tokens (nll, kl and their kin) have that unit; the one named forget is meant to move.
    A loss that is not finite is refused by the window itself.
    """

    def __init__(self, trainer: Any, rise: float = RISE) -> None:
        self.trainer, self.rise = trainer, rise
        weights: dict[str, list[float]] = {}
        for t in trainer.config.term_list:
            if t.gradient != "forget":
                weights.setdefault(t.gradient, []).append(t.weight if t.objective.unit == "token" else math.nan)
        self.weights = {name: sum(w) for name, w in weights.items() if math.isfinite(sum(w)) and sum(w) > 0}
        self.start: dict[str, float] = {}
        self.latest: dict[str, deque[float]] = {name: deque(maxlen=STEPS) for name in self.weights}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logged = {k.removeprefix("loss/"): v for row in state.log_history[:1] for k, v in row.items()}
        self.start = {n: logged[n] / w for n, w in self.weights.items() if n in logged}  # of a run that goes on

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (fallen := self.look()) is not None:
            name, start, now = fallen
            raise Diverged(
                f"step {state.global_step}: stopped, because the loss of {name!r} rose from {start:.2f} to {now:.2f} nats a token: the "
                f"model is losing what it was to keep. Give {name!r} more weight, or {what_helps(self.trainer)}"
            )

    def look(self) -> tuple[str, float, float] | None:
        """(set, loss at the start, loss now) of the first one that rose too far with the trainer's last step; None: all hold."""
        for name, weight in self.weights.items():
            now = self.trainer.last_step.values.get(name)
            if now is None:
                continue
            start = self.start.setdefault(name, now / weight)
            self.latest[name].append(now / weight)
            mean = sum(self.latest[name]) / len(self.latest[name])
            if len(self.latest[name]) == STEPS and mean > start + self.rise:
                return name, start, mean
        return None


def what_helps(trainer: Any) -> str:
    """Advice for a run that diverged, and where an earlier state of it lies."""
    work = trainer.config.work_dir
    kept = last_checkpoint(work)
    return (
        f"set train.learning_rate to {trainer.args.learning_rate / 5:g}, or bound the forget loss (npo, simnpo, wga with a cap). "
        f"Nothing was written; {f'{kept} holds an earlier state' if kept else f'{work} holds no earlier state'}"
    )
