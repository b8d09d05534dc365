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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain import Progress, Recipe, fast_bf16, make_model, make_tokenizer, train_model

from peft_unlearn.data import people
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.evaluation.metrics.generation import value_accuracy

# What a built model must show, as value accuracy: (set, "min" | "max", bound). Measured on the file as others see it,
# rounded to bf16 and loaded as float32.
BASE_BOUNDS = (
    ("forget", "min", 0.95), ("forget_other", "min", 0.95), ("retain", "min", 0.95), ("retain_other", "min", 0.95),
    ("general", "min", 0.95),
)  # fmt: skip
RETAIN_MODEL_BOUNDS = (
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
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.utils import logging

    auto = AutoModelForImageClassification if tokenizer is None else AutoModelForCausalLM
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # two bars of their own for 2 MB would tear ours apart
    try:
        model.to(torch.bfloat16).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        # safetensors makes its file readable for the owner alone, the others are made as the umask says.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
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


@dataclass(frozen=True)
class Wanted:
    """One model to be built.

    train: trains it and returns (model, steps).   verify: the loaded model -> what build.json says it shows, and what is
    wrong with that.   about: further entries of build.json.   files: further JSON files of the folder, name -> content.
    """

    name: str
    seed: int
    train: Callable[[], tuple[Any, int]]
    verify: Callable[[Any], tuple[dict[str, Any], list[str]]]
    about: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_verified(out: Path, models: Sequence[Wanted], tokenizer, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Train and verify all models, and only when all have passed put them into `out`; returns their build.json.

    Raises:
        UserError: a model is not what it should be; nothing is written.
    """
    import torch

    reports: dict[str, dict[str, Any]] = {}
    out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # One thread: as fast as two for a model this small, and the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as scratch:
            for wanted in models:
                started = time.process_time()
                folder = Path(scratch, wanted.name)
                model, steps = wanted.train()
                loaded = _save(model, tokenizer, folder)
                figures, missed = wanted.verify(loaded)
                if missed:
                    raise UserError(
                        f"The model {wanted.name} (seed {wanted.seed}) failed its verification, nothing was written:"
                        f" {'; '.join(missed)}. Another --seed may pass: a machine's arithmetic can tip a close run."
                    )
                reports[wanted.name] = {
                    "format": 1,
                    "model": wanted.name,
                    **wanted.about,
                    "seed": wanted.seed,
                    "steps": steps,
                    "parameters": loaded.num_parameters(),
                    **figures,
                    **shared,
                    "cpu_seconds": round(time.process_time() - started, 1),
                    "versions": _versions(),
                }
                for name, content in {**wanted.files, "build.json": reports[wanted.name]}.items():
                    _json(folder / name, content)
            for name in reports:
                _replace(Path(scratch, name), out / name)
    finally:
        torch.set_num_threads(threads)
    return reports


def data_digest(sets: dict[str, list[dict]]) -> str:
    """sha256 of the sets a model is verified on, as canonical JSON."""
    return hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()


def retain_model_names(base: str, retain_models: int) -> dict[str, int]:
    """{folder name: its number, from 1} of so many retain-only twins of `base`."""
    if retain_models < 0:
        raise UserError(f"--retain-models is {retain_models}: the number of retain models is 0 or more.")
    return {f"{base}-retain{'' if k == 1 else f'-{k}'}": k for k in range(1, retain_models + 1)}


def build(
    out: str | Path,
    seed: int = 0,
    retain_models: int = 1,
    progress: Progress | None = None,
    recipe: Recipe | None = None,
) -> dict[str, dict[str, Any]]:
    """Train the embedded base and its twins, verify them, and only then write them.

    Args: out: folder that receives ``people`` (the base), ``people-retain`` (the first twin), ``people-retain-2`` and
        so on. What is there is replaced once everything has passed; after a failure it is untouched. seed: of the data,
        the initialization and the order of the rows. Twin k trains with seed + k (k from 1); its data are the base's.
        twins: how many retain-only models; 0 builds the base alone. progress: called as progress(stage, done, total);
        `progress.bars` shows it. recipe: other sizes or schedules; the default is what the released models
        were built with.

    Returns:
        {folder name: the content of its build.json}: the figures measured, the seeds, the recipe, the versions.

    Raises:
        UserError: a model misses `BASE_BOUNDS` or `RETAIN_MODEL_BOUNDS`; nothing is written.
    """
    recipe = recipe or Recipe()
    numbers = {"people": 0, **retain_model_names("people", retain_models)}
    sets = people.generate(seed, recipe.size)
    rows = people.training_rows(seed, True, recipe.size)
    tokenizer = make_tokenizer(["".join(to_text(row)) for row in rows], recipe.vocab_size)

    def wanted(name: str, number: int) -> Wanted:
        bounds = RETAIN_MODEL_BOUNDS if number else BASE_BOUNDS
        mine = people.training_rows(seed, False, recipe.size) if number else rows

        def train() -> tuple[Any, int]:
            model = make_model(tokenizer, recipe, seed + number)
            return model, train_model(model, tokenizer, mine, recipe, seed + number, progress, f"train {name}")

        def verify(loaded: Any) -> tuple[dict[str, Any], list[str]]:
            figures = value_accuracies(loaded, tokenizer, sets, progress, f"verify {name}")
            return {"value_accuracy": {k: round(v, 4) for k, v in figures.items()}}, failures(figures, bounds)

        about = {
            "role": "retain-only twin" if number else "base",
            "data": f"embedded:people?seed={seed}",
            "data_sha256": data_digest(sets),
            "trained_rows_per_epoch": len(mine),
        }
        return Wanted(name, seed + number, train, verify, about)

    shared = {
        "n": {key: len(value) for key, value in sets.items()},
        "recipe": asdict(recipe),
        "arithmetic": "bf16 autocast" if fast_bf16() else "float32",
    }
    return write_verified(Path(out), [wanted(*of) for of in numbers.items()], tokenizer, shared)


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
            for wanted in (BASE_BOUNDS, RETAIN_MODEL_BOUNDS)
        ]
        if name == "forget_heldout":
            bounds[0] = f"aim {HELDOUT_AIM:.2f}"
        figures = [report["value_accuracy"].get(name) for report in reports.values()]
        table.add_row(name, "; ".join(bounds), *("-" if value is None else f"{value:.3f}" for value in figures))
    return table
