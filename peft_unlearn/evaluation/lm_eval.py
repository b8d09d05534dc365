"""Any task of EleutherAI's lm-evaluation-harness, on base and adapters of one loaded model.

The package lm-eval is optional (``pip install 'peft-unlearn[eval]'``). The model is handed over as it is, never loaded again;
adapters are switched in place. Tasks of the Hub need the network or a filled cache; one of the user's own (a YAML over a
local file) does not.
Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.yaml_io import read_yaml
from .score import Subject
from .teacher import evaluating

INSTALL = "lm-eval is not installed: pip install 'peft-unlearn[eval]'"


def run_tasks(
    subjects: Mapping[str, Subject | None],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The block "lm_eval" of a report.

    Args:
        subjects: as for `score`: name -> what opens the model; None gives null.
        tasks: names of tasks, groups or tags of lm-eval, or paths of task YAML files.
        limit: at most so many documents of each task, the first ones (lm-eval's own rule).
        num_fewshot: examples before each document; default the task's own.
        max_length: longest input in tokens; default what the model's configuration says.
        include_path: a folder with further task YAML files.
        seed: of lm-eval's few-shot draws.

    Returns:
        {"tasks": [..], "settings": {..}, "version": lm-eval's, "subjects": {name: {task: {metric: value}} | null},
        "details": {name: {task: {"n", "n_total", "stderr": {metric: value | null}, "num_fewshot"}}},
        "better": {task: {metric: "higher" | "lower"}}}. Metrics are lm-eval's own, without its filter's name where there
        is but one. Values are finite numbers or null.

    Raises:
        UserError: lm-eval is not installed, no or an unknown task, or a task that cannot be run, with lm-eval's reason.
    """
    evaluate, wrapper, manager = _packages()
    names, folders = _named(tasks, include_path)
    if not any(subject is not None for subject in subjects.values()):
        raise UserError("there is no model to evaluate")
    with _quiet():
        # reading lm-eval's own thousands of task files takes ten seconds and more
        own = all(str(task).endswith((".yaml", ".yml")) for task in tasks)
        found = manager(include_path=[str(f) for f in folders] or None, include_defaults=not own)
        for task in names:
            if not found.match_tasks([task]):
                close = get_close_matches(task, found.all_tasks, n=3)
                near = f" Near: {', '.join(close)}." if close else ""
                raise UserError(f"lm-eval has no task {task!r}.{near}")
        block: dict[str, Any] = {
            "tasks": names,
            "settings": {
                "limit": limit,
                "num_fewshot": num_fewshot,
                "chat_template": apply_chat_template,
                "seed": seed,
            },
            "version": _version(),
            "subjects": {},
            "details": {},
            "better": {},
        }
        for done, (subject, opened) in enumerate(subjects.items()):
            block["subjects"][subject] = None
            if opened is None:
                continue
            if progress is not None:
                progress(f"{subject}: lm-eval {', '.join(names)}", done, len(subjects))
            with opened() as model, evaluating(model):
                held = wrapper(
                    pretrained=model,
                    tokenizer=tokenizer,
                    backend="causal",
                    batch_size=batch_size,
                    max_length=max_length,
                )
                result = _run(evaluate, held, names, found, limit, num_fewshot, apply_chat_template, seed)
            block["subjects"][subject], block["details"][subject], better = _read(result)
            block["better"].update(better)
    return block


def _packages() -> tuple[Any, Any, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        missing = "" if (e.name or "").startswith("lm_eval") else f" (it needs {e.name})"
        raise UserError(f"{INSTALL}{missing}") from None
    return simple_evaluate, HFLM, TaskManager


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


def _named(tasks: Sequence[str], include_path: str | Path | None) -> tuple[list[str], list[Path]]:
    """Task names, and the folders in which lm-eval shall look beside its own."""
    names, folders = [], [Path(include_path).expanduser()] if include_path is not None else []
    for task in tasks:
        if not str(task).endswith((".yaml", ".yml")):
            names.append(str(task))
            continue
        path = Path(task).expanduser()
        if not path.is_file():
            raise UserError(f"there is no task file {task}")

        # such files may call functions (!function utils.f); the name is read without running anything
        about = read_yaml(path, str(task), aliases=True, tags=True)
        if not isinstance(about, Mapping) or not isinstance(about.get("task", about.get("group")), str):
            raise UserError(f"{task}: names no task (key 'task')")
        names.append(str(about.get("task", about.get("group"))))
        folders.append(path.resolve().parent)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder of tasks {folder}")
    if not names:
        raise UserError("no task is named; lm-eval's own list: lm-eval ls tasks")
    return names, list(dict.fromkeys(folders))


def _run(
    evaluate: Any, held: Any, names: list[str], found: Any, limit: int | None, shots: int | None, chat: bool, seed: int
) -> Mapping[str, Any]:
    try:
        result = evaluate(
            model=held,
            tasks=names,
            task_manager=found,
            limit=limit,
            num_fewshot=shots,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as e:  # a task is code and data of somebody else: anything may come up, most often no network
        text = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise UserError(f"lm-eval could not run {', '.join(names)}: {type(e).__name__}: {text}") from e
    if result is None:
        raise UserError("lm-eval gave no result: it runs in one process only")
    return result


def _read(result: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    values: dict[str, Any] = {}
    details: dict[str, Any] = {}
    better: dict[str, Any] = {}
    for task, found in result["results"].items():
        keys = [k for k in found if "," in k]
        filters = {k.split(",", 1)[1] for k in keys}
        short = {k: k.split(",", 1)[0] if len(filters) == 1 else k for k in keys}
        own = {short[k]: _number(found[k]) for k in keys if "_stderr," not in k}
        if not own:  # a group without a value of its own: its tasks stand beside it
            continue
        values[task] = own
        count = result.get("n-samples", {}).get(task) or {}
        errors = {short[k].replace("_stderr", "", 1): _number(found[k]) for k in keys if "_stderr," in k}
        details[task] = {
            "n": count.get("effective"),
            "n_total": count.get("original"),
            "stderr": errors,
            "num_fewshot": result.get("n-shot", {}).get(task),
            "reason": {m: "lm-eval gave no finite number" for m, v in own.items() if v is None} or None,
        }
        ways = result.get("higher_is_better", {}).get(task) or {}
        better[task] = {m: "higher" if up else "lower" for m, up in ways.items() if up is not None}
    return values, details, better


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" where it has none."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """stdout carries our JSON and nothing else, and lm-eval's own bars and notes are not ours to show."""
    import contextlib
    import os
    import sys

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "evaluate")]
    levels = [log.level for log in loggers]
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars
