"""`tune`: settings for a recipe, found on the user's own model and data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from ..evaluation import suites
from ..evaluation.quick import make_score
from ..evaluation.rows import rows_of
from ..folder.atomic import room_for
from ..folder.digest import digest_checkpoint
from ..folder.schema import COUNT, NUMBER, mapping_of, maybe
from ..folder.write import check_destination
from ..reporting.result import Result, fields_of
from ..reporting.tables import Table, to_text
from ..stack.below import read_below
from ..training.recipe import Run, prepare
from ..training.save import save_adapter
from ..training.selecting import NEVER
from ..training.structured import restrict
from ..training.train import adapted_model, to_stderr
from .goal import Goal, numbers_by_set
from .runs import Tuner, identity_of, keep
from .settings import Settings, seconds_of

OPTIONS = {
    "budget": None,
    "trials": maybe(COUNT),
    "most": maybe(mapping_of(NUMBER)),
    "least": maybe(mapping_of(NUMBER)),
}
"""Keys of a recipe's ``tune`` section, with what their values must be."""


@dataclass
class Tuned(Result):
    """What `tune` found.

    base, found: set -> number of the base, and of the best state.   aims: set -> its aim.   lacking: set -> by how much its aim was
    missed.   trials: every run with its settings and looks.   rates: the learning-rate probe.   path: the adapter's folder.
    """

    base: dict[str, float]
    found: dict[str, float]
    aims: dict[str, str]
    lacking: dict[str, float]
    trials: list[dict[str, Any]]
    rates: list[dict[str, float]]
    best: dict[str, Any]
    path: str
    work: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    title = "Tune"

    @property
    def exit_code(self) -> int:
        return 1 if self.lacking else 0

    def to_dict(self) -> dict[str, Any]:
        return {**fields_of(self), "reached": not self.lacking}

    def remarks(self) -> list[str]:
        return self.notes

    def verdict(self) -> str:
        """The result in one sentence."""
        if not self.lacking:
            return "Reached."
        return "Not reached: " + ", ".join(f"{k} {self.found[k]:.2f} ({self.aims[k]})" for k in self.lacking) + "."

    def __str__(self) -> str:
        knobs = ("learning_rate", "steps", "forget_weight")
        runs = [
            [str(i), *(f"{t['settings'][k]:g}" for k in knobs), f"{t['seconds']:.0f}", t["ended"][:60]]
            for i, t in enumerate(self.trials, 1)
        ]
        sets = [[k, f"{self.base[k]:.2f}", f"{v:.2f}", self.aims.get(k, "")] for k, v in self.found.items()]
        return "\n".join((
            to_text(Table(("run", "learning rate", "steps", "forget weight", "s", "ended"), runs)), "",
            to_text(Table(("set", "base", "adapter", "aim"), sets)), "",
            f"{self.path} ({self.seconds:.0f} s; runs and picture in {self.work})", self.verdict(),
        ))  # fmt: skip


def with_settings(recipe: Mapping[str, Any], s: Settings) -> dict[str, Any]:
    """The recipe with the knobs set: learning rate, steps, and the weights of the forget terms times `s.forget_weight`."""
    out = copy.deepcopy(dict(recipe))
    out["train"] = {**(out.get("train") or {}), "learning_rate": s.learning_rate, "max_steps": s.steps}
    terms = out["terms"]["forget"]
    for name, hyper in terms.items():
        terms[name] = {**(hyper or {}), "weight": (hyper or {}).get("weight", 1.0) * s.forget_weight}
    return out


