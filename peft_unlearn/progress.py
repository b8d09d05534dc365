"""Progress on standard error, bars on a terminal and lines elsewhere; standard output is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]  # (what, done, total)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )


@contextmanager
def bars() -> Iterator[Progress]:
    """``progress(what, done, total)``: one bar per `what` on a terminal, elsewhere a line for every finished tenth."""
    if not sys.stderr.isatty():
        yield lines()
        return
    with _bar() as drawn:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = drawn.add_task(what, total=total, note=note)
            drawn.update(tasks[what], completed=done, total=total, note=note)

        yield progress


def lines() -> Progress:
    """A line for every finished tenth, with the time that is left once a minute's work is."""
    tenths: dict[str, int] = {}
    began: dict[str, float] = {}

    def progress(what: str, done: int, total: int, note: str = "") -> None:
        tenth = 10 * done // total if total else 0
        spent = time.monotonic() - began.setdefault(what, time.monotonic())
        if tenth > tenths.get(what, 0):
            left = spent / done * (total - done) / 60  # minutes
            shown = f"{note}  about {left:.0f} min left" if left >= 1 else note
            print(f"{what}: {done}/{total}  {shown}".rstrip(), file=sys.stderr, flush=True)
        tenths[what] = tenth

    return progress


def training_bar() -> Any:
    """A callback of transformers' Trainer: steps of a run with the latest loss of every gradient."""
    from transformers import TrainerCallback

    class TrainingBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shown, self.note, self.judged = bars(), "", ""
            self.progress: Any = self.shown.__enter__()
            self.on_step_end(args, state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.progress("unlearning", state.global_step, state.max_steps, f"{self.note}  {self.judged}".strip())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses = {k.split("/", 1)[1]: v for k, v in (logs or {}).items() if k.startswith("loss/")}
            if losses:
                self.note = "  ".join(f"{k} {v:.3g}" for k, v in losses.items())
                self.on_step_end(args, state, control)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            named = {k.removeprefix("eval_"): v for k, v in (metrics or {}).items() if k.endswith("/value_accuracy")}
            self.judged = "  ".join(f"{k} {v:.2f}" for k, v in named.items())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.shown.__exit__(None, None, None)

    return TrainingBar()
