"""Settings found on the user's own model and data: runs judged by what the model writes, within a budget of seconds.

Few knobs in a stated order (`Tuner._next`); every run goes into ``trials.json``. What is kept is the best judged state of any run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..data.collate import collate
from ..errors import Diverged, UserError
from ..folder.atomic import write_text
from ..gradients.vector import Space
from ..training.recipe import from_recipe
from ..training.save import negate
from ..training.train import quiet
from ..training.trainer import UnlearnTrainer
from .settings import Settings

Numbers = dict[str, float]
Log = Callable[[str], None]

AIM: dict[str, float] = {"forget": 0.10, "wordings": 0.15, "reversed": 0.30}
"""Share of answers that may still name the value."""
FLOOR: dict[str, float] = {"neighbors": 0.85, "general": 0.95, "code": 0.95}
"""Share of the base's own value that has to be kept."""
LEAST_STEPS = 8
SCALES = (0.8, 1.25)
"""Scales tried beside 1, last: a trim, not a repair."""


def floor_of(name: str, base: Mapping[str, float], rows: Mapping[str, int]) -> float:
    """What has to be kept of a set: its share of the base's value, rounded down to a whole number of its rows."""
    wanted, n = FLOOR[name] * base[name], rows.get(name)
    return math.floor(wanted * n + 1e-9) / n if n else wanted


