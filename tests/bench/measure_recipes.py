"""Train every recipe for the embedded people once and write down what came of it: docs/methods/results.json.

    python tests/bench/measure_recipes.py [NAME ..] [--again] [--scratch DIR] [--out FILE]

One recipe after the other, as it stands in adapters/recipes, through the functions behind `peft-unlearn train` and `peft-unlearn
eval` (base and twin are measured once, not once per recipe); nothing is tuned here. A recipe whose measurement is there already
is skipped unless its content has changed or --again is given, and the file is written after each one, so a run that was
interrupted goes on. A recipe that fails stays in, with the message.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import TrainerCallback

import peft_unlearn
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import suites
from peft_unlearn.evaluation.numbers import numbers_of, whole_of
from peft_unlearn.evaluation.plan import make_plan
from peft_unlearn.evaluation.plan import measure as run_suite
from peft_unlearn.evaluation.score import on_one_model
from peft_unlearn.folder.base import load_base, load_tokenizer
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.save import versions

ROOT = Path(__file__).resolve().parents[2]
RECIPES, RESULTS = ROOT / "adapters" / "recipes", ROOT / "docs" / "methods" / "results.json"
SETS = ("forget", "forget_other", "forget_heldout", "retain", "retain_other", "retain_heldout", "general", "holdout")
WANTED = (
    *(f"{s}/value_accuracy" for s in SETS),
    *(f"{s}/extraction_strength" for s in SETS if s != "general"),
    "forget/probability", "retain/probability", "general/probability", "forget/truth_ratio",
    "forget/forget_quality", "forget/forget_quality_log10_p", "forget/ks_distance", "model_utility",
)  # fmt: skip


def fingerprint(recipe: dict[str, Any]) -> str:
    """First digits of a sha256 over what a recipe does: its comments, name and description are left out."""
    content = {k: v for k, v in recipe.items() if k not in ("name", "description")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class StepClock(TrainerCallback):
    """CPU seconds inside optimizer steps alone: looks at scores, checkpoints and loading are not in it."""

    def __init__(self) -> None:
        self.total, self._start = 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.total += time.process_time() - self._start


class Judge:
    """The people suite on the embedded base: its plan, and base and twin measured once."""

    def __init__(self) -> None:
        self.data = ForgetRetain.load("embedded:people")
        self.suite = suites.load("people")
        base = embedded.base_path("people")
        self.plan = make_plan(self.suite, self.data, load_tokenizer(base))
        self.retain_model = run_suite(load_base(embedded.retain_model_path("people")), self.plan)
        self.base = run_suite(load_base(base), self.plan)
        self.models = {"base": self.figures(self.base), "twin": self.figures(self.retain_model)}
        for s in self.suite.sets.values():  # gates are not applied here, so they have to be open
            if (gate := s.measurable_if) is not None:
                seen = self.models["base"][f"{s.name}/{gate.metric}"]
                assert gate.subject == "base" and seen is not None and seen >= gate.at_least, s.name

    def figures(self, measured: Any) -> dict[str, float | None]:
        found = numbers_of(self.plan, measured, self.retain_model, ci=False)
        found.update(whole_of(self.suite, found))
        return {k: None if found[k].value is None else float(f"{found[k].value:.6g}") for k in WANTED}

    def adapter(self, folder: Path) -> dict[str, float | None]:
        stack = ForgetModel.from_pretrained(None, {"adapter": folder})
        with on_one_model(stack.model, {"adapter": "adapter"})["adapter"]() as model:
            return self.figures(run_suite(model, self.plan))


def measure(recipe: dict[str, Any], out: Path, judge: Judge) -> dict[str, Any]:
    """Train and judge one recipe: its row."""
    row: dict[str, Any] = {"recipe": fingerprint(recipe), "seed": recipe.get("seed", 0)}
    clock = StepClock()
    cpu = time.process_time()
    try:
        folder = peft_unlearn.train(recipe, out, progress=lambda *_: None, callbacks=[clock])
    except UserError as e:
        return {**row, "failed": str(e)}
    assert folder is not None
    cpu = time.process_time() - cpu
    weights = out / "adapter_model.safetensors"
    method = folder.manifest.method
    return {
        **row,
        "steps": method["steps"],
        "kept_step": method["best_step"] if (recipe.get("eval") or {}).get("keep_best") else None,
        "rows_per_step": folder.manifest.effective_batch["rows"],
        "cpu_seconds_steps": round(clock.total, 1),
        "cpu_seconds": round(cpu, 1),
        "adapter_bytes": weights.stat().st_size,
        "figures": judge.adapter(out),
    }


def write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="recipes (people-npo or npo); default all")
    parser.add_argument("--again", action="store_true", help="measure those that are there already, too")
    parser.add_argument("--scratch", type=Path, help="folder for the adapters, kept; default a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {n if n.startswith("people-") else f"people-{n}" for n in args.names}
    found = {p.stem: p for p in sorted(RECIPES.glob("people-*.yaml"))}
    if unknown := wanted - set(found):
        parser.error(f"there is no recipe {', '.join(sorted(unknown))}")
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"recipes": {}}
    judge: Judge | None = None
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="recipes-"))
    try:
        for name, path in found.items():
            recipe = load_recipe(path)
            known = results["recipes"].get(name, {})
            if (wanted and name not in wanted) or (known.get("recipe") == fingerprint(recipe) and not args.again):
                continue
            out = scratch / name
            for old in (out, Path(f"{out}.work")):
                shutil.rmtree(old, ignore_errors=True)
            judge = judge or Judge()
            row = measure(recipe, out, judge)
            results |= {"models": judge.models, "versions": versions()}
            results["n"] = {s: len(judge.plan.sets[s].rows) for s in SETS}
            results["recipes"][name] = row
            write(results, args.out)
            f = row.get("figures")
            print(
                f"{name:22} " + (row["failed"] if f is None else " ".join(
                    f"{k}={f[k]:.3g}" for k in ("forget/value_accuracy", "forget_heldout/value_accuracy",
                    "retain/value_accuracy", "retain_heldout/value_accuracy", "general/value_accuracy",
                    "forget/extraction_strength", "forget/forget_quality", "model_utility")
                ) + f" cpu={row['cpu_seconds']:.0f} steps={row['cpu_seconds_steps']:.0f}"),
                flush=True,
            )  # fmt: skip
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
