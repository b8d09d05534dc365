"""Settings found on the user's own model and data: runs judged by what the model writes, within a budget of seconds.

Few knobs in a stated order (`Tuner._next`); every run goes into ``trials.json``, from which a search goes on where it was ended. What
is kept is the best judged state of any run.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from transformers import TrainerCallback

from ..data.bundle import ForgetRetain
from ..data.collate import collate
from ..errors import Diverged, UserError
from ..folder.atomic import write_bytes, write_text
from ..folder.recipe import dump_recipe
from ..gradients.vector import Space, Vec
from ..reporting.pictures import trials as draw
from ..training.config import UnlearnConfig
from ..training.recipe import from_recipe
from ..training.save import negate
from ..training.train import quiet
from ..training.trainer import UnlearnTrainer
from .goal import Goal, Numbers, numbers_by_set
from .settings import Settings

Log = Callable[[str], None]

LEAST_STEPS = 8
SCALES = (0.8, 1.25)
"""Scales tried beside 1, last: a trim, not a repair."""
RATES = tuple(1e-5 * 2**k for k in range(11))
"""Learning rates of the range probe, one step each: 1e-5 to 1e-2."""
RISE = 0.5
"""Nats per token of a kept set that end the probe."""
MARGIN = 10
"""The probe has moved twice its last rate when it ends, a run of 40 steps with a linear schedule twenty times its rate: so a run moves as
far at a tenth of that rate."""
PROBED = 0.1
"""Share of the time that is left which the probe may take."""


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

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Trial:
        return Trial(**{**d, "settings": Settings(**d["settings"])})


@dataclass
class Found:
    """The best state of all runs: its numbers, where it was, and the scale it was trimmed to; and every run."""

    numbers: Numbers
    settings: Settings
    step: int
    scale: float
    trials: list[Trial]
    rates: list[dict[str, float]]


class _Judge(TrainerCallback):
    """Judges every few steps, remembers the best state, and stops: all is reached and nothing rises any more, or the time is over."""

    def __init__(self, tuner: Tuner, trial: Trial, every: int) -> None:
        self.tuner, self.trial, self.every = tuner, trial, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every and step < state.max_steps and self.tuner.left() > 0:
            return
        numbers = self.tuner.judge(step, self.trial)
        if self.tuner.left() <= 0:
            self._stop(control, "the time is over")
        elif not self.tuner.goal.missing(numbers) and not self._rising():
            self._stop(control, "reached, and nothing rises any more")

    def _rising(self) -> bool:
        """Whether what is kept went up at one of the last two looks: neighbors fall first and come back."""
        least = self.tuner.goal.least
        seen = [min((j[k] for k in least if k in j), default=1.0) for j in self.trial.judged][-3:]
        return len(seen) < 2 or any(b > a for a, b in pairwise(seen))

    def _stop(self, control: Any, why: str) -> None:
        self.trial.ended = why
        control.should_training_stop = True


class _Doubling(TrainerCallback):
    """One step at each rate of `RATES`; ends when a kept set's loss has risen by `RISE`."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = RATES[state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights: dict[str, float] = {}
        for t in self.trainer.config.term_list:
            weights[t.gradient] = weights.get(t.gradient, 0.0) + t.weight
        losses = {n: v / (weights[n] or 1.0) for n, v in self.trainer.last_step.values.items()}
        # A step's losses are those before it: they belong to the rate of the step before.
        self.seen.append({"rate": RATES[max(0, state.global_step - 2)], **losses})
        if any(v > self.seen[0][n] + RISE for n, v in losses.items() if n != "forget"):
            control.should_training_stop = True


