"""The whole story on the embedded model in one command: forget, judge, save, load elsewhere, merge, remove, report."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..evaluation.score import Report
from ..reporting import tables as table
from . import child, page

RECIPE = "people-demo.yaml"
ADAPTER, MERGED, PICTURE, PAGE = "adapter", "merged", "picture.png", "report.html"
TOLERANCE = 1e-4
"""Largest allowed |logit - logit| between processes: the same arithmetic, and threads may be counted differently."""


def tell(
    out: str | Path,
    seed: int = 0,
    *,
    recipe: Mapping[str, Any] | None = None,
    n: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Run the demo into folder `out`: adapter/, merged/, picture.png, report.html. Running it again replaces them.

    Args:
        seed: of the run: the adapter's start and the pairing of rows. Data and base are the embedded ones.
        recipe: another recipe than people-demo.yaml.
        n: at most so many rows of each set in the evaluation (tests; such numbers are not stored with the adapter).
        show: print the tables to standard output.

    Returns:
        The final numbers, JSON-ready: seconds, `report` (eval.json), `met` (accuracies against their bounds), samples, `checks`,
        and `ok`: every check held (the bounds are no check: another seed may miss one, and it is said).

    Raises:
        UserError: `out` is a file, or holds something in the place of a result that is not one.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    _check_out(out)
    with _hushed(), _one_thread():
        from ..folder.recipe import dump_recipe, load_recipe
        from ..training.train import train

        say = _say
        chosen = dict(recipe) if recipe is not None else load_recipe(embedded.asset("recipes", RECIPE))
        chosen["seed"] = seed
        seconds: dict[str, float] = {}

        @contextmanager
        def chapter(name: str, text: str) -> Iterator[None]:
            say(f"[{time.perf_counter() - started:5.1f} s] {text}")
            at = time.perf_counter()
            yield
            seconds[name] = round(time.perf_counter() - at, 1)

        watch = _watch()
        with chapter("train", "training a forget adapter for ten of a hundred people"):
            folder = train(chosen, out / ADAPTER, callbacks=[watch], say=say)
        assert folder is not None  # one process
        shutil.rmtree(f"{out / ADAPTER}.work", ignore_errors=True)  # the checkpoints of a run that ended
        with chapter("evaluate", "judging base, adapter and the twin that never saw the ten"):
            report = _evaluate(out / ADAPTER, n)
        samples = pick_samples(report)
        prompts = [s["prompt"] for s in samples]
        with chapter("elsewhere", "loading the folder with plain PEFT in a process that has no peft_unlearn"):
            elsewhere = _elsewhere(out / ADAPTER, prompts)
        with chapter("merge", "merging into a plain float32 model"):
            merged = _merge(out, prompts)
        with chapter("remove", "taking the adapter off and comparing what is left with the base's files"):
            removal = _remove(out / ADAPTER)
        curve = watch.curve(folder.manifest.method.get("best_step"))
        checks = [
            elsewhere.pop("held"),
            merged.pop("held"),
            (removal.ok, "after removal every tensor is the base's, bit for bit"),
        ]
        at = {s: _point(report, s) for s in ("base", "retain_only", "adapter")}
        png = page.picture(curve, at["base"], at["retain_only"], at["adapter"])
        (out / PICTURE).write_bytes(png)
        rows = (chosen.get("eval") or {}).get("n") or "some"
        caption = (
            f"Points on the lines: {rows} rows of each set, looked at while training. Marks on the right: all rows."
        )
        seconds["total"] = round(time.perf_counter() - started, 1)
        sentences = conditions(report, seconds, seed)
        page.write(
            out / PAGE, page.page(report, samples, checks, str(removal), dump_recipe(chosen), sentences, png, caption)
        )
    result = {
        "format": 1,
        "seed": seed,
        "seconds": seconds,
        "ok": all(held for held, _ in checks),
        "met": bounds(report),
        "twins": retain_model_spread(),
        "checks": [{"held": held, "what": what} for held, what in checks],
        "samples": samples,
        "curve": curve,
        "elsewhere": elsewhere,
        "merged": merged,
        "removal": removal.to_dict(),
        "report": dict(report),
        "files": {"adapter": ADAPTER, "merged": MERGED, "picture": PICTURE, "report": PAGE},
    }
    if show:
        _print(report, samples, checks, result, out)
    say(f"[{seconds['total']:5.1f} s] done: {out / PAGE}")
    return result


# --- chapters ---------------------------------------------------------------------------------------------------------


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the demo's results.")
    merged = out / MERGED
    if merged.exists():
        # A merged model never replaces anything by itself; this one may go only if it is recognizably an earlier demo's.
        ours = (out / ADAPTER / "forget.json").is_file() and (merged / "config.json").is_file()
        if not ours:
            raise UserError(f"{merged}: is not an earlier demo's merged model; name another folder.")
    out.mkdir(parents=True, exist_ok=True)


def _watch(retain: str = "retain") -> Any:
    """A callback that keeps value accuracies of the forget set and of the set called `retain`."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Keeps what evaluations while training said, for the picture."""

        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            keys = {r: f"eval_{s}/value_accuracy" for r, s in (("forget", "forget"), ("retain", retain))}
            if metrics is not None and all(k in metrics for k in keys.values()):
                self.points.append({"step": state.global_step, **{r: float(metrics[k]) for r, k in keys.items()}})

        def curve(self, best: Any) -> list[dict[str, Any]]:
            last = self.points[-1]["step"] if self.points else None
            kept = best or last
            return [{**p, **({"kept": True} if p["step"] == kept else {})} for p in self.points]

    return Watch()


def _evaluate(adapter: Path, n: int | None) -> Report:
    from ..evaluation.evaluate import evaluate
    from ..progress import bars

    with bars() as progress:
        return evaluate([adapter], n=n, progress=progress)


KINDS = {"forget": "forgotten", "retain": "retained", "general": "general knowledge"}


def pick_samples(report: Report, kinds: Mapping[str, str] = KINDS) -> list[dict[str, str]]:
    """A question of each set in `kinds` with the answers of base and adapter: one forgotten, one retained, one general.

    The first of each set that the base answers rightly; not chosen by what the adapter says.
    """
    from ..data.formats import to_text

    out = []
    for name, kind in kinds.items():
        rows = report.rows.get(name) or []
        right = report.per_row["base"].get(f"{name}/value_accuracy")
        if not rows or name not in report.said["base"]:
            continue
        i = next((i for i in range(len(rows)) if right is not None and right[i] == 1.0), 0)
        out.append({
            "kind": kind,
            "question": str(rows[i]["question"]),
            "prompt": to_text(rows[i])[0],
            "before": printable(report.said["base"][name][i]),
            "after": printable(report.said["adapter"][name][i]),
        })  # fmt: skip
    return out


def printable(text: str) -> str:
    """`text` with control characters written out: a model that lost its answer may say any byte."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _elsewhere(adapter: Path, prompts: list[str]) -> dict[str, Any]:
    import torch

    from ..stack.model import ForgetModel

    stack = ForgetModel.from_pretrained(None, adapter)
    there = child.run(stack.base_dir, adapter, prompts)
    gap = 0.0
    with torch.no_grad():
        for text, theirs in zip(prompts, there["logits"], strict=True):
            ids = stack.tokenizer(text, return_tensors="pt")["input_ids"]
            ours = stack.model(input_ids=ids).logits[0, -1]
            gap = max(gap, float((ours - torch.tensor(theirs)).abs().max()))
    same = "the same logits, bit for bit" if gap == 0 else f"logits that differ by at most {gap:.1e}"
    return {
        "peft": there["peft"], "max_logit_difference": gap, "prompts": len(prompts),
        "held": (gap <= TOLERANCE, f"plain PEFT {there['peft']}, in a process where peft_unlearn cannot be found, gives {same}"),
    }  # fmt: skip


def _merge(out: Path, prompts: list[str]) -> dict[str, Any]:
    from ..evaluation.generate import greedy
    from ..folder.base import load_base, load_tokenizer
    from ..merging.merge import merge
    from ..stack.model import ForgetModel

    shutil.rmtree(out / MERGED, ignore_errors=True)  # an earlier demo's, see _check_out
    found = merge(out / ADAPTER, None, out / MERGED, dtype="float32")
    stack = ForgetModel.from_pretrained(None, out / ADAPTER)
    ours = greedy(stack.model, stack.tokenizer, prompts)
    theirs = greedy(load_base(out / MERGED), load_tokenizer(out / MERGED), prompts)
    what = f"the merged float32 model gives the same answers (smallest cosine of a layer's change {found.worst_cosine:.6f})"
    return {"digest": found.digest, "worst_cosine": found.worst_cosine, "held": (ours == theirs, what)}


def _remove(adapter: Path) -> Any:
    from ..stack.remove import remove

    return remove(adapter)


# --- what is said about it ---------------------------------------------------------------------------------------------

AT_MOST = 0.05
AT_LEAST = {"retain": 0.97, "retain_other": 0.97, "retain_heldout": 0.85, "general": 0.97}


def bounds(report: table.Report) -> dict[str, Any]:
    """The demo's aims: {set: {value, bound, share_of_base, met}}; a value that cannot be measured has not met its bound."""
    base, found = report["subjects"]["base"], report["subjects"]["adapter"]
    out: dict[str, Any] = {}
    for name in ("forget", "forget_other", "forget_heldout"):
        value = found.get(f"{name}/value_accuracy")
        out[name] = {"value": value, "at_most": AT_MOST, "met": value is not None and value <= AT_MOST}
    for name, share in AT_LEAST.items():
        value, own = found.get(f"{name}/value_accuracy"), base.get(f"{name}/value_accuracy")
        part = None if value is None or not own else value / own
        out[name] = {
            "value": value,
            "share_of_base": part,
            "at_least": share,
            "met": part is not None and part >= share,
        }
    return out


def retain_model_spread() -> dict[str, Any] | None:
    """Forget quality of further retain-only twins against the shipped one, as measured with the released base: what p can mean."""
    try:
        return json.loads(embedded.asset("bases", "people-twins.json").read_text(encoding="utf-8"))
    except UserError:
        return None


def conditions(report: table.Report, seconds: Mapping[str, float], seed: int) -> list[str]:
    """What the numbers mean and what they do not, in sentences."""
    import platform

    subjects, versions = report["subjects"], report["versions"]
    missed = [name for name, b in bounds(report).items() if not b["met"]]
    p = subjects["adapter"].get("forget/forget_quality")
    base_p = subjects["base"].get("forget/forget_quality")
    out = [
        f"One run with seed {seed}, {seconds.get('total', 0):.0f} seconds on {os.cpu_count()} CPU cores "
        f"({platform.system()} {platform.machine()}), torch {versions.get('torch')}, transformers {versions.get('transformers')}, "
        f"peft {versions.get('peft')}. The model has one million parameters and was trained for this: what holds here need not "
        "hold for a large model on your data; the point is that every step can be seen and checked.",
        "Unlearning saw phrasing 1 of the ten people's facts. Phrasing 2 (_other) was trained into the base and never shown to "
        "unlearning; phrasing 3 (_heldout) was trained for neither these people nor those it is asked of. The retain-only twin "
        "was trained from nothing without the ten people: what forgetting perfectly would give.",
    ]
    if missed:
        out.append(
            f"Aims missed in this run: {', '.join(missed)} (forget sets at most {AT_MOST:g}; retain sets against the base)."
        )
    if p is not None:
        text = f"Forget quality, the p of a Kolmogorov-Smirnov test against one twin, is {table.number(p)} (base {table.number(base_p)})."
        if spread := retain_model_spread():
            others = ", ".join(table.number(x) for x in spread["p"])
            text += (
                f" {len(spread['p'])} other twins, which differ by their seed alone, give {others} against the same twin: that is "
                "what retraining without the ten people looks like. With this run's seed p moves severalfold "
                "(docs/search.md)."
            )
        out.append(text + " It needs the retain-only model, which outside of demonstrations nobody has.")
    out.append(
        "The adapter suppresses: the knowledge is still in the base model's weights, as taking it off shows, and fine-tuning or other "
        "questions may bring some of it back."
    )
    return out


def _point(report: table.Report, subject: str) -> dict[str, float]:
    values = report["subjects"].get(subject) or {}
    return {r: float(values.get(f"{r}/value_accuracy") or 0.0) for r in ("forget", "retain")}


def print_story(report: Any, samples: Any, checks: Any) -> Any:
    """Table, samples and checks on standard output; the console, for what else there is to say."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table.show(report, console)
    said = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "question", "base", "with adapter"):
        said.add_column(heading)
    for s in samples:
        said.add_row(s["kind"], *(escape(s[k]) for k in ("question", "before", "after")))
    console.print(said)
    for held, what in checks:
        console.print(
            f"[{'green' if held else 'bold red'}]{'yes' if held else 'NO'}[/]  {escape(what)}", highlight=False
        )
    return console


def _print(report: Any, samples: Any, checks: Any, result: Mapping[str, Any], out: Path) -> None:
    console = print_story(report, samples, checks)
    if result["twins"] is not None:
        p = table.number(report["subjects"]["adapter"].get("forget/forget_quality"))
        others = ", ".join(map(table.number, result["twins"]["p"]))
        console.print(f"forget quality p {p}; further twins against the same twin: {others}", highlight=False)
    missed = [name for name, b in result["met"].items() if not b["met"]]
    if missed:
        console.print(f"[bold red]NO[/]  all aims met: missed {', '.join(missed)}", highlight=False)
    else:
        console.print(
            "[green]yes[/]  forgotten in every phrasing, retained in every phrasing (bounds in report.html)",
            highlight=False,
        )
    console.print(f"\nLook at {out / PAGE}; the adapter is {out / ADAPTER}", highlight=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is as fast as several for a model this small, and gives the same numbers whatever the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _hushed() -> Iterator[None]:
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


__all__ = ["bounds", "conditions", "pick_samples", "print_story", "tell"]
