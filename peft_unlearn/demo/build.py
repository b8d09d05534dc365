"""Build the embedded base and its retain-only twins, and prove that they know what they should and nothing else.

The base learns all 100 people of `data.people`, a twin only the 90 of the retain set: same data otherwise, same
tokenizer, same schedule, other initialization. A twin is what exact unlearning would give. Several twins differ by
their seed alone, so that measuring one against another gives the null distribution of "indistinguishable from
retraining".
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_unlearn.data import people
from peft_unlearn.data.formats import to_text
from peft_unlearn.demo.pretrain import Progress, Recipe, fast_bf16, make_model, make_tokenizer, train_model
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.evaluation.metrics.generation import value_accuracy

# What a built model must show, as value accuracy: (set, "min" | "max", bound). Measured on the file as others see it,
# rounded to bf16 and loaded as float32.
BASE_BOUNDS = (
    ("forget", "min", 0.95), ("forget_other", "min", 0.95), ("retain", "min", 0.95), ("retain_other", "min", 0.95),
    ("general", "min", 0.95),
)  # fmt: skip
TWIN_BOUNDS = (
    ("forget", "max", 0.10), ("forget_other", "max", 0.10), ("retain", "min", 0.95), ("retain_other", "min", 0.95),
    ("general", "min", 0.95),
)  # fmt: skip
HELDOUT_AIM = 0.70  # of forget_heldout on the base: reported, not required


def value_accuracies(
    model, tokenizer, sets: dict[str, list[dict]], progress: Progress | None = None, stage: str = "verify"
) -> dict[str, float]:
    """Share of rows whose greedy answer names the right value, by set; empty sets are left out."""
    prompts = [(name, row["value"], to_text(row)[0]) for name, rows in sets.items() for row in rows]
    told = (lambda done, total: progress(stage, done, total)) if progress is not None else None
    answers = greedy(model, tokenizer, [prompt for _, _, prompt in prompts], progress=told)
    right = value_accuracy(answers, [value for _, value, _ in prompts])
    hits: dict[str, list[float]] = {}
    for (name, _, _), hit in zip(prompts, right, strict=True):
        hits.setdefault(name, []).append(float(hit))
    return {name: sum(found) / len(found) for name, found in hits.items()}


def failures(figures: dict[str, float], bounds: tuple[tuple[str, str, float], ...]) -> list[str]:
    """What of `bounds` the figures miss, in words; empty when the model may be released."""
    missed = []
    for name, kind, bound in bounds:
        value = figures.get(name)
        if value is None or (value < bound if kind == "min" else value > bound):
            shown = "not measured" if value is None else f"{value:.3f}"
            missed.append(f"{name} {shown}, must be {'at least' if kind == 'min' else 'at most'} {bound:.2f}")
    return missed


def _save(model, tokenizer, folder: Path) -> Any:
    """Write the model as bf16 and return it as others will see it: loaded from the file as float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # two bars of their own for 2 MB would tear ours apart
    try:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # safetensors makes its file readable for the owner alone, the others are made as the umask says.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _replace(source: Path, target: Path) -> None:
    """Put folder `source` in the place of `target`; what stood there leaves only once the new one is in place."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(source, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "tokenizers")
    }


def build(
    out: str | Path, seed: int = 0, twins: int = 1, progress: Progress | None = None, recipe: Recipe | None = None
) -> dict[str, dict[str, Any]]:
    """Train the embedded base and its twins, verify them, and only then write them.

    Args: out: folder that receives ``people`` (the base), ``people-retain`` (the first twin), ``people-retain-2`` and
        so on. What is there is replaced once everything has passed; after a failure it is untouched. seed: of the data,
        the initialization and the order of the rows. Twin k trains with seed + k (k from 1); its data are the base's.
        twins: how many retain-only models; 0 builds the base alone. progress: called as progress(stage, done, total);
        the command line shows it as bars. recipe: other sizes or schedules; the default is what the released models
        were built with.

    Returns:
        {folder name: the content of its build.json}: the figures measured, the seeds, the recipe, the versions.

    Raises:
        UserError: a model misses `BASE_BOUNDS` or `TWIN_BOUNDS`; nothing is written.
    """
    import torch

    if twins < 0:
        raise UserError(f"--twins is {twins}: the number of retain-only models is 0 or more.")
    recipe = recipe or Recipe()
    out = Path(out)
    sets = people.generate(seed, recipe.size)
    data_hash = hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()
    rows = people.training_rows(seed, True, recipe.size)
    tokenizer = make_tokenizer(["".join(to_text(row)) for row in rows], recipe.vocab_size)
    models = [("people", seed, BASE_BOUNDS)]
    models += [(f"people-retain{'' if k == 1 else f'-{k}'}", seed + k, TWIN_BOUNDS) for k in range(1, twins + 1)]
    reports: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # One thread: as fast as two for a model this small, and the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch:
            for name, model_seed, bounds in models:
                started = time.process_time()
                model = make_model(tokenizer, recipe, model_seed)
                wanted = rows if name == "people" else people.training_rows(seed, False, recipe.size)
                steps = train_model(model, tokenizer, wanted, recipe, model_seed, progress, f"train {name}")
                loaded = _save(model, tokenizer, Path(scratch, name))
                figures = value_accuracies(loaded, tokenizer, sets, progress, f"verify {name}")
                missed = failures(figures, bounds)
                if missed:
                    raise UserError(
                        f"The model {name} (seed {model_seed}) failed its verification, nothing was written:"
                        f" {'; '.join(missed)}. Another --seed may pass: a machine's arithmetic can tip a close run."
                    )
                reports[name] = {
                    "format": 1,
                    "model": name,
                    "role": "base" if name == "people" else "retain-only twin",
                    "data": f"embedded:people?seed={seed}",
                    "data_sha256": data_hash,
                    "trained_rows_per_epoch": len(wanted),
                    "seed": model_seed,
                    "steps": steps,
                    "parameters": loaded.num_parameters(),
                    "value_accuracy": {key: round(value, 4) for key, value in figures.items()},
                    "n": {key: len(value) for key, value in sets.items()},
                    "recipe": asdict(recipe),
                    "arithmetic": "bf16 autocast" if fast_bf16() else "float32",
                    "cpu_seconds": round(time.process_time() - started, 1),
                    "versions": _versions(),
                }
                text = json.dumps(reports[name], indent=2) + "\n"
                Path(scratch, name, "build.json").write_text(text, encoding="utf-8", newline="\n")
            for name in reports:
                _replace(Path(scratch, name), out / name)
    finally:
        torch.set_num_threads(threads)
    return reports


@contextmanager
def bars() -> Iterator[Progress]:
    """A `Progress` that draws a bar per stage on stderr: ``with bars() as progress: build(out, progress=progress)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as drawn:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = drawn.add_task(stage, total=total)
            drawn.update(tasks[stage], completed=done, total=total)

        yield progress


def summary(reports: dict[str, dict[str, Any]]) -> Any:
    """The figures of `build` as a rich table: a row per set, a column per model, the bounds beside them."""
    from rich.table import Table

    table = Table(
        "value accuracy of", "must be (base; twin)", *reports, caption="greedy answers that name the right value"
    )
    sign = {"min": ">=", "max": "<="}
    for name in people.SETS:
        bounds = [
            next((f"{sign[kind]} {bound:.2f}" for key, kind, bound in wanted if key == name), "-")
            for wanted in (BASE_BOUNDS, TWIN_BOUNDS)
        ]
        if name == "forget_heldout":
            bounds[0] = f"aim {HELDOUT_AIM:.2f}"
        figures = [report["value_accuracy"].get(name) for report in reports.values()]
        table.add_row(name, "; ".join(bounds), *("-" if value is None else f"{value:.3f}" for value in figures))
    return table