def missing(numbers: Mapping[str, float], base: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """What is not reached: set -> by how much. Empty: everything is. rows: of how many each number is the mean."""
    out = {k: numbers[k] - aim for k, aim in AIM.items() if k in numbers and numbers[k] > aim + 1e-9}
    for k in FLOOR:
        if k in numbers and base.get(k) and numbers[k] < (floor := floor_of(k, base, rows)) - 1e-9:
            out[k] = floor - numbers[k]
    return out


def loss_of(numbers: Mapping[str, float], base: Mapping[str, float], rows: Mapping[str, int]) -> float:
    """One number to minimize: what is still named, over the forget sets; states under a floor come after all that hold it."""
    named = [numbers[k] for k in AIM if k in numbers]
    short = sum(v for k, v in missing(numbers, base, rows).items() if k in FLOOR)
    return sum(named) / max(1, len(named)) + (1 + short if short else 0)


@dataclass
class Trial:
    """One run: its settings, what was judged on the way, and how it ended."""

    settings: Settings
    judged: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    ended: str = "all steps"
    diverged: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Found:
    """The best state of all runs: its numbers, where it was, and the scale it was trimmed to."""

    numbers: Numbers
    settings: Settings
    step: int
    scale: float
    trials: list[Trial]


class _Judge(TrainerCallback):
    """Judges every few steps, remembers the best state, and stops: when all is reached and nothing rises any more, when the time is
    over, or when what is kept is being destroyed."""

    def __init__(self, tuner: Tuner, trial: Trial, every: int) -> None:
        self.tuner, self.trial, self.every = tuner, trial, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every and step < state.max_steps and self.tuner.left() > 0:
            return
        numbers = self.tuner.judge(step, self.trial)
        if self.tuner.left() <= 0:
            self._stop(control, "the time is over")
        elif not missing(numbers, self.tuner.base, self.tuner.rows) and not self._rising():
            self._stop(control, "reached, and nothing rises any more")

    def _rising(self) -> bool:
        """Whether the neighbors went up at one of the last two looks: they fall first and come back."""
        seen = [j.get("neighbors", 1.0) for j in self.trial.judged][-3:]
        return len(seen) < 2 or any(b > a for a, b in pairwise(seen))

    def _stop(self, control: Any, why: str) -> None:
        self.trial.ended = why
        control.should_training_stop = True


class Tuner:
    """Runs of one request on one loaded model.

    Args:
        model: with the adapter to be trained; its start is what every run starts from, bit for bit.
        recipe: settings -> recipe.
        score: model -> numbers, as `make_score` gives them.
        base, rows: the base's own numbers, and of how many rows each is the mean.
        deadline: `time.monotonic` after which nothing new begins.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Any,
        recipe: Callable[[Settings], dict[str, Any]],
        score: Callable[[Any], Mapping[str, float]],
        base: Numbers,
        rows: Mapping[str, int],
        *,
        deadline: float,
        work: Path,
        log: Log,
    ) -> None:
        self.model, self.tokenizer, self.data, self.recipe = model, tokenizer, data, recipe
        self.rows = rows
        self.score, self.base, self.deadline, self.work, self.log = score, base, deadline, work, log
        self.space = Space.trainable(model)
        self.start, self.best = self.space.read(), (math.inf, self.space.read(), {}, Settings(), 0)
        self.trials: list[Trial] = []
        self.judging = 0.0  # seconds of one look

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def judge(self, step: int, trial: Trial) -> Numbers:
        """Look at the model as it is; remember it where it is the best so far."""
        began = time.monotonic()
        numbers = numbers_by_set(self.score(self.model))
        self.judging = time.monotonic() - began
        trial.judged.append({"step": step, **numbers})
        loss = loss_of(numbers, self.base, self.rows)
        if loss < self.best[0]:
            self.best = loss, self.space.read(), numbers, trial.settings, step
        self.log(f"  step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in numbers.items()))
        return numbers

    def run(self, settings: Settings) -> Found:
        """Runs until all is reached, the knobs are through, or the time is over; the model is left in the best state.

        Raises:
            UserError: the time does not suffice for the fewest steps.
        """
        seconds = self._seconds_per_step(settings)
        most = int((self.left() * 0.8 - 3 * self.judging) / max(seconds, 1e-9))
        if most < LEAST_STEPS:
            need = LEAST_STEPS * seconds + 3 * self.judging
            raise UserError(
                f"--budget: {max(0, round(self.left()))} s are left and one step takes {seconds:.1f} s here; training needs at least "
                f"{math.ceil(need)} s more"
            )
        if most < settings.steps:
            self.log(
                f"{most} steps instead of {settings.steps}: that is what the budget leaves at {seconds:.1f} s each"
            )
        current: Settings | None = replace(settings, steps=min(settings.steps, most))
        trainer = None
        while current is not None:
            trial = Trial(current)
            self.trials.append(trial)
            trainer = self._train(trial)
            self._keep()
            current = self._next(trial, seconds)
        assert trainer is not None
        self.trainer = trainer
        self.space.write(self.best[1])
        return Found(self.best[2], self.best[3], self.best[4], self._trim(), self.trials)

    def _train(self, trial: Trial) -> UnlearnTrainer:
        s = trial.settings
        changed = ", ".join(f"{k} {v:g}" for k, v in asdict(s).items() if v != getattr(Settings(), k))
        self.log(f"run {len(self.trials)}: {s.steps} steps{f' ({changed})' if changed else ''}")
        began = time.monotonic()
        self.space.write(self.start)
        config = from_recipe(self.recipe(s), str(self.work.with_suffix("")))
        config.disable_tqdm, config.save_strategy = True, "no"  # the best state is in memory, the adapter small
        watch = _Judge(self, trial, max(2, s.steps // 5))
        trainer = UnlearnTrainer(self.model, config, data=self.data, processing_class=self.tokenizer, callbacks=[watch])
        quiet(trainer)
        try:
            trainer.train()
        except Diverged as e:  # ends this run, not the search
            trial.diverged, trial.ended = True, str(e)
        trial.steps, trial.seconds = trainer.state.global_step, round(time.monotonic() - began, 1)
        self.log(f"  {trial.ended}, {trial.seconds:.0f} s")
        return trainer

    def _seconds_per_step(self, settings: Settings) -> float:
        """How long one step takes here, and one look: measured, without moving anything."""
        config = from_recipe(self.recipe(settings), str(self.work.with_suffix("")))
        trainer = UnlearnTrainer(self.model, config, data=self.data, processing_class=self.tokenizer)
        window = config.window(trainer.bare, trainer.reference)
        rows = [trainer.rows[i] for i in range(config.rows_per_step)]
        began = time.monotonic()
        window.step([collate(rows, trainer.pad_id)])
        return time.monotonic() - began

    def _next(self, trial: Trial, seconds: float) -> Settings | None:
        """The next settings by the stated order of knobs; None where all is reached or no time is left for another run."""
        lacking, s = missing(self.best[2], self.base, self.rows), trial.settings
        if not lacking or len(self.trials) > 3:
            return None
        if trial.diverged:
            changed = replace(s, learning_rate=s.learning_rate / 3)
        elif lacking.keys() & FLOOR.keys():  # more is lost than wanted: gentler, for longer
            changed = replace(s, learning_rate=s.learning_rate / 2, steps=round(1.5 * s.steps))
        elif trial.judged and trial.judged[-1].get("forget", 0) > 0.5:  # hardly moved
            changed = replace(s, learning_rate=3 * s.learning_rate)
        else:
            changed = replace(s, forget_weight=2 * s.forget_weight, steps=round(1.25 * s.steps))
        affordable = int((self.left() * 0.8 - 3 * self.judging) / max(seconds, 1e-9))
        return replace(changed, steps=min(changed.steps, affordable)) if affordable >= LEAST_STEPS else None

    def _trim(self) -> float:
        """The scale at which the best state is best; taken into the factors."""
        best, loss = 1.0, self.best[0]
        if not missing(self.best[2], self.base, self.rows):
            return best
        for scale in SCALES:
            if self.left() < self.judging:
                break
            negate(self.model, -scale)
            numbers = numbers_by_set(self.score(self.model))
            self.space.write(self.best[1])
            if (now := loss_of(numbers, self.base, self.rows)) < loss:
                best, loss = scale, now
                self.best = now, self.best[1], numbers, *self.best[3:]
        if best != 1.0:
            negate(self.model, -best)
            self.log(f"scale {best:g} is better: taken into the adapter")
        return best

    def _keep(self) -> None:
        write_text(self.work / "trials.json", json.dumps([t.to_dict() for t in self.trials], indent=1))


def numbers_by_set(found: Mapping[str, float]) -> Numbers:
    """``set/metric`` numbers by set: the share that names the value."""
    return {k.partition("/")[0]: v for k, v in found.items() if k.endswith(("/value_accuracy", "/python_parses"))}
