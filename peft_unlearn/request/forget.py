"""`forget`: from one question, or a file of them, to a finished forget adapter with its numbers."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..data.formats import load_rows, to_text
from ..errors import UserError
from ..evaluation import suites
from ..evaluation.plan import rows_of
from ..evaluation.quick import make_score
from ..evaluation.score import on_one_model, score
from ..evaluation.subjects import work_data
from ..folder.atomic import room_for, write_text
from ..folder.base import load_base, load_config, load_tokenizer, resolve_base
from ..folder.digest import digest_checkpoint
from ..folder.dtype import dtype_of
from ..folder.read import AdapterFolder
from ..folder.recipe import dump_recipe
from ..folder.write import check_destination, update_eval
from ..training.adapt import get_forget_model
from ..training.config import WORK
from ..training.save import save_adapter
from ..training.train import to_stderr
from .ask import Asker, Progress
from .outcome import Forgotten
from .prepare import Request, as_questions, prepare
from .settings import Settings, preset, recipe_for
from .tune import Found, Tuner, missing, numbers_by_set

SUITE = "own"
SHOWN = 8
"""Questions whose answers are printed before and after."""


def seconds_of(budget: str | float) -> float:
    """Seconds of "90", "90s", "10m" or "1h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(budget).strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--budget {budget}: a time such as 90s, 10m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


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
    asked = [questions] if isinstance(questions, str) else list(questions)
    prepared = file is not None and Path(file).expanduser().is_dir()
    if bool(asked) == (file is not None):
        raise UserError(
            "say what is to be forgotten: questions, or a file of them with --file" + (", not both" if asked else "")
        )
    if prepared and retain is not None:
        raise UserError(
            f"--retain belongs to making rows, and {file} has them already; put yours into kept.jsonl there"
        )
    if value is not None and len(asked) != 1:
        raise UserError("--value belongs to a single question; in a file each row has its own 'value'")
    out, rows = Path(out).expanduser(), [{"question": q} for q in asked]
    check_destination(out)
    if file is not None and not prepared:
        rows = as_questions(load_rows(str(file), "forget set"))
    kept = as_questions(load_rows(str(retain), "retain set")) if retain is not None else []
    base_dir, work = resolve_base(base), out.with_name(out.name + WORK)
    with room_for(out):
        loaded = _load(base, base_dir, dtype_of(dtype, base_dir), log)
        if prepared:
            request, data = Request([], []), Path(str(file)).expanduser()
        else:
            work.mkdir(parents=True, exist_ok=True)
            ask = Asker(
                loaded.model, loaded.tokenizer, loaded.template, base=digest_checkpoint(base_dir), kept=work / "answers.json",
                progress=progress,
            )  # fmt: skip
            seconds = math.inf if prepare_only else (deadline - began) / 5
            request = prepare(rows, ask, value=value, kept=kept, seed=seed, seconds=seconds)
            request.write(data := work_data(out))
        bundle = _bundle(data, loaded.template)
        done = Forgotten(
            facts=[(f.question, f.value[0]) for f in request.facts] or _facts_of(bundle),
            unknown=request.unknown, notes=request.notes, work=str(work),
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
            folder = save_adapter(tuner.trainer, out, base=base, recipe=recipe(found.settings))
            done.runs = [t.to_dict() for t in found.trials]
            _judge(done, loaded, tuner.model, bundle, folder)
    done.seconds = time.monotonic() - began
    return done


@dataclass(frozen=True)
class _Loaded:
    """A base in memory, and how it is asked."""

    model: Any
    tokenizer: Any
    template: str
    dtype: str
    blocks: int


def _load(base: str, base_dir: Path, dtype: str, log: Callable[[str], None]) -> _Loaded:
    log(f"loading {base} in {dtype}")
    model, tokenizer = load_base(base_dir, dtype), load_tokenizer(base_dir)
    template = "chat" if getattr(tokenizer, "chat_template", None) else "qa"
    return _Loaded(model, tokenizer, template, dtype, load_config(base_dir).get_text_config().num_hidden_layers)


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
    loaded: _Loaded, bundle: ForgetRetain, recipe: Callable[[Settings], dict[str, Any]], settings: Settings | None, deadline: float,
    work: Path, log: Callable[[str], None],
) -> tuple[Tuner, Found]:  # fmt: skip
    """The tuner, with the adapter in its best state, and what it found; the recipe of that run lies in the work folder."""
    from transformers import set_seed

    parameters = sum(p.numel() for p in loaded.model.parameters())
    why, start = preset(parameters) if settings is None else ("given", settings)
    log(f"settings start from: {why}")
    suite = suites.load(SUITE)
    quick = make_score(bundle, loaded.tokenizer, suite=suite)
    before, rows = numbers_by_set(quick(loaded.model)), {k: min(n, suite.quick_rows) for k, n in _sizes(bundle).items()}
    log("base: " + ", ".join(f"{k} {v:.2f}" for k, v in before.items()))
    set_seed(recipe(start)["seed"])
    adapted = get_forget_model(loaded.model, recipe(start)["adapter"])
    tuner = Tuner(adapted, loaded.tokenizer, bundle, recipe, quick, before, rows, deadline=deadline, work=work, log=log)
    found = tuner.run(start)
    write_text(work / "recipe.yaml", dump_recipe(recipe(found.settings)))
    tuner.trainer.state.best_global_step = found.step
    return tuner, found


def _judge(done: Forgotten, loaded: _Loaded, model: Any, bundle: ForgetRetain, folder: AdapterFolder) -> None:
    """The whole suite on base and adapter, and the answers before and after; numbers go into the folder too."""
    subjects, tokenizer = on_one_model(model, {"base": None, "adapter": "default"}), loaded.tokenizer
    report = score(subjects, SUITE, bundle, tokenizer, adapter_id=folder.adapter_id, base=folder.manifest.base.ref)
    update_eval(folder.path, report.to_dict())
    numbers = {s: {k: v for k, v in (report.subjects[s] or {}).items() if v is not None} for s in ("base", "adapter")}
    done.before, after = numbers_by_set(numbers["base"]), numbers_by_set(numbers["adapter"])
    done.after = {k: v for k, v in after.items() if k in done.before}
    done.sizes = _sizes(bundle)
    done.lacking = missing(done.after, done.before, done.sizes)
    done.path = str(folder.path)
    asked = [row["question"] for row in report.rows["forget"]]
    before, now = (dict(zip(asked, report.answers[s]["forget"], strict=True)) for s in ("base", "adapter"))
    shown = [q for q, _ in done.facts if q in before][:SHOWN]
    done.answers = [(q, before[q].split("\n")[0], now[q].split("\n")[0]) for q in shown]
