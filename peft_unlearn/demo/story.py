"""A story in chapters, as both demos tell it: forget, judge, load elsewhere, take off again, write it down.

What differs between them is a `Script`; `people_story` and `moe_story` have one each.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..folder.results import check_place, write_file
from ..reporting import pictures
from ..reporting.document import Checks, Heading, Items, Lines, Part, Picture, Text, to_html
from ..reporting.result import Result
from ..reporting.tables import Table, of_report, report_reasons, report_text, to_text
from ..reporting.text import printable

ADAPTER, PICTURE, PAGE = "adapter", "picture.png", "report.html"
TOLERANCE = 1e-4
"""Largest allowed |logit - logit| between processes: the same arithmetic, and threads may be counted differently."""
CAPTION = "Points on the lines: {} rows of each set, looked at while training. Marks on the right: all rows."
METRIC = "value_accuracy"
SUPPRESSES = (
    "The adapter suppresses: the knowledge is still in the base model's weights, as taking it off shows, and fine-tuning or other "
    "prompts may bring some of it back."
)


@dataclass(kw_only=True)
class Story(Result):
    """What a demo did and found.

    met: the demo's aims, {set: {value, bound, met}}.   checks: (it holds, what was checked).   samples: questions with the answers of
    base and adapter.   curve: what was judged while training.   elsewhere, removal, report: of loading in another process, of
    `remove`, of `evaluate`.   files: name -> in the folder.   more: what only this story has, JSON-ready.   summary: last lines of
    the text.   conditions, recipe, sections: for the page.
    """

    title: str  # type: ignore[assignment]
    lead: str
    seed: int
    seconds: dict[str, float]
    met: dict[str, dict[str, Any]]
    checks: list[tuple[bool, str]]
    samples: list[dict[str, str]]
    curve: list[dict[str, Any]]
    elsewhere: dict[str, Any]
    removal: Any
    report: dict[str, Any]
    files: dict[str, str]
    recipe: str
    more: dict[str, Any] = field(default_factory=dict)
    conditions: Sequence[str] = ()
    summary: Sequence[str] = ()
    sections: Sequence[Part] = ()
    png: bytes = b""
    caption: str = ""

    @property
    def ok(self) -> bool:
        """Every check held (the aims are no check: another seed may miss one)."""
        return all(held for held, _ in self.checks)

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        same = ("seed", "seconds", "ok", "met", "samples", "curve", "elsewhere", "report", "files")
        return {
            "format": 1, **{key: getattr(self, key) for key in same},
            "checks": [{"held": held, "what": what} for held, what in self.checks], "removal": self.removal.to_dict(),
            **self.more,
        }  # fmt: skip

    def __str__(self) -> str:
        checks = [f"{'yes' if held else 'NO '} {what}" for held, what in self.checks]
        return "\n".join([report_text(self.report), "", to_text(self._samples()), "", *checks, *self.summary])

    def _samples(self) -> Table:
        rows = [[s[k] for k in ("kind", "question", "before", "after")] for s in self.samples]
        return Table(["", "question", "base", "with adapter"], rows, words=True)

    def parts(self) -> list[Part]:
        what = "Right answers on the forget and on the retain set over the steps"
        return [
            Text(self.lead, "lead"), Picture(self.png, what, "picture", self.caption), *self.sections,
            Heading("What it answers now"), self._samples(), Heading("Numbers"), of_report(self.report),
            *([Items(why)] if (why := report_reasons(self.report)) else []), Heading("What was checked"), Checks(self.checks),
            Heading("Taken off again"), Lines(str(self.removal)), Heading("What these numbers mean"),
            *map(Text, self.conditions), Heading("The recipe"), Lines(self.recipe),
        ]  # fmt: skip


@dataclass
class Stage:
    """Where a story is told: its folder, and what it has found so far."""

    out: Path
    seed: int
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    checks: list[tuple[bool, str]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def chapter(self, name: str, text: str) -> Iterator[None]:
        at = time.perf_counter()
        say(f"[{at - self.started:5.1f} s] {text}")
        yield
        self.seconds[name] = round(time.perf_counter() - at, 1)


@dataclass(frozen=True)
class Script:
    """What one story has of its own.

    recipe: an embedded one.   training, unseen: what is trained, and what the retain model never saw, in words.   kinds: set -> what
    its sample is called.   labels: of the two lines of the picture; the second is of the set `watched`.   files: name -> in the
    folder.   forgotten: sets of whose answers at most `at_most` may be left.   kept: set -> share of the base's value that has to
    be left.   conditions, summary: texts from (report, seconds, seed, aims missed), (report, aims missed).
    before: what comes before training, may change the recipe and returns callbacks of the Trainer.   after: what comes between
    loading elsewhere and taking off.   sections: further parts of the page.   check_out: refuses a folder.
    """

    recipe: str
    title: str
    lead: str
    training: str
    unseen: str
    kinds: Mapping[str, str]
    labels: tuple[str, str]
    files: Mapping[str, str]
    forgotten: Sequence[str]
    kept: Mapping[str, float]
    conditions: Callable[[Mapping[str, Any], Mapping[str, float], int, Sequence[str]], list[str]]
    summary: Callable[[Mapping[str, Any], Sequence[str]], list[str]]
    watched: str = "retain"
    at_most: float = 0.05
    before: Callable[[Stage, dict[str, Any]], Sequence[Any]] = lambda stage, recipe: ()
    after: Callable[[Stage, Sequence[str]], None] = lambda stage, prompts: None
    sections: Callable[[Stage], Sequence[Part]] = lambda stage: ()
    check_out: Callable[[Path], None] = lambda out: None

    def bounds(self, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The demo's aims: {set: {value, bound, share_of_base, met}}; a value that cannot be measured has not met its bound."""
        base, found = report["subjects"]["base"], report["subjects"]["adapter"]
        out: dict[str, dict[str, Any]] = {}
        for name in self.forgotten:
            value = found.get(f"{name}/{METRIC}")
            out[name] = {"value": value, "at_most": self.at_most, "met": value is not None and value <= self.at_most}
        for name, least in self.kept.items():
            value, own = found.get(f"{name}/{METRIC}"), base.get(f"{name}/{METRIC}")
            share = None if value is None or not own else value / own
            met = share is not None and share >= least
            out[name] = {"value": value, "share_of_base": share, "at_least": least, "met": met}
        return out

    def missed(self, report: Mapping[str, Any]) -> list[str]:
        return [name for name, bound in self.bounds(report).items() if not bound["met"]]


