"""`forget`: from one question, or a file of them, to a finished forget adapter with its numbers."""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..data.formats import load_rows, to_text
from ..errors import UserError
from ..evaluation import suites
from ..evaluation.generate import greedy
from ..evaluation.plan import rows_of
from ..evaluation.quick import make_score
from ..evaluation.score import on_one_model, score
from ..evaluation.subjects import work_data
from ..folder.atomic import room_for
from ..folder.base import load_base, load_config, load_tokenizer, resolve_base
from ..folder.digest import digest_checkpoint
from ..folder.recipe import dump_recipe
from ..folder.write import check_destination, update_eval
from ..reporting.result import Result, fields_of
from ..reporting.tables import Table
from ..reporting.tables import to_text as table_text
from ..training.adapt import get_forget_model
from ..training.config import WORK
from ..training.save import save_adapter
from .ask import Asker, Progress
from .dtype import fast_dtype
from .prepare import Request, as_questions, prepare
from .settings import Settings, preset, recipe_for
from .tune import AIM, FLOOR, Found, Tuner, floor_of, missing, numbers_by_set

SUITE = "own"
SHOWN = 8
"""Questions whose answers are printed before and after."""


@dataclass
class Forgotten(Result):
    """What `forget` found and did.

    facts: (question, value) of what the base knew.   unknown: (question, answer, why it was left out).   before, after: set -> share of
    answers that name the value, or that parse, of base and adapter.   answers: (question, base's answer, adapter's answer).
    sizes: set -> rows that these are means of.   lacking: set -> by how much its aim was missed.
    path: the adapter's folder; None where only the data were prepared.
    """

    facts: list[tuple[str, str]]
    unknown: list[tuple[str, str, str]]
    rows: dict[str, int]
    work: str
    notes: list[str] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    lacking: dict[str, float] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    path: str | None = None
    title = "Forget"

    @property
    def exit_code(self) -> int:
        return 1 if self.lacking else 0

    def to_dict(self) -> dict[str, Any]:
        return {**fields_of(self), "reached": self.path is not None and not self.lacking}

    def remarks(self) -> list[str]:
        return [*self.notes, *(f"left out: {q} ({why}; answered: {a})" for q, a, why in self.unknown)]

    def verdict(self) -> str:
        """The result in one sentence."""
        if self.path is None:
            return f"Prepared; look at {self.work}/data, edit it, and go on with --file {self.work}/data."
        if not self.lacking:
            return "Reached: the value is no longer named, and what stands beside it was kept."
        far = ", ".join(f"{k} {self.after[k]:.2f} ({self._aim(k)})" for k in self.lacking)
        if self.lacking.keys() & FLOOR.keys() and self.lacking.keys() & AIM.keys():
            return f"Not separable with these settings: neither side is reached: {far}."
        return f"Not reached: {far}."

    def _aim(self, name: str) -> str:
        if name in AIM:
            return f"<= {AIM[name]:.2f}"
        return f">= {floor_of(name, self.before, self.sizes):.2f}" if name in FLOOR and name in self.before else ""

    def __str__(self) -> str:
        rows = ", ".join(f"{k} {n}" for k, n in self.rows.items())
        lines = [f"{len(self.facts)} fact(s) to forget, {len(self.unknown)} left out; rows: {rows}"]
        if self.path is not None:
            table = [[k, f"{self.before[k]:.2f}", f"{v:.2f}", self._aim(k)] for k, v in self.after.items()]
            lines += ["", table_text(Table(("names the value", "base", "adapter", "aim"), table)), ""]
            lines += [f"{q}\n  before: {a}\n  after:  {b}" for q, a, b in self.answers]
            lines += ["", f"{self.path} ({self.seconds:.0f} s, {len(self.runs)} run(s))"]
        return "\n".join([*lines, self.verdict()])


