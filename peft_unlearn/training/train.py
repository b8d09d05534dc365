"""From a recipe to a finished adapter folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attribution.experts import attribute
from ..attribution.selection import SelectionOverlap
from ..data.formats import to_text
from ..errors import Interrupted
from ..evaluation.generate import other_answers
from ..evaluation.quick import ForgetAtFloor, StopOn, make_score
from ..folder.atomic import room_for
from ..folder.base import load_tokenizer
from ..folder.read import AdapterFolder
from ..folder.write import check_destination
from ..forward import Reference
from ..gradients.terms import alternates_of
from ..stack.below import Below, read_below
from .adapt import get_forget_model
from .fila import begun
from .images import of_images
from .mask import refreshed
from .oneshot import fire
from .recipe import CHOOSING, Run, notes, prepare
from .save import negate, save_adapter
from .selecting import chosen
from .stopping import StopOnSignal, stoppable
from .structured import restrict
from .trainer import UnlearnTrainer

Progress = Callable[[str], None]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def train(
    recipe: Mapping[str, Any],
    out: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    resume: bool = False,
    stack: str | Path | None = None,
    progress: Progress = to_stderr,
    callbacks: Sequence[Any] = (),
) -> AdapterFolder | None:
    """Train a recipe and write the finished adapter to `out`; checkpoints lie in ``<out>.work``.

    Args:
        stack: a stack file whose adapters lie frozen below the new one (all active ones, or those that the recipe's ``stack``
            names by id); what is saved then depends on them.
        progress: called with a line of text now and then.
        callbacks: the Trainer's; one with a method ``on_selection(history)`` gets the selection overlap of an expert adapter.

    Returns:
        The folder as read back; None on ranks other than the first.

    Raises:
        UserError: before anything is loaded where possible; nothing already at `out` is touched then.
    """
    run, below = prepare(recipe, out, base, data), read_below(recipe.get("stack"), stack)
    below.check(run.base_dir)
    check_destination(out, (folder.path for folder in below.folders.values()))
    model, tokenizer = adapted_model(run, below, progress, resume)
    scorer, judges = _judges(run, model, tokenizer)
    trainer = UnlearnTrainer(
        model, run.config, data=run.data, processing_class=tokenizer, callbacks=[*callbacks, *judges], score=scorer
    )
    refresh = refreshed(run, trainer, tokenizer)
    restrict(run, trainer)
    quiet(trainer)
    shift = _watch_selection(run, trainer)
    first = trainer.is_world_process_zero()
    if first:
        progress("\n".join([*(f"note: {line}" for line in notes(run)), trainer.describe()]))
    if run.oneshot is not None:
        trainer.oneshot = fire(run, trainer, tokenizer)
        return save_adapter(trainer, out, base=run.base, recipe=run.recipe, depends_on=below.ids)
    trainer.add_callback(stop := StopOnSignal())
    with room_for(Path(out)), stoppable(stop):
        trainer.train(resume_from_checkpoint=resume or None)
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; nothing was written to {out}, and "
            f"{run.config.work_dir} holds a checkpoint of it: the same command with --resume goes on from there"
        )
    if refresh is not None:
        refresh.compact()
    if not first:
        return None
    if shift is not None:
        progress(str(shift))
        for callback in callbacks:
            if hasattr(callback, "on_selection"):
                callback.on_selection(shift.history)
    if run.negate is not None:
        negate(trainer.bare, run.negate, trainer.trained_adapter)
    folder = save_adapter(trainer, out, base=run.base, recipe=run.recipe, depends_on=below.ids)
    if stock := (folder.manifest.method.get("selection") or {}).get("stock"):
        progress(f"saved: {_stock(stock)}")
    return folder


def _stock(found: Any) -> str:
    """What a sparse adapter's manifest says of its stock form, in words."""
    if isinstance(found, str):
        return f"in the compact form alone, which needs peft_unlearn to be loaded ({found})"
    return f"as stock SHiRA in {found['parts']} parts, {found['padding']:g} times the entries with zeros, and in the compact form"


def adapted_model(run: Run, below: Below, progress: Progress, resume: bool) -> tuple[Any, Any]:
    """(the base with the new adapter on top of those below, tokenizer); what the run leaves to the base is settled on the way."""
    from transformers import set_seed

    model = run.load()
    tokenizer = load_tokenizer(run.base_dir)
    generate_alternates(run, model, tokenizer)
    if run.auto is not None:
        choose_experts(run, model, tokenizer, progress)
    if below:
        model = below.put_on(model)
        run.recipe = {**run.recipe, "stack": below.rows()}
    if run.selecting is not None:
        run.selected = chosen(run, model, tokenizer, progress, resume)
        run.adapter = run.selecting.adapter(run.selected)
    set_seed(run.config.seed)  # the adapter's random start
    model = get_forget_model(model, of_images(run.adapter, run.data))
    if run.fila:
        run.frozen = begun(run, model, tokenizer)
    return model, tokenizer


def choose_experts(run: Run, model: Any, tokenizer: Any, progress: Progress) -> None:
    """Attribution on the run's own rows; the experts it picks replace ``experts: auto`` in the adapter and in the saved recipe."""
    found = attribute(model, tokenizer, run.data, run.auto or {})
    progress(str(found))
    run.adapter = replace(run.adapter, experts=found.chosen)
    kept = {k: v for k, v in run.recipe["adapter"].items() if k not in CHOOSING}
    run.recipe = {**run.recipe, "adapter": {**kept, "experts": {str(k): v for k, v in found.chosen.items()}}}


def generate_alternates(run: Run, model: Any, tokenizer: Any) -> None:
    """Winner answers by the base itself, where an objective wants them and the rows have none of their own."""
    for batch, kinds in alternates_of(run.config.term_list).items():
        rows = run.data.rows(batch) or []
        if "generated" in kinds and not all("alternate" in r for r in rows):
            texts = [to_text(r, tokenizer, run.data.template) for r in rows]
            others = other_answers(model, tokenizer, *zip(*texts, strict=True), seed=run.config.seed)
            rows[:] = [{**r, "alternate": a} for r, a in zip(rows, others, strict=True)]


def _judges(run: Run, model: Any, tokenizer: Any) -> tuple[Callable[..., Mapping[str, float]] | None, list[Any]]:
    """(score, callbacks that act on it) of a run that is evaluated while it trains."""
    if run.config.eval_strategy == "no":
        return None, []
    wanted = dict(run.recipe.get("eval") or {})
    scorer = make_score(run.data, tokenizer, suite=wanted.get("suite", "people"), n=wanted.get("n"))
    return scorer, score_callbacks(wanted, scorer, model)


def score_callbacks(
    evaluation: Mapping[str, Any], scorer: Callable[[Any], Mapping[str, float]], model: Any
) -> list[Any]:
    """Callbacks of a recipe's ``eval`` part: keep the best checkpoint, stop once enough is forgotten."""
    found: list[Any] = []
    floor = float(evaluation.get("retain_floor", 0.95))
    if evaluation.get("keep_best"):
        with Reference("before").on(model):
            at_start = dict(scorer(model))
        found.append(ForgetAtFloor(at_start, floor))
    if evaluation.get("stop_below") is not None:
        found.append(StopOn(forget_below=float(evaluation["stop_below"])))
    return found


def _watch_selection(run: Run, trainer: UnlearnTrainer) -> SelectionOverlap | None:
    """For an adapter inside experts: the callback that records which experts tokens get."""
    if not hasattr(run.adapter, "experts"):
        return None
    sets = dict(trainer.rows.sets)
    if "retain" not in sets and run.data.retain:  # no term reads it, and a drift there is what ought to be seen
        sets["retain"] = run.data.encode("retain", trainer.processing_class, run.config.max_length, run.config.on_overflow)  # fmt: skip
    shift = SelectionOverlap(sets, trainer.pad_id)
    trainer.add_callback(shift)
    return shift


def quiet(trainer: UnlearnTrainer) -> None:
    """Take off the Trainer's own printing to standard output, which is for results."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm and trainer.is_world_process_zero():
        from ..progress import training_bar

        trainer.add_callback(training_bar())