def run(
    script: Script, out: str | Path, seed: int = 0, *, recipe: Mapping[str, Any] | None = None, n: int | None = None
) -> Story:
    """Run a demo into folder `out`: adapter/, picture.png, report.html and the script's own. Running it again replaces them.

    Args:
        seed: of the run: the adapter's start and the pairing of rows. Data and base are the embedded ones.
        recipe: another recipe than the script's.
        n: at most so many rows of each set in the evaluation (tests; such numbers are not stored with the adapter).

    Raises:
        UserError: `out` is a file, or holds something in the place of a result that is not one.
    """
    stage = Stage(Path(out).expanduser(), seed)
    if stage.out.exists() and not stage.out.is_dir():
        raise UserError(f"{stage.out}: is a file; name a folder for the demo's results.")
    script.check_out(stage.out)
    for name in (PICTURE, PAGE):
        check_place(stage.out / name)
    stage.out.mkdir(parents=True, exist_ok=True)
    adapter = stage.out / ADAPTER
    with hushed(), one_thread():
        from ..folder.recipe import dump_recipe, load_recipe

        chosen = dict(recipe) if recipe is not None else load_recipe(embedded.asset("recipes", script.recipe))
        chosen["seed"] = seed
        curve = _trained(script, stage, chosen)
        with stage.chapter("evaluate", f"judging base, adapter and the retain model, which never saw {script.unseen}"):
            judged = judged_by_suite(adapter, n)
        report, samples = judged.to_dict(), pick_samples(judged, script.kinds)
        prompts = [s["prompt"] for s in samples]
        with stage.chapter("elsewhere", "loading the folder with plain PEFT in a process that has no peft_unlearn"):
            elsewhere = _elsewhere(stage, adapter, prompts)
        script.after(stage, prompts)
        with stage.chapter("remove", "taking the adapter off and comparing what is left with the base's files"):
            removal = removed(stage, adapter)
        ends = {s: _point(report, s, script.watched) for s in ("base", "retain_only", "adapter")}
        png = pictures.story(curve, ends, script.labels)
        write_file(stage.out / PICTURE, png)
        stage.seconds["total"] = round(time.perf_counter() - stage.started, 1)
    missed = script.missed(report)
    story = Story(
        title=script.title, lead=script.lead, seed=seed, seconds=stage.seconds, met=script.bounds(report), checks=stage.checks,
        samples=samples, curve=curve, elsewhere=elsewhere, removal=removal, report=report,
        files={"adapter": ADAPTER, **script.files}, recipe=dump_recipe(chosen), more=stage.more,
        conditions=script.conditions(report, stage.seconds, seed, missed), sections=script.sections(stage), png=png,
        caption=CAPTION.format((chosen.get("eval") or {}).get("n") or "some"),
        summary=[*script.summary(report, missed), "", f"Look at {stage.out / PAGE}; the adapter is {adapter}"],
    )  # fmt: skip
    write_page(stage.out / PAGE, story)
    say(f"[{stage.seconds['total']:5.1f} s] done: {stage.out / PAGE}")
    return story