def seconds_of(budget: str | float) -> float:
    """Seconds of "90", "90s", "10m" or "1h"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(budget).strip())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"--budget {budget}: a time such as 90s, 10m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
    say: Callable[[str], None] = to_stderr,
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
    if value is not None and (len(asked) != 1):
        raise UserError("--value belongs to a single question; in a file each row has its own 'value'")
    out, rows = Path(out).expanduser(), [{"question": q} for q in asked]
    check_destination(out)
    if file is not None and not prepared:
        rows = as_questions(load_rows(str(file), "forget set"))
    kept = as_questions(load_rows(str(retain), "retain set")) if retain is not None else []
    base_dir = resolve_base(base)
    work = out.with_name(out.name + WORK)
    with room_for(out):
        kind = fast_dtype(base_dir) if dtype == "auto" else dtype
        say(f"loading {base_dir.name} in {kind}")
        model, tokenizer = load_base(base_dir, kind), load_tokenizer(base_dir)
        template = "chat" if getattr(tokenizer, "chat_template", None) else "qa"
        if prepared:
            request, data = Request([], []), Path(str(file)).expanduser()
        else:
            ask = Asker(
                model,
                tokenizer,
                template,
                base=digest_checkpoint(base_dir),
                kept=work / "answers.json",
                progress=progress,
            )
            work.mkdir(parents=True, exist_ok=True)
            request, data = (
                prepare(
                    rows,
                    ask,
                    value=value,
                    kept=kept,
                    seed=seed,
                    seconds=math.inf if prepare_only else (deadline - began) / 5,
                ),
                work_data(out),
            )
            request.write(data)
        bundle = _bundle(data, template)
        done = Forgotten(
            facts=[(f.question, f.value[0]) for f in request.facts] or _facts_of(bundle),
            unknown=request.unknown, notes=request.notes, work=str(work),
            rows={n: len(bundle.rows(n) or ()) for n in bundle.names()},
        )  # fmt: skip
        for row in (bundle.forget[0], *(bundle.retain or [])[:1]):
            say(f"a row: {to_text(row, tokenizer, template)!r} (target: {row.get('value')!r})")
        if prepare_only:
            done.seconds = time.monotonic() - began
            return done
        _train(
            done,
            model,
            tokenizer,
            bundle,
            base,
            base_dir,
            data,
            template,
            seed,
            settings,
            deadline,
            work,
            out,
            say,
            kind,
        )
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


def _train(
    done: Forgotten, model: Any, tokenizer: Any, bundle: ForgetRetain, base: str, base_dir: Path, data: Path, template: str,
    seed: int, settings: Settings | None, deadline: float, work: Path, out: Path, say: Callable[[str], None], kind: str,
) -> None:  # fmt: skip
    """Search, train, save and judge."""
    from transformers import set_seed

    why, start = preset(sum(p.numel() for p in model.parameters())) if settings is None else ("given", settings)
    say(f"settings start from: {why}")
    blocks, sets = load_config(base_dir).get_text_config().num_hidden_layers, done.rows

    def recipe(s: Settings) -> dict[str, Any]:
        return recipe_for(
            s,
            base=base,
            data=str(data),
            template=template,
            sets=sets,
            blocks=blocks,
            seed=seed,
            bf16=kind == "bfloat16",
        )

    suite = suites.load(SUITE)
    quick = make_score(bundle, tokenizer, suite=suite)
    before, rows = numbers_by_set(quick(model)), {k: min(n, suite.quick_rows) for k, n in _sizes(bundle).items()}
    say("base: " + ", ".join(f"{k} {v:.2f}" for k, v in before.items()))
    set_seed(seed)
    adapted = get_forget_model(model, recipe(start)["adapter"])
    tuner = Tuner(adapted, tokenizer, bundle, recipe, quick, before, rows, deadline=deadline, work=work, say=say)
    found = tuner.run(start)
    final = recipe(found.settings)
    (work / "recipe.yaml").write_text(dump_recipe(final), encoding="utf-8")
    tuner.trainer.state.best_global_step = found.step
    folder = save_adapter(tuner.trainer, out, base=base, recipe=final)
    _judge(done, found, adapted, tokenizer, bundle, folder, base, template)


def _judge(
    done: Forgotten,
    found: Found,
    model: Any,
    tokenizer: Any,
    bundle: ForgetRetain,
    folder: Any,
    base: str,
    template: str,
) -> None:
    """The whole suite on base and adapter, the answers before and after, and the verdict."""
    subjects = on_one_model(model, {"base": None, "adapter": "default"})
    report = score(subjects, SUITE, bundle, tokenizer, adapter_id=folder.adapter_id, base=folder.manifest.base.ref)
    update_eval(folder.path, report.to_dict())
    numbers = {s: {k: v for k, v in (report.subjects[s] or {}).items() if v is not None} for s in ("base", "adapter")}
    done.before, done.after = numbers_by_set(numbers["base"]), numbers_by_set(numbers["adapter"])
    done.after = {k: v for k, v in done.after.items() if k in done.before}
    done.sizes = _sizes(bundle)
    done.lacking = missing(done.after, done.before, done.sizes)
    done.runs = [t.to_dict() for t in found.trials]
    done.path = str(folder.path)
    questions = [q for q, _ in done.facts[:SHOWN]]
    prompts = [to_text({"question": q, "answer": "-"}, tokenizer, template)[0] for q in questions]
    said = {}
    for subject in ("base", "adapter"):
        with subjects[subject]() as judged:
            said[subject] = greedy(judged, tokenizer, prompts, 24)
    done.answers = list(
        zip(questions, (_first(a) for a in said["base"]), (_first(a) for a in said["adapter"]), strict=True)
    )


def _first(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
