"""From adapter folders to numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..data.load import template_of
from ..errors import UserError, nearest
from ..folder import results
from ..folder.read import MANIFEST, AdapterFolder
from ..folder.write import update_eval
from ..stack.model import ForgetModel
from . import lm_eval, open_unlearning
from .provider import Progress
from .score import Report, on_one_model, score
from .subjects import (
    RETAIN_MODEL,
    bundle_of,
    check_data,
    embedded_retain_model,
    judged_folders,
    loaded_retain_model,
    matches,
    named_retain_model,
    stack_of,
    subjects_on,
    suite_of,
)  # fmt: skip

LAYOUTS = ("eval", "open-unlearning")


def evaluate(
    folders: Sequence[str | Path],
    *,
    base: str | None = None,
    data: str | None = None,
    suite: str | None = None,
    n: int | None = None,
    retain_model: str | None = None,
    tasks: Sequence[str] | None = None,
    below: Sequence[str | Path] = (),
    dtype: str = "auto",
    brief: bool = False,
    progress: Progress | None = None,
    write: bool = True,
) -> Report:
    """Score base, adapters and, where there is one, the retain model on one suite; one loaded base, adapters swapped in place.

    Args:
        suite, data: default the recipe's own. Both given, the data may be another forget set than the adapter's: the report then
            says ``"data_matches_manifest": false``, and an embedded base's own retain model is no reference.
        n: at most so many rows of each set; nothing is written then.
        retain_model: a model trained without the forget set (a folder, a Hub id, ``embedded:NAME`` for that base's), or a folder of a
            forget adapter on the same base. Default the embedded base's own.
        tasks: lm-eval tasks (names, or YAML files) to run on the same subjects; their numbers become block "lm_eval".
        below: adapters that these were trained on top of, lowest first; each adapter is judged together with them.
        dtype: what all models are computed in: float32, bfloat16, float16, or auto: the base's own where this machine is fast in it.
        brief: see `score`; for whoever wants the numbers alone.
        write: with one folder, keep the result on its own forget set in it as eval.json.
    """
    adapters = judged_folders(folders)
    names, found = list(adapters), list(adapters.values())
    manifest = found[0].manifest
    bundle = _bundle(found[0], data, foreign=suite is not None)
    foreign = _foreign(found, bundle, chosen=suite is not None and data is not None)
    given = named_retain_model(retain_model)
    if isinstance(given, AdapterFolder):
        adapters[RETAIN_MODEL] = given
    stack = stack_of(adapters, base, below, dtype)
    own = None if foreign else embedded_retain_model(manifest.base.ref, bundle, stack.dtype)
    subjects = {**subjects_on(stack, names), "retain_only": _retain_model(given, stack) or own}
    # first, since a task that is misspelled or cannot be fetched is found out here alone
    blocks = lm_eval.run_tasks(subjects, stack.tokenizer, tasks, limit=n, progress=progress) if tasks else None
    suite = suite or suite_of(found[0])
    own_id = manifest.adapter_id if len(found) == 1 else None
    report = score(
        subjects, suite, bundle, stack.tokenizer, progress, n, adapter_id=own_id, base=manifest.base.ref, brief=brief
    )
    report.lm_eval, report.dtype = blocks, stack.dtype
    if blocks is None:
        _check_something_measured(report)
    if any(matches(bundle, f.manifest) is not None for f in found):
        report.data_matches_manifest = not foreign
    if len(found) == 1:
        report.scale = stack.scales()[names[0]]
        if write and n is None and not foreign:
            results.store(found[0].path, lambda: update_eval(found[0].path, report.to_dict()))
    return report


def _foreign(found: Sequence[AdapterFolder], bundle: ForgetRetain, chosen: bool) -> bool:
    """Whether these are not the rows that every adapter was trained to forget. chosen: the user named both suite and data; else
    other rows are refused."""
    foreign = [f for f in found if matches(bundle, f.manifest) is False]
    if foreign and not chosen:
        check_data(bundle, foreign[0].manifest)
    if foreign:
        names = ", ".join(f.path.resolve().name for f in foreign)
        warnings.warn(
            f"data: this is not the forget set of {names}: the numbers say what these adapters do to other rows, and no eval.json is "
            "written",
            stacklevel=3,
        )
    return bool(foreign)


def _retain_model(given: AdapterFolder | Path | None, stack: ForgetModel) -> Any:
    """The retain model that the user named, as a subject."""
    if isinstance(given, AdapterFolder):
        return on_one_model(stack.model, {"retain_only": RETAIN_MODEL})["retain_only"]
    return None if given is None else loaded_retain_model(given, stack.tokenizer, stack.dtype)


def _check_something_measured(report: Report) -> None:
    """Refuse a suite that gave no number at all: it was made for other data, and a page of nulls would replace what is stored."""
    values = [v for found in report.subjects.values() for v in (found or {}).values()]
    if all(v is None for v in values):
        details = (d for found in report.details.values() for d in found.values() if isinstance(d, dict))
        why = list(dict.fromkeys(str(d["reason"]) for d in details))
        more = f" (and {len(why) - 3} more reasons)" if len(why) > 3 else ""
        raise UserError(
            f"suite {report.suite}: nothing can be measured on these data: {'; '.join(why[:3])}{more}. Name the suite's own data with "
            "--data, or the suite of these data with --suite"
        )


def save_report(report: Report, out: str | Path, layout: str = "eval") -> list[Path]:
    """Write a report where the user asked for it. layout: "eval" (eval.json's own; a file, or a folder for ``eval.json``), or
    "open-unlearning" (a folder with its two files for each model)."""
    check_out(out, layout)
    path = Path(out).expanduser()
    if layout == "open-unlearning":
        with results.writing(path):
            return open_unlearning.save(report, path)
    return results.save(report, path if path.suffix == ".json" else path / "eval.json")


def check_out(out: str | Path | None, layout: str) -> None:
    """Refuse an --out and --layout that do not go together; before any work."""
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout}: there is no such layout.{nearest(layout, LAYOUTS)}")
    if layout == "open-unlearning" and (out is None or Path(out).suffix == ".json"):
        raise UserError("--layout open-unlearning: two files for each model are written; name a folder with --out")
    path = Path(out or ".").expanduser()
    # a part of the rows must not replace the whole, nor the attacks stored beside it
    if out is not None and ((path.parent if path.suffix == ".json" else path) / MANIFEST).is_file():
        raise UserError(
            f"--out {out}: is in an adapter's folder, where `eval` itself keeps eval.json; name another place"
        )
    if out is not None and layout == "eval":
        results.check_place(path if path.suffix == ".json" else path / "eval.json")


def _bundle(first: AdapterFolder, data: str | None, foreign: bool) -> ForgetRetain:
    """The data to judge on. foreign: the hashes that the recipe knows need not hold for what is given."""
    if data is None or not foreign:
        return bundle_of(first, data)
    return ForgetRetain.load(data, template=template_of(first.recipe.get("data")))
