"""`forget`: from one question, or a file of them, to a finished forget adapter with its numbers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..data.formats import to_text
from ..evaluation import suites
from ..evaluation.quick import make_score
from ..evaluation.rows import rows_of
from ..evaluation.score import on_one_model, score
from ..evaluation.subjects import work_data
from ..folder.atomic import room_for
from ..folder.base import resolve_base
from ..folder.dtype import dtype_of
from ..folder.read import AdapterFolder
from ..folder.write import check_destination, update_eval
from ..training.adapt import get_forget_model
from ..training.config import WORK
from ..training.save import save_adapter
from ..training.train import to_stderr
from .ask import Progress
from .augment import Loaded, load, rows_of_request
from .goal import Goal, numbers_by_set
from .outcome import Forgotten
from .prepare import Request, prepare
from .runs import Found, Tuner, identity_of, keep
from .settings import Settings, preset, recipe_for, seconds_of

SUITE = "own"
JUDGED = 120
"""Rows of a set at most, evenly spaced, that the finished adapter is judged on; `peft-unlearn eval` takes all."""
SHOWN = 8
"""Questions whose answers are printed before and after."""


def forget(
    questions: str | Sequence[str] = (),
    *,
    base: str,
    out: str | Path = "forget-adapter",
    file: str | Path | None = None,
    retain: str | Path | None = None,
    value: str | None = None,
    budget: str | float = "15m",
    seed: int = 0,
    dtype: str = "auto",
    prepare_only: bool = False,
    settings: Settings | None = None,
    log: Callable[[str], None] = to_stderr,
    progress: Progress | None = None,
) -> Forgotten:
    """Make `base` forget what it answers to the questions, and keep the rest, as a forget adapter in `out`.

    The base is asked, the value is found in its answer, other wordings and reversed questions are made, neighbors (the same question
    about others) and neutral prompts are answered by the base itself; settings are searched within the budget, and everything is judged
    by what the model writes. All rows lie in ``<out>.work/data``, which is private: it enters neither the adapter nor its card.

    Args:
        file: rows with questions (and ``value``, ``fact`` where known), or a folder that an earlier call prepared.
        retain: rows to be kept, with their right answers; neighbors of your own.
        value: what is to be forgotten in the answer of a single question.
        budget: seconds, or "10m": asking, training and judging together; the last judging may exceed it.
        dtype: float32, bfloat16, or auto: the base's own where products in it are fast on this machine.
        prepare_only: stop after the data are written.
        settings: where the search starts; default a preset by the size of the base.

    Raises:
        UserError: a base that does not know the answer, rows that are no questions, a budget that is too small; nothing at `out` is
            touched then.
    """
    began = time.monotonic()
    deadline = began + seconds_of(budget)
    out, prepared = Path(out).expanduser(), file is not None and Path(file).expanduser().is_dir()
    rows, kept = rows_of_request(questions, file, retain, value)
    check_destination(out)
    base_dir, work = resolve_base(base), out.with_name(out.name + WORK)
    with room_for(out):
        loaded = load(base, base_dir, dtype_of(dtype, base_dir), log)
        if prepared:
            request, data = Request([], []), Path(str(file)).expanduser()
        else:
            ask = loaded.asker(work / "answers.json", progress)
            seconds = math.inf if prepare_only else (deadline - began) / 5
            request = prepare(rows, ask, value=value, kept=kept, seed=seed, seconds=seconds)
            request.write(data := work_data(out))
        bundle = _bundle(data, loaded.template)
        done = Forgotten(
            facts=[(f.question, f.value[0]) for f in request.facts] or _facts_of(bundle),
            unknown=request.unknown, notes=request.notes, data=str(data),
            rows={n: len(bundle.rows(n) or ()) for n in bundle.names()},
        )  # fmt: skip
        for row in (bundle.forget[0], *(bundle.retain or [])[:1]):
            log(f"a row: {to_text(row, loaded.tokenizer, loaded.template)!r} (target: {row.get('value')!r})")
        if not prepare_only:
            recipe = partial(
                recipe_for, base=base, data=str(data), template=loaded.template, sets=done.rows, blocks=loaded.blocks, seed=seed,
                bf16=loaded.dtype == "bfloat16",
            )  # fmt: skip
            tuner, found = _search(loaded, bundle, recipe, settings, deadline, work, log)
            folder = save_adapter(tuner.finished(found), out, base=base, recipe=recipe(found.settings))
            done.runs = [t.to_dict() for t in found.trials]
            _judge(done, loaded, tuner.model, bundle, folder, progress)
    done.seconds = time.monotonic() - began
    return done


def _bundle(data: Path, template: str) -> ForgetRetain:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*near-duplicate.*")  # neighbors are there to be like them
        bundle = ForgetRetain.load(data, template)
    bundle.target = "value"
    return bundle


def _sizes(bundle: ForgetRetain) -> dict[str, int]:
    """Rows of every set that the suite judges, under the suite's name of it."""
    return {name: len(rows_of(bundle, s.source) or ()) for name, s in suites.load(SUITE).sets.items()}


