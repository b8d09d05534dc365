"""A run that somebody stops keeps what it has: SIGINT and SIGTERM end it after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which `asked` was set."""

    asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:  # only now: a checkpoint that says "stopped" is one that a judge ended
            control.should_training_stop = True


@contextmanager
def stoppable(callback: StopOnSignal) -> Iterator[None]:
    """SIGINT and SIGTERM set `callback.asked`; a second one does what it did before. Other threads than the main one get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        callback.asked = True
        for s, handler in before.items():
            signal.signal(s, handler)

    try:
        for s in before:
            signal.signal(s, stop)
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