class Tuner:
    """Runs of one recipe on one loaded model.

    Args:
        model: with the adapter to be trained; its start is what every run starts from, bit for bit.
        recipe: settings -> recipe.
        score: model -> numbers, as `make_score` gives them.
        deadline: `time.monotonic` after which nothing new begins.
        work: folder for ``trials.json`` and the best state; a search of the same `identity` goes on from what lies there.
        trials: runs at most.
        ready: called with the trainer of each run before it starts (masks of structured selections).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data: Any,
        recipe: Callable[[Settings], dict[str, Any]],
        score: Callable[[Any], Mapping[str, float]],
        goal: Goal,
        *,
        deadline: float,
        work: Path,
        log: Log,
        identity: str = "",
        trials: int = 4,
        ready: Callable[[UnlearnTrainer], Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.data, self.recipe = model, tokenizer, data, recipe
        self.score, self.goal, self.deadline, self.work, self.log = score, goal, deadline, work, log
        self.identity, self.most_trials, self.ready = identity, trials, ready
        self.space = Space.trainable(model)
        self.start, self.best = self.space.read(), (math.inf, self.space.read(), {}, Settings(), 0)
        self.trials: list[Trial] = []
        self.rates: list[dict[str, float]] = []
        self.judging = 0.0  # seconds of one look
        self.trainer: UnlearnTrainer | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def judge(self, step: int, trial: Trial) -> Numbers:
        """Look at the model as it is; remember it where it is the best so far."""
        began = time.monotonic()
        numbers = numbers_by_set(self.score(self.model))
        self.judging = time.monotonic() - began
        trial.judged.append({"step": step, **numbers})
        loss = self.goal.loss(numbers)
        if loss < self.best[0]:
            self.best = loss, self.space.read(), numbers, trial.settings, step
        self.log(f"  step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in numbers.items()))
        return numbers

    def run(self, settings: Settings) -> Found:
        """Runs until all is reached, the knobs are through, or the time is over; the model is left in the best state.

        Raises:
            UserError: the time does not suffice for the fewest steps.
        """
        current: Settings | None = settings
        if self._resume():
            seconds = min((t.seconds / t.steps for t in self.trials if t.steps), default=0.0)
            current = self._next(self.trials[-1], seconds)
        else:
            seconds = self._seconds_per_step(settings)
            most = self._affordable(seconds)
            if most < LEAST_STEPS:
                need = LEAST_STEPS * seconds + 3 * self.judging
                raise UserError(
                    f"--budget: {max(0, round(self.left()))} s are left and one step takes {seconds:.1f} s here; training needs at least "
                    f"{math.ceil(need)} s more"
                )
            current = self._probed(settings, seconds)
            most = self._affordable(seconds)
            if most < current.steps:
                self.log(f"{most} steps instead of {current.steps}: what the budget leaves at {seconds:.1f} s each")
            current = replace(current, steps=max(LEAST_STEPS, min(current.steps, most)))
        while current is not None:
            trial = Trial(current)
            self.trials.append(trial)
            self._train(trial)
            self._keep()
            current = self._next(trial, seconds)
        self.space.write(self.best[1])
        return Found(self.best[2], self.best[3], self.best[4], self._trim(), self.trials, self.rates)

    def _affordable(self, seconds: float) -> int:
        """Steps that the time left allows, with three looks between them."""
        return int((self.left() * 0.8 - 3 * self.judging) / max(seconds, 1e-9))

    def _config(self, settings: Settings, **over: Any) -> UnlearnConfig:
        recipe = self.recipe(settings)
        recipe = {**recipe, "train": {**recipe["train"], **over}}
        recipe["eval"] = {k: v for k, v in (recipe.get("eval") or {}).items() if k in ("suite", "n")}  # judged here
        config = from_recipe(recipe, str(self.work.with_suffix("")))
        config.disable_tqdm, config.save_strategy = True, "no"  # the best state is in memory, the adapter small
        return config

    def _trainer(self, config: UnlearnConfig, *callbacks: Any) -> UnlearnTrainer:
        trainer = UnlearnTrainer(
            self.model, config, data=self.data, processing_class=self.tokenizer, callbacks=list(callbacks)
        )
        quiet(trainer)
        if self.ready is not None:
            self.ready(trainer)
        return trainer

    def _train(self, trial: Trial) -> None:
        s = trial.settings
        changed = ", ".join(f"{k} {v:g}" for k, v in asdict(s).items() if v != getattr(Settings(), k))
        self.log(f"run {len(self.trials)}: {s.steps} steps{f' ({changed})' if changed else ''}")
        began = time.monotonic()
        self.space.write(self.start)
        trainer = self._trainer(self._config(s), _Judge(self, trial, max(2, s.steps // 5)))
        try:
            trainer.train()
        except Diverged as e:  # ends this run, not the search
            trial.diverged, trial.ended = True, str(e)
        self.trainer = trainer
        trial.steps, trial.seconds = trainer.state.global_step, round(time.monotonic() - began, 1)
        self.log(f"  {trial.ended}, {trial.seconds:.0f} s")

    def _seconds_per_step(self, settings: Settings) -> float:
        """How long one step takes here: measured, without moving anything."""
        trainer = self._trainer(self._config(settings))
        trainer.take_reference()
        window = trainer.config.window(trainer.bare, trainer.reference)
        rows = [trainer.rows[i] for i in range(trainer.config.rows_per_step)]
        began = time.monotonic()
        window.step([collate(rows, trainer.pad_id)])
        return time.monotonic() - began

    def _probed(self, settings: Settings, seconds: float) -> Settings:
        """The settings with a learning rate that a range probe on this model and these data allows; the adapter comes back bit for bit."""
        if seconds * len(RATES) > PROBED * self.left():
            self.log(f"no learning-rate probe: it would take {seconds * len(RATES):.0f} s of {self.left():.0f}")
            return settings
        config = self._config(settings, max_steps=len(RATES), lr_scheduler_type="constant", warmup_steps=0)
        config.step_size = config.step_size_method = config.averaging = config.averaging_method = None
        config.retain_guard = math.inf
        watch = _Doubling()
        watch.trainer = trainer = self._trainer(config, watch)
        try:
            trainer.train()
            ended = len(watch.seen) < len(RATES)
        except Diverged:
            ended = True
        self.space.write(self.start)
        self.rates = watch.seen
        highest = watch.seen[-1]["rate"] / MARGIN if watch.seen else RATES[0]
        if ended and highest < settings.learning_rate:
            self.log(f"learning rate {highest:.2g}: the probe lost what is kept at {highest * MARGIN:.2g}")
            return replace(settings, learning_rate=highest)
        self.log(f"learning rate {settings.learning_rate:.2g}: the probe held to {highest * MARGIN:.2g}")
        return settings

    def _next(self, trial: Trial, seconds: float) -> Settings | None:
        """The next settings by the stated order of knobs; None where all is reached or no time is left for another run."""
        lacking, s = self.goal.missing(self.best[2]), trial.settings
        if (not lacking and self.best[2]) or len(self.trials) >= self.most_trials:
            return None
        if trial.diverged:
            changed = replace(s, learning_rate=s.learning_rate / 3)
        elif lacking.keys() & self.goal.least.keys():  # more is lost than wanted: gentler, for longer
            changed = replace(s, learning_rate=s.learning_rate / 2, steps=round(1.5 * s.steps))
        elif trial.judged and min(trial.judged[-1].get(k, 0.0) for k in self.goal.most) > 0.5:  # hardly moved
            changed = replace(s, learning_rate=3 * s.learning_rate)
        else:
            changed = replace(s, forget_weight=2 * s.forget_weight, steps=round(1.25 * s.steps))
        affordable = self._affordable(seconds)
        return replace(changed, steps=min(changed.steps, affordable)) if affordable >= LEAST_STEPS else None

    def _trim(self) -> float:
        """The scale at which the best state is best; taken into the factors."""
        best, loss = 1.0, self.best[0]
        if not self.goal.missing(self.best[2]) or not any("lora_B" in n for n in self.space.names):
            return best
        for scale in SCALES:
            if self.left() < self.judging:
                break
            negate(self.model, -scale)
            numbers = numbers_by_set(self.score(self.model))
            self.space.write(self.best[1])
            if (now := self.goal.loss(numbers)) < loss:
                best, loss = scale, now
                self.best = now, self.best[1], numbers, *self.best[3:]
        if best != 1.0:
            negate(self.model, -best)
            self.log(f"scale {best:g} is better: taken into the adapter")
        return best

    def finished(self, found: Found) -> UnlearnTrainer:
        """A trainer that stands where the best state was found, to be saved."""
        trainer = self.trainer or self._trainer(
            self._config(found.settings)
        )  # a search that was taken up at its end ran none
        trainer.state.best_global_step = trainer.state.global_step = found.step
        return trainer

    # --- what lies on disk -----------------------------------------------------------------------------------------

    def _keep(self) -> None:
        loss, state, numbers, settings, step = self.best
        tensors = {n: t.contiguous() for n, t in zip(self.space.names, state.tensors, strict=True)}
        write_bytes(self.work / "best.safetensors", save(tensors, {"identity": self.identity}))
        about = {
            "identity": self.identity, "base": dict(self.goal.base), "aims": self.goal.aims(), "rates": self.rates,
            "trials": [t.to_dict() for t in self.trials], "judging": self.judging,
            "best": {"loss": loss if math.isfinite(loss) else None, "numbers": numbers, "settings": asdict(settings), "step": step},
        }  # fmt: skip
        write_text(self.work / "trials.json", json.dumps(about, indent=1))

    def _resume(self) -> bool:
        """Take up the finished runs of the same search; False where there are none."""
        file, state = self.work / "trials.json", self.work / "best.safetensors"
        try:
            known = json.loads(file.read_text("utf-8"))
            if not self.identity or known["identity"] != self.identity or not known["trials"]:
                return False
            tensors = load_file(state)
            vector = Vec([tensors[n].to(p.device) for n, p in zip(self.space.names, self.space.params, strict=True)])
            trials, best = [Trial.from_dict(t) for t in known["trials"]], known["best"]
            loss = math.inf if best["loss"] is None else float(best["loss"])
            self.best = loss, vector, dict(best["numbers"]), Settings(**best["settings"]), int(best["step"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, another version's, or half a file
            return False
        self.trials, self.rates, self.judging = trials, known["rates"], float(known["judging"])
        self.log(f"going on after {len(trials)} run(s) in {file}")
        return True


def keep(tuner: Tuner, found: Found, recipe: Mapping[str, Any]) -> None:
    """The chosen recipe and the picture of the runs, into the work folder."""
    write_text(tuner.work / "recipe.yaml", dump_recipe(dict(recipe)))
    write_bytes(
        tuner.work / "trials.png",
        draw([t.judged for t in found.trials], tuner.goal.most, tuner.goal.least, tuner.goal.aims()),
    )


def identity_of(recipe: Mapping[str, Any], data: ForgetRetain, base: str) -> str:
    """What a search is about, so that another one's runs are not taken up: the recipe it starts from, its rows, and the base's digest."""
    about = [{k: v for k, v in recipe.items() if k not in ("data", "base")}, data.describe(data.names()), base]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