# --- chapters ---------------------------------------------------------------------------------------------------------


def _trained(script: Script, stage: Stage, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Train; the curve of what was judged on the way."""
    from ..training.train import train

    watch, callbacks = _watch(script.watched), script.before(stage, recipe)
    with stage.chapter("train", script.training):
        folder = train(recipe, stage.out / ADAPTER, callbacks=[watch, *callbacks], progress=say)
    assert folder is not None  # one process
    shutil.rmtree(f"{stage.out / ADAPTER}.work", ignore_errors=True)  # the checkpoints of a run that ended
    return watch.curve(folder.manifest.method.get("best_step"))


def _watch(retain: str) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Keeps value accuracies of the forget set and of the set called `retain`, for the picture."""

        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            keys = {r: f"eval_{s}/{METRIC}" for r, s in (("forget", "forget"), ("retain", retain))}
            if metrics is not None and all(k in metrics for k in keys.values()):
                self.points.append({"step": state.global_step, **{r: float(metrics[k]) for r, k in keys.items()}})

        def curve(self, best: Any) -> list[dict[str, Any]]:
            kept = best or (self.points[-1]["step"] if self.points else None)
            return [{**p, **({"kept": True} if p["step"] == kept else {})} for p in self.points]

    return Watch()


def judged_by_suite(adapter: Path, n: int | None) -> Any:
    from ..evaluation.evaluate import evaluate
    from ..progress import bars

    with bars() as progress:
        return evaluate([adapter], n=n, progress=progress)


def pick_samples(report: Any, kinds: Mapping[str, str]) -> list[dict[str, str]]:
    """A question of each set in `kinds` with the answers of base and adapter.

    The first of each set that the base answers rightly; not chosen by what the adapter answers.
    """
    from ..data.formats import to_text

    out = []
    for name, kind in kinds.items():
        rows = report.rows.get(name) or []
        right = report.per_row["base"].get(f"{name}/{METRIC}")
        if not rows or name not in report.answers["base"]:
            continue
        i = next((i for i in range(len(rows)) if right is not None and right[i] == 1.0), 0)
        before, after = (printable(report.answers[s][name][i], breaks=False) for s in ("base", "adapter"))
        question, prompt = str(rows[i]["question"]), to_text(rows[i])[0]
        out.append({"kind": kind, "question": question, "prompt": prompt, "before": before, "after": after})
    return out


def _elsewhere(stage: Stage, adapter: Path, prompts: list[str]) -> dict[str, Any]:
    import torch

    from ..stack.model import ForgetModel
    from . import child

    stack = ForgetModel.from_pretrained(None, adapter)
    there = child.run(stack.base_dir, adapter, prompts)
    gap = 0.0
    with torch.no_grad():
        for text, theirs in zip(prompts, there["logits"], strict=True):
            ids = stack.tokenizer(text, return_tensors="pt")["input_ids"]
            ours = stack.model(input_ids=ids, use_cache=False).logits[0, -1]
            gap = max(gap, float((ours - torch.tensor(theirs)).abs().max()))
    same = "the same logits, bit for bit" if gap == 0 else f"logits that differ by at most {gap:.1e}"
    what = f"plain PEFT {there['peft']}, in a process where peft_unlearn cannot be found, gives {same}"
    stage.checks.append((gap <= TOLERANCE, what))
    return {"peft": there["peft"], "max_logit_difference": gap, "prompts": len(prompts)}


def removed(stage: Stage, adapter: Path) -> Any:
    from ..stack.model import remove

    found = remove(adapter)
    stage.checks.append((found.ok, "after removal every tensor is the base's, bit for bit"))
    return found


def _point(report: Mapping[str, Any], subject: str, retain: str) -> dict[str, float]:
    """The subject's place in the picture; `retain` names the set on its second axis."""
    values = report["subjects"].get(subject) or {}
    return {r: float(values.get(f"{s}/{METRIC}") or 0.0) for r, s in (("forget", "forget"), ("retain", retain))}


def write_page(path: Path, story: Story) -> None:
    write_file(path, to_html(story.title, story.parts(), tab="peft-unlearn demo"))


# --- quiet and alike everywhere ---------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread is as fast as several for a model this small, and gives the same numbers whatever the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def hushed() -> Iterator[None]:
    """No bars and warnings of libraries between ours; everything as before afterwards."""
    from transformers.utils import logging as shown

    level, bars = shown.get_verbosity(), shown.is_progress_bar_enabled()
    shown.set_verbosity_error()
    shown.disable_progress_bar()
    quieted = {name: logging.getLogger(name).level for name in ("torch", "peft", "accelerate")}
    for name in quieted:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        shown.set_verbosity(level)
        if bars:
            shown.enable_progress_bar()
        for name, old in quieted.items():
            logging.getLogger(name).setLevel(old)
