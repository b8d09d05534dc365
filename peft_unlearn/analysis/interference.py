"""Several adapters on one base: what each still forgets, and what it costs, alone and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..data.bundle import row_key
from ..errors import UserError
from ..evaluation import suites
from ..evaluation.plan import Progress
from ..evaluation.score import Subject, on_one_model, score

if TYPE_CHECKING:
    from ..stack.model import ForgetModel

FORMAT = 1
METRICS = ("extraction_strength", "value_accuracy", "probability")
TOGETHER, RETAIN = "together", "retain"
NOTEWORTHY, SAME = 0.05, 0.01  # a difference of that much is said; one of that little is none


def common_retain(
    forget: Mapping[str, Sequence[dict[str, Any]]], retain: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The retain rows that no adapter of the stack is to forget."""
    gone = {row_key(row) for rows in forget.values() for row in rows}
    return [row for row in retain if row_key(row) not in gone]


def interference(
    stack: ForgetModel,
    forget: Mapping[str, Sequence[dict[str, Any]]],
    retain: Sequence[dict[str, Any]],
    *,
    metric: str = METRICS[0],
    template: str = "qa",
    n: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The matrix of what is left: base, each adapter alone, all together; on every forget set and on the common retain set.

    forget: adapter name -> the rows it was trained to forget (names of `stack`).   retain: rows that any of them retained; those
    that another one forgets are taken out.   metric: what the matrix shows; the others of `METRICS` are under ``details``.
    Adapters keep the scale they have in `stack`.

    Returns, JSON-ready: ``sets`` (label, n), ``subjects`` (row -> set -> {"value", "n", "ci95", "reason"}), ``own`` (adapter ->
    what is left of its own set alone and together, and the difference), ``cost`` (row -> what it takes from the retain value of
    the base), ``notes`` (sentences on what stands out), ``details`` (all metrics).
    Raises UserError for a single adapter, or where no retain row is left.
    """
    names = list(stack.adapters)
    if len(names) < 2:
        raise UserError("interference is between adapters: give at least two folders")
    if metric not in METRICS:
        raise UserError(f"metric {metric!r}: interference is shown in one of {', '.join(METRICS)}")
    kept = common_retain(forget, retain)
    if not kept:
        raise UserError("no retain row is left that none of these adapters forgets; give more with --data")
    columns = {f"forget_{name}": name for name in names}
    data = {**{column: list(forget[name]) for column, name in columns.items()}, RETAIN: kept}
    spec = {
        "format": suites.FORMAT,
        "name": "interference",
        "generation": {"max_new_tokens": 32},
        "sets": {c: {"role": "retain" if c == RETAIN else "forget", "metrics": list(METRICS)} for c in data},
    }
    subjects: dict[str, Subject | None] = {
        "base": stack.disabled,
        **on_one_model(stack.model, {name: stack.chain(name) for name in names}),
        **on_one_model(stack.model, {TOGETHER: names}),
    }
    report = score(subjects, spec, data, stack.tokenizer, progress=progress, n=n, template=template)

    def cell(subject: str, column: str, which: str) -> dict[str, Any]:
        key = f"{column}/{which}"
        return {"value": report["subjects"][subject][key], **report["details"][subject][key]}

    matrix = {s: {c: cell(s, c, metric) for c in data} for s in subjects}
    own = {
        name: _change(matrix[name][column]["value"], matrix[TOGETHER][column]["value"], ("alone", "together"))
        for column, name in columns.items()
    }
    cost = {s: _minus(matrix["base"][RETAIN]["value"], matrix[s][RETAIN]["value"]) for s in subjects if s != "base"}
    return {
        "format": FORMAT,
        "metric": metric,
        "scales": stack.scales(),
        "adapter_ids": {name: found.adapter_id for name, found in stack.adapters.items()},
        "labels": {"base": "base", **{name: f"{name} alone" for name in names}, TOGETHER: "all together"},
        "sets": {
            **{
                c: {"label": f"forget set\nof {name}\n({len(data[c][:n])} rows)", "n": len(data[c][:n])}
                for c, name in columns.items()
            },
            RETAIN: {"label": f"retain set\nof all\n({len(kept[:n])} rows)", "n": len(kept[:n])},
        },
        "subjects": matrix,
        "own": own,
        "cost": cost,
        "notes": _notes(own, cost, matrix, columns, same_sets(forget)),
        "details": {s: {c: {m: cell(s, c, m) for m in METRICS} for c in data} for s in subjects},
        "versions": report["versions"],
    }


def same_sets(forget: Mapping[str, Sequence[dict[str, Any]]]) -> list[tuple[str, str]]:
    """Pairs of adapters that forget the very same rows: what one takes from the other's set is then its own work."""
    rows = {name: {row_key(row) for row in found} for name, found in forget.items()}
    return [(a, b) for a, b in combinations(rows, 2) if rows[a] == rows[b]]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _change(alone: float | None, together: float | None, keys: tuple[str, str]) -> dict[str, float | None]:
    return {keys[0]: alone, keys[1]: together, "difference": _minus(together, alone)}


def _notes(
    own: Mapping[str, Mapping[str, float | None]],
    cost: Mapping[str, float | None],
    matrix: Mapping[str, Mapping[str, Mapping[str, Any]]],
    columns: Mapping[str, str],
    same: Sequence[tuple[str, str]],
) -> list[str]:
    out = [f"{a} and {b} forget the same set." for a, b in same]
    for name, found in own.items():
        difference = found["difference"]
        if difference is not None and difference > NOTEWORTHY:
            out.append(
                f"{name} forgets less of its own set beside the others: {found['alone']:.3f} alone, {found['together']:.3f} together."
            )
    for column, name in columns.items():
        for other in own:
            taken = _minus(matrix["base"][column]["value"], matrix[other][column]["value"])
            shared = other == name or (other, name) in same or (name, other) in same
            if not shared and taken is not None and taken > NOTEWORTHY:
                out.append(f"{other} alone takes {taken:.3f} from the set of {name} too.")
    alone = [v for s, v in cost.items() if s != TOGETHER and v is not None]
    whole = cost[TOGETHER]
    if whole is not None and alone:
        gap = whole - sum(alone)
        more = "more than" if gap > SAME else "less than" if gap < -SAME else "about"
        out.append(
            f"Together they cost {whole:.3f} on the retain set, {more} their single costs added up ({sum(alone):.3f})."
        )
    return out
