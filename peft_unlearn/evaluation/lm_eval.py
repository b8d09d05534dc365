"""Any task of EleutherAI's lm-evaluation-harness, on base and adapters of one loaded model.

The package lm-eval is optional (``pip install 'peft-unlearn[eval]'``). The model is handed over as it is, never loaded again;
adapters are switched in place. Tasks of the Hub need the network or a filled cache; one of the user's own (a YAML over a
local file) does not.
Source: https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.yaml_io import read_yaml
from .score import Subject
from .teacher import evaluating

INSTALL = "lm-eval is not installed: pip install 'peft-unlearn[eval]'"
SEED = 0  # of lm-eval's few-shot draws
BATCH_SIZE = 16


def run_tasks(
    subjects: Mapping[str, Subject | None],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The block "lm_eval" of a report.

    Args:
        subjects: as for `score`: name -> what opens the model; None gives null.
        tasks: names of tasks, groups or tags of lm-eval, or paths of task YAML files.
        limit: at most so many documents of each task, the first ones (lm-eval's own rule).

    Returns:
        {"tasks": [..], "settings": {..}, "version": lm-eval's, "subjects": {name: {task: {metric: value}} | null},
        "details": {name: {task: {"n", "n_total", "stderr": {metric: value | null}, "num_fewshot"}}},
        "better": {task: {metric: "higher" | "lower"}}}. Metrics are lm-eval's own, without its filter's name where there
        is but one. Values are finite numbers or null.

    Raises:
        UserError: lm-eval is not installed, no or an unknown task, or a task that cannot be run, with lm-eval's reason.
    """
    evaluate, wrapper, manager = _packages()
    names, folders = _named(tasks)
    if not any(subject is not None for subject in subjects.values()):
        raise UserError("there is no model to evaluate")
    settings = {
        "limit": limit,
        "num_fewshot": None,
        "chat_template": False,
        "seed": SEED,
    }  # num_fewshot: the task's own
    block: dict[str, Any] = {"tasks": names, "settings": settings, "version": version("lm-eval")}
    block |= {"subjects": {}, "details": {}, "better": {}}
    with _quiet():
        found = _known(manager, names, folders, only_own=all(map(_is_file, tasks)))
        for done, (subject, opened) in enumerate(subjects.items()):
            block["subjects"][subject] = None
            if opened is None:
                continue
            if progress is not None:
                progress(f"{subject}: lm-eval {', '.join(names)}", done, len(subjects))
            with opened() as model, evaluating(model):
                held = wrapper(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE)
                result = _run(evaluate, held, names, found, limit)
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


def _is_file(task: Any) -> bool:
    return str(task).endswith((".yaml", ".yml"))


def _named(tasks: Sequence[str]) -> tuple[list[str], list[str]]:
    """Task names, and the folders in which lm-eval shall look beside its own."""
    names, folders = [], []
    for task in map(str, tasks):
        if not _is_file(task):
            names.append(task)
            continue
        path = Path(task).expanduser()
        if not path.is_file():
            raise UserError(f"there is no task file {task}")
        # such files may call functions (!function utils.f); the name is read without running anything
        about = read_yaml(path, task, aliases=True, tags=True)
        name = about.get("task", about.get("group")) if isinstance(about, Mapping) else None
        if not isinstance(name, str):
            raise UserError(f"{task}: names no task (key 'task')")
        names.append(name)
        folders.append(str(path.resolve().parent))
    if not names:
        raise UserError("no task is named; lm-eval's own list: lm-eval ls tasks")
    return names, list(dict.fromkeys(folders))


def _known(manager: Any, names: Sequence[str], folders: list[str], only_own: bool) -> Any:
    """lm-eval's list of tasks, in which every name is; `UserError` with the nearest ones else. only_own: without lm-eval's own
    thousands of files, which take ten seconds and more to read."""
    found = manager(include_path=folders or None, include_defaults=not only_own)
    for task in names:
        if not found.match_tasks([task]):
            close = get_close_matches(task, found.all_tasks, n=3)
            near = f" Near: {', '.join(close)}." if close else ""
            raise UserError(f"lm-eval has no task {task!r}.{near}")
    return found


def _run(evaluate: Any, held: Any, names: list[str], found: Any, limit: int | None) -> Mapping[str, Any]:
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), SEED)
    try:
        result = evaluate(
            model=held, tasks=names, task_manager=found, limit=limit, log_samples=False, bootstrap_iters=1000, **seeds
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """stdout carries our JSON and nothing else, and lm-eval's own bars and notes are not ours to show."""
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
