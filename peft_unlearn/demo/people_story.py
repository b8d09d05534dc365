"""The whole story on the embedded model in one command: forget, judge, save, load elsewhere, merge, remove, report."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import embedded
from ..errors import UserError
from ..reporting.text import number
from .story import ADAPTER, PAGE, PICTURE, SUPPRESSES, Script, Stage, Story
from .story import run as tell

MERGED = "merged"
SETS = (
    "Unlearning saw phrasing 1 of the ten people's facts. Phrasing 2 (_other) was trained into the base and never shown to "
    "unlearning; phrasing 3 (_heldout) was trained for neither these people nor those it is asked of. The retain model "
    "was trained from nothing without the ten people: what forgetting perfectly would give."
)


def run(out: str | Path, seed: int = 0, *, recipe: Mapping[str, Any] | None = None, n: int | None = None) -> Story:
    """Run the demo into folder `out`: adapter/, merged/, picture.png, report.html; see `story.run`."""
    return tell(SCRIPT, out, seed, recipe=recipe, n=n)


def check_out(out: Path) -> None:
    """A merged model never replaces anything by itself; this one may go only if it is recognizably an earlier demo's."""
    merged = out / MERGED
    if merged.exists() and not ((out / ADAPTER / "forget.json").is_file() and (merged / "config.json").is_file()):
        raise UserError(f"{merged}: is not an earlier demo's merged model; name another folder.")


def summary(report: Mapping[str, Any], missed: Sequence[str]) -> list[str]:
    out = []
    if spread := retain_model_spread():
        p = number(report["subjects"]["adapter"].get("forget/forget_quality"))
        others = ", ".join(map(number, spread["p"]))
        out.append(f"forget quality p {p}; further retain models against the same one: {others}")
    if missed:
        return [*out, f"NO  all aims met: missed {', '.join(missed)}"]
    return [*out, "yes forgotten in every phrasing, retained in every phrasing (bounds in report.html)"]


def conditions(report: Mapping[str, Any], seconds: Mapping[str, float], seed: int, missed: Sequence[str]) -> list[str]:
    """What the numbers mean and what they do not, in sentences."""
    versions = report["versions"]
    libraries = ", ".join(f"{name} {versions.get(name)}" for name in ("torch", "transformers", "peft"))
    out = [
        f"One run with seed {seed}, {seconds.get('total', 0):.0f} seconds on {os.cpu_count()} CPU cores "
        f"({platform.system()} {platform.machine()}), {libraries}. The model has one million parameters and was trained for this: "
        "what holds here need not hold for a large model on your data; the point is that every step can be seen and checked.",
        SETS,
    ]
    if missed:
        bounds = f"forget sets at most {SCRIPT.at_most:g}; retain sets against the base"
        out.append(f"Aims missed in this run: {', '.join(missed)} ({bounds}).")
    if (p := report["subjects"]["adapter"].get("forget/forget_quality")) is not None:
        out.append(_forget_quality(p, report["subjects"]["base"].get("forget/forget_quality")))
    return [*out, SUPPRESSES]


def _forget_quality(p: float, base: float | None) -> str:
    out = f"Forget quality, the p of a Kolmogorov-Smirnov test against one retain model, is {number(p)} (base {number(base)})."
    if spread := retain_model_spread():
        others = ", ".join(map(number, spread["p"]))
        out += (
            f" {len(spread['p'])} other retain models, which differ by their seed alone, give {others} against the same one: that is "
            "what retraining without the ten people looks like. With this run's seed p moves severalfold (docs/search.md)."
        )
    return out + " It needs the retain model, which outside of demonstrations nobody has."


def retain_model_spread() -> dict[str, Any] | None:
    """Forget quality of further retain models against the shipped one, as measured with the released base: what p can mean."""
    try:
        return json.loads(embedded.asset("bases", "people-twins.json").read_text(encoding="utf-8"))
    except UserError:
        return None


def merged(stage: Stage, prompts: Sequence[str]) -> None:
    """The chapter of the merge."""
    from ..evaluation.generate import greedy
    from ..folder.base import load_base, load_tokenizer
    from ..merging.merge import merge
    from ..stack.model import ForgetModel

    adapter, out = stage.out / ADAPTER, stage.out / MERGED
    with stage.chapter("merge", "merging into a plain float32 model"):
        shutil.rmtree(out, ignore_errors=True)  # an earlier demo's, see `check_out`
        found = merge(adapter, None, out, dtype="float32")
        stack = ForgetModel.from_pretrained(None, adapter)
        ours = greedy(stack.model, stack.tokenizer, prompts)
        theirs = greedy(load_base(out), load_tokenizer(out), prompts)
    cosine = f"smallest cosine of a layer's change {found.worst_cosine:.6f}"
    stage.checks.append((ours == theirs, f"the merged float32 model gives the same answers ({cosine})"))
    stage.more |= {
        "twins": retain_model_spread(),
        "merged": {"digest": found.digest, "worst_cosine": found.worst_cosine},
    }


SCRIPT = Script(
    recipe="people-demo.yaml",
    title="Forgetting ten people",
    lead="A small language model knows a hundred invented people. A forget adapter makes it lose ten of them and keep ninety; the base "
    "model's own weights never change.",
    training="training a forget adapter for ten of a hundred people",
    unseen="the ten",
    kinds={"forget": "forgotten", "retain": "retained", "general": "general knowledge"},
    labels=("forget set (10 people)", "retain set (90 people)"),
    files={"merged": MERGED, "picture": PICTURE, "report": PAGE},
    forgotten=("forget", "forget_other", "forget_heldout"),
    kept={"retain": 0.97, "retain_other": 0.97, "retain_heldout": 0.85, "general": 0.97},
    conditions=conditions,
    summary=summary,
    after=merged,
    check_out=check_out,
)
