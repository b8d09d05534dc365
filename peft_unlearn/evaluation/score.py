"""`score`: the numbers of several subjects on one suite. Texts stay in memory: the JSON holds none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..data.chat import Template
from ..errors import UserError
from ..folder.versions import installed_versions
from ..registry import get
from ..reporting.result import Result
from ..reporting.tables import report_text
from . import suites
from .feed import Reading, feed
from .measured import Array
from .numbers import Numbers, numbers_of_all
from .plan import make_plan, measure
from .provider import Context, Progress
from .shapes import Measured, Plan, Suite

FORMAT = 1
Subject = Callable[[], AbstractContextManager[Any]]


@dataclass
class Report(Result):
    """The numbers of several subjects on one suite.

    suite: its name.   subjects: subject -> key -> value, None where it has none; None for a subject that was not given. A key is
    ``set/metric``, or the metric alone where it covers the suite.   details: subject -> key -> {n, ci95, reason}.   metrics: what is
    known of each.   data_matches_manifest: whether the data are the adapter's own forget set.   scale: at which it was judged.
    dtype: what the models were computed in.
    lm_eval: see `run_tasks`.

    In memory only: per_row: subject -> key -> (n,) values, for every key that is a mean over rows.   rows: set -> the rows evaluated
    (texts).   answers: subject -> set -> greedy answers, for sets that some metric generates for.   log_ratio: subject -> set ->
    (rows with wrong answers,) log truth ratio.
    """

    suite: str
    subjects: dict[str, dict[str, float | None] | None]
    details: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter_id: str | None = None
    base: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)
    data_matches_manifest: bool | None = None
    scale: float | None = None
    dtype: str | None = None
    lm_eval: dict[str, Any] | None = None
    per_row: dict[str, dict[str, Array]] = field(default_factory=dict, repr=False)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    answers: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False)
    log_ratio: dict[str, dict[str, Array]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """eval.json."""
        always = ("suite", "subjects", "details", "metrics", "adapter_id", "base", "versions")
        known = [k for k in ("data_matches_manifest", "scale", "dtype", "lm_eval") if getattr(self, k) is not None]
        return {"format": FORMAT, **{key: getattr(self, key) for key in (*always, *known)}}

    def __str__(self) -> str:
        return report_text(self.to_dict())


def score(
    subjects: Mapping[str, Subject | None],
    suite: str | Path | Mapping[str, Any] | Suite,
    data: Any,
    tokenizer: Any,
    progress: Progress | None = None,
    n: int | None = None,
    *,
    adapter_id: str | None = None,
    base: str | None = None,
    template: Template | None = None,
    token_budget: int = 4096,
    brief: bool = False,
) -> Report:
    """Evaluate subjects on a suite.

    Args:
        subjects: name -> a function that returns a context manager, inside which the model it yields *is* that subject
            (`on_one_model` makes them for adapters of one loaded model). None: the subject is not there; its block
            is null. They are run one after the other, in order. "base" is what gates look at, the suite's
            `reference` (the retain model) what others are compared with.
        suite: name, YAML file, mapping or Suite.
        data: a `ForgetRetain`, or a mapping of set name to rows.
        tokenizer: of all subjects.
        progress: called as progress(what, done, total).
        n: at most so many rows of each set, evenly spaced; default all.
        adapter_id, base: written into the result as they are.
        template: wording of question/answer rows; default the data's own.
        token_budget: padded tokens in a batch.
        brief: answers end where no metric needs more of them (the value is named, say), and so do `Report.answers`.

    Raises:
        UserError: no subjects, a malformed suite, or a row that has no target.
    """
    suite = suites.load(suite)
    if not any(subject is not None for subject in subjects.values()):
        raise UserError("there is no model to evaluate")
    plan = make_plan(suite, data, tokenizer, n, template, brief)
    measured = _measured(subjects, plan, progress, token_budget)
    report = _report(plan, numbers_of_all(plan, measured), measured)
    absent = [name for name, subject in subjects.items() if subject is None]
    if suite.reference not in subjects:
        absent.append(suite.reference)
    report.subjects.update(dict.fromkeys(absent))
    report.details.update({s: {"reason": "this model was not given"} for s in absent})
    report.adapter_id, report.base = adapter_id, base
    return report


def _measured(
    subjects: Mapping[str, Subject | None], plan: Plan, progress: Progress | None, token_budget: int
) -> dict[str, Measured]:
    """What every subject answered, one after the other."""
    out: dict[str, Measured] = {}
    for name, subject in subjects.items():
        if subject is not None:
            report = None if progress is None else _named(progress, name)
            with subject() as model:
                base: Subject | None = partial(nullcontext, model) if name == "base" else subjects.get("base")
                context = Context(name, base, {}, plan.suite.settings, report, token_budget)
                out[name] = measure(model, plan, report, token_budget, context)
    return out


def _named(progress: Progress, name: str) -> Progress:
    return lambda what, done, total: progress(f"{name}: {what}", done, total)


def _report(plan: Plan, numbers: Mapping[str, Numbers], measured: Mapping[str, Measured]) -> Report:
    used = sorted({m for s in plan.suite.sets.values() for m in s.metrics} | set(plan.suite.whole))
    known = ("better", "reference", "version")
    return Report(
        suite=plan.suite.name,
        subjects={s: {key: number.value for key, number in found.items()} for s, found in numbers.items()},
        details={s: {key: number.to_dict() for key, number in found.items()} for s, found in numbers.items()},
        metrics={m: {key: get("metric", m).extra[key] for key in known} for m in used},
        per_row={s: {k: v.rows for k, v in found.items() if v.rows is not None} for s, found in numbers.items()},
        rows={name: s.rows for name, s in plan.sets.items()},
        answers={
            subject: {n: [m.answers[p] for p in s.prompts] for n, s in plan.sets.items() if m.answered(s)}
            for subject, m in measured.items()
        },
        log_ratio={
            subject: {
                name: feed("log_ratio", Reading(s, m, s.chosen))
                for name, s in plan.sets.items()
                if s.right and name not in m.too_long
            }
            for subject, m in measured.items()
        },
    )


def on_one_model(model: Any, adapters: Mapping[str, str | Sequence[str] | None]) -> dict[str, Subject]:
    """Subjects that are adapters of one loaded `PeftModel`, swapped in place.

    adapters: subject -> adapter name, several names (active together), or None = the base, all adapters off. Afterwards the same adapters
    are active and the same parameters trainable as before.
    """
    return {subject: partial(_swapped, model, which) for subject, which in adapters.items()}


@contextmanager
def _swapped(model: Any, adapters: str | Sequence[str] | None) -> Iterator[Any]:
    trainable = [(p, p.requires_grad) for p in model.parameters()]  # PEFT makes trainable whatever it switches on
    prompt_learning = model.active_peft_config.is_prompt_learning
    active = model.active_adapter if prompt_learning else list(model.base_model.active_adapters)
    switch = model.set_adapter if prompt_learning else model.base_model.set_adapter
    try:
        if adapters is None:
            with model.disable_adapter():
                yield model
        else:
            names = [adapters] if isinstance(adapters, str) else list(adapters)
            switch(names[0] if prompt_learning else names)  # a soft prompt stands alone
            yield model
    finally:
        if adapters is not None:
            switch(active)
        for p, flag in trainable:
            p.requires_grad_(flag)