def tune(
    recipe: Mapping[str, Any],
    out: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    budget: str | float | None = None,
    trials: int | None = None,
    log: Callable[[str], None] = to_stderr,
) -> Tuned:
    """Search learning rate, steps, forget weight and scale of a recipe on its own base and data, and write the best adapter to `out`.

    A learning-rate range probe where the time allows, then runs that are judged by the recipe's suite on a few rows while they train and
    stop by themselves, then the scale. All of it lies in ``<out>.work``: trials.json, trials.png, and recipe.yaml with the settings that
    were chosen; the same call goes on from there.

    Args:
        budget: seconds, or "15m"; default the recipe's ``tune.budget``, else 15m.
        trials: runs at most; default the recipe's ``tune.trials``, else 4.

    Raises:
        UserError: a recipe that `train` would refuse, without a forget term, or of task vectors; a budget that is too small. Nothing at
            `out` is touched then.
    """
    began = time.monotonic()
    options = _options(recipe)
    deadline = began + seconds_of(budget if budget is not None else options.get("budget") or "15m")
    recipe = {k: v for k, v in recipe.items() if k != "tune"}
    run, below = prepare(recipe, out, base, data), read_below(recipe.get("stack"), None)
    _refuse(run)
    below.check(run.base_dir)
    check_destination(out, (f.path for f in below.folders.values()))
    with room_for(Path(out)):
        model, tokenizer = adapted_model(run, below, log, False)
        goal, score = _goal(run, model, tokenizer, options)
        log("base: " + ", ".join(f"{k} {v:.2f}" for k, v in goal.base.items()))
        tuner = Tuner(
            model, tokenizer, run.data, partial(with_settings, run.recipe), score, goal, deadline=deadline, log=log,
            work=Path(run.config.work_dir), identity=identity_of(run.recipe, run.data, digest_checkpoint(run.base_dir)),
            trials=trials or options.get("trials") or 4, ready=partial(restrict, run),
        )  # fmt: skip
        anchors = len(run.data.rows(run.config.anchor) or ())
        steps = run.config.max_steps if run.config.max_steps > 0 else run.config.steps_over(anchors)
        found = tuner.run(Settings(learning_rate=run.config.learning_rate, steps=steps))
        chosen = with_settings(run.recipe, found.settings)
        keep(tuner, found, chosen)
        folder = save_adapter(tuner.finished(found), out, base=run.base, recipe=chosen, depends_on=below.ids)
    return Tuned(
        dict(goal.base), found.numbers, goal.aims(), goal.missing(found.numbers), [t.to_dict() for t in found.trials], found.rates,
        {**asdict(found.settings), "step": found.step, "scale": found.scale}, str(folder.path), run.config.work_dir,
        time.monotonic() - began,
    )  # fmt: skip


def _options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    errors, given = Errors(), recipe.get("tune")
    if not isinstance(given, (Mapping, type(None))):
        raise UserError(f"tune is a section with keys ({', '.join(OPTIONS)}), not {given!r}")
    options = dict(given or {})
    for key, value in options.items():
        if key not in OPTIONS:
            errors.add(f"tune has no {key!r}. Known: {', '.join(OPTIONS)}")
        elif (check := OPTIONS[key]) is not None:
            check(value, f"tune.{key}", errors)
    errors.raise_if_any("recipe")
    return options


def _refuse(run: Run) -> None:
    errors, terms = Errors(), run.recipe.get("terms") or {}
    if not isinstance(terms.get("forget"), Mapping):
        errors.add("tune weighs the terms of the gradient named forget against the others, and the recipe has none")
    if run.selecting is not None and run.selecting.refresh != NEVER:
        errors.add("selection.refresh goes with one run alone; tune with refresh: never, then train")
    if run.negate is not None:
        errors.add("adapter.negate trains the opposite of what is judged; train it, and find its scale with calibrate")
    errors.raise_if_any("tune")


def _goal(
    run: Run, model: Any, tokenizer: Any, options: Mapping[str, Any]
) -> tuple[Goal, Callable[[Any], dict[str, float]]]:
    """What is to be reached, by the recipe's suite on what stands below the adapter, and the score that measures it."""
    from ..forward import Reference

    wanted = run.recipe.get("eval") or {}
    suite = suites.load(wanted.get("suite", "own"))
    n = wanted.get("n") or suite.quick_rows
    score = make_score(run.data, tokenizer, suite=suite, n=n)
    with Reference("before").on(model):
        base = numbers_by_set(score(model))
    rows = {k: min(n, len(rows_of(run.data, s.source) or ())) for k, s in suite.sets.items()}
    goal = Goal.of(suite, base, rows, options.get("most"), options.get("least"))
    if not goal.most.keys() & base.keys():
        raise UserError(
            f"the suite {suite.name!r} judges nothing of the forget set on these data, so there is nothing to search by"
        )
    return goal, score
