"""A Report in the JSON files of open-unlearning, for tools that read those: NAME_EVAL.json and NAME_SUMMARY.json.

EVAL: metric -> {"agg_value", "value_by_index": {"0": {..}, ..}}, by their metric names where there is one, else ``set/metric``.
SUMMARY: metric -> its agg_value, where it has one. No texts: their ROUGE rows carry prompts and answers, these do not.
Where our numbers differ from theirs by definition, docs/evaluation.md says so (extraction strength 0 instead of 1/n, no 1e-10 in
denominators).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..folder.results import read_keys, write_file
from .measured import Array
from .score import Report

_PREFIX = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf", "holdout": "holdout"}
_PER_SET = {
    "probability": "{}_Q_A_Prob",
    "probability_among_choices": "{}_Q_A_Prob_normalised",
    "paraphrase_probability": "{}_Q_A_PARA_Prob",
    "rouge_l_recall": "{}_Q_A_ROUGE",
    "truth_ratio": "{}_Truth_Ratio",
}
# metrics that they compute on the forget set, under a plain name; on other sets the name carries the set
_FORGET = (
    "exact_memorization", "extraction_strength", "forget_quality", "privleak", "mia_loss", "mia_zlib", "mia_reference",
    "mia_gradnorm", "mia_min_k", "mia_min_k_plus_plus",
)  # fmt: skip
_SPECIAL = {"forget/truth_ratio": "forget_truth_ratio", "forget/mia_rel_diff": "rel_diff"}


def name_of(key: str) -> str:
    """open-unlearning's name of a key ``set/metric``; the key itself where it has none."""
    if key in _SPECIAL:
        return _SPECIAL[key]
    where, _, metric = key.rpartition("/")
    if where in _PREFIX and metric in _PER_SET:
        return _PER_SET[metric].format(_PREFIX[where])
    if metric in _FORGET and where in _PREFIX:
        return metric if where == "forget" else f"{_PREFIX[where]}_{metric}"
    return key


def layout(report: Report, subject: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(EVAL, SUMMARY) of one subject, JSON-ready. Raises KeyError for a subject that was not evaluated."""
    values, details = report.subjects[subject] or {}, report.details[subject]
    per_row, ratios = report.per_row.get(subject, {}), report.log_ratio.get(subject, {})
    found: dict[str, Any] = {}
    for key, value in values.items():
        where, _, metric = key.rpartition("/")
        entry: dict[str, Any] = {"agg_value": value}
        if value is None:
            entry["reason"] = details[key]["reason"]
        rows = ratios[where] if metric == "truth_ratio" and where in ratios else per_row.get(key)
        if rows is not None:
            entry["value_by_index"] = _by_index(metric, rows)
        found[name_of(key)] = entry
    found = dict(sorted(found.items()))
    return found, {name: entry["agg_value"] for name, entry in found.items() if entry["agg_value"] is not None}


def _by_index(metric: str, rows: Array) -> dict[str, dict[str, float | None]]:
    make: Callable[[float], Mapping[str, float]] = _ROW.get(metric, lambda x: {"score": x})
    with np.errstate(divide="ignore", over="ignore"):
        return {
            str(i): {k: float(v) if np.isfinite(v) else None for k, v in make(x).items()} for i, x in enumerate(rows)
        }


def _probability(p: float) -> dict[str, float]:
    return {"prob": p, "avg_loss": float(-np.log(p))}


_ROW: dict[str, Callable[[float], Mapping[str, float]]] = {
    "probability": _probability,
    "paraphrase_probability": _probability,
    "probability_among_choices": lambda p: {"prob": p},
    "rouge_l_recall": lambda x: {"rougeL_recall": x},
    "truth_ratio": lambda log_ratio: {"score": float(np.exp(-log_ratio))},  # theirs is wrong / right
}


_LAYOUT: dict[str, Callable[[Path], bool]] = {  # how an earlier file of this layout is known
    "EVAL": lambda path: bool(read_keys(path, lambda v: isinstance(v, Mapping) and "agg_value" in v)),
    "SUMMARY": lambda path: bool(read_keys(path, lambda v: isinstance(v, int | float))),
}


def save(report: Report, out: str | Path) -> list[Path]:
    """Write the two files of every subject into the folder `out`: of one subject directly, of several in a folder each."""
    folder = Path(out)
    subjects = [s for s, values in report.subjects.items() if values is not None]
    written = []
    for subject in subjects:
        place = folder / subject.replace(":", "-") if len(subjects) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        for kind, content in zip(("EVAL", "SUMMARY"), layout(report, subject), strict=True):
            file = place / f"{report.suite.upper()}_{kind}.json"
            written.append(write_file(file, json.dumps(content, indent=4, allow_nan=False) + "\n", _LAYOUT[kind]))
    return written