def _facts_of(bundle: ForgetRetain) -> list[tuple[str, str]]:
    first = {
        str(r.get("fact") or r["question"]): (str(r["question"]), str(r.get("value") or ""))
        for r in reversed(bundle.forget)
    }
    return list(first.values())


def _search(
    loaded: Loaded, bundle: ForgetRetain, recipe: Callable[[Settings], dict[str, Any]], settings: Settings | None, deadline: float,
    work: Path, log: Callable[[str], None],
) -> tuple[Tuner, Found]:  # fmt: skip
    """The tuner, with the adapter in its best state, and what it found; the recipe of that run lies in the work folder."""
    from transformers import set_seed

    parameters = sum(p.numel() for p in loaded.model.parameters())
    why, start = preset(parameters) if settings is None else ("given", settings)
    log(f"settings start from: {why}")
    suite = suites.load(SUITE)
    quick = make_score(bundle, loaded.tokenizer, suite=suite)
    before = numbers_by_set(quick(loaded.model))
    log("base: " + ", ".join(f"{k} {v:.2f}" for k, v in before.items()))
    goal = Goal.of(suite, before, {k: min(n, suite.quick_rows) for k, n in _sizes(bundle).items()})
    set_seed(recipe(start)["seed"])
    adapted = get_forget_model(loaded.model, recipe(start)["adapter"])
    tuner = Tuner(
        adapted, loaded.tokenizer, bundle, recipe, quick, goal, deadline=deadline, work=work, log=log,
        identity=identity_of(recipe(start), bundle, loaded.digest),
    )  # fmt: skip
    found = tuner.run(start)
    keep(tuner, found, recipe(found.settings))
    return tuner, found


def _judge(
    done: Forgotten, loaded: Loaded, model: Any, bundle: ForgetRetain, folder: AdapterFolder, progress: Progress | None
) -> None:
    """The whole suite on base and adapter, and the answers before and after; numbers go into the folder too."""
    subjects, tokenizer = on_one_model(model, {"base": None, "adapter": "default"}), loaded.tokenizer
    report = score(
        subjects,
        SUITE,
        bundle,
        tokenizer,
        progress,
        JUDGED,
        adapter_id=folder.adapter_id,
        base=folder.manifest.base.ref,
        brief=True,
    )
    update_eval(folder.path, report.to_dict())
    numbers = {s: {k: v for k, v in (report.subjects[s] or {}).items() if v is not None} for s in ("base", "adapter")}
    done.before, after = numbers_by_set(numbers["base"]), numbers_by_set(numbers["adapter"])
    done.after = {k: v for k, v in after.items() if k in done.before}
    done.sizes = {name: min(n, JUDGED) for name, n in _sizes(bundle).items()}
    goal = Goal.of(suites.load(SUITE), done.before, done.sizes)
    done.lacking, done.aims, done.kept_sets = goal.missing(done.after), goal.aims(), list(goal.least)
    done.path = str(folder.path)
    asked = [row["question"] for row in report.rows["forget"]]
    before, now = (dict(zip(asked, report.answers[s]["forget"], strict=True)) for s in ("base", "adapter"))
    shown = [q for q, _ in done.facts if q in before][:SHOWN]
    done.answers = [(q, before[q].split("\n")[0], now[q].split("\n")[0]) for q in shown]
