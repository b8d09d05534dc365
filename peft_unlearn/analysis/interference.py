"""Several adapters on one base: what each still forgets, and what it costs, alone and all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain, row_key
from ..errors import UserError
from ..evaluation import suites
from ..evaluation.plan import Progress
from ..evaluation.score import on_one_model, score
from ..evaluation.subjects import bundle_of, matches, named_folders
from ..folder.read import AdapterFolder
from ..reporting import interference as shown
from ..reporting.document import Part
from ..reporting.interference import TOGETHER
from ..reporting.result import Result
from ..stack.model import ForgetModel

FORMAT = 1
METRICS = ("extraction_strength", "value_accuracy", "probability")
RETAIN = "retain"
Rows = Sequence[dict[str, Any]]
Cell = dict[str, Any]  # "value", "n", "ci95", "reason"


@dataclass
class Interference(Result):
    """The matrix of what is left: base, each adapter alone, all together; on every forget set and on the common retain set.

    metric: what the matrix shows.   scales, adapter_ids, forget_sets (sha256): name -> of the adapter.   n: set -> rows judged.
    details: subject -> set -> metric -> cell, of all `METRICS`.   same: pairs that forget the same set.   base: its name.
    """

    metric: str
    base: str
    scales: dict[str, float]
    adapter_ids: dict[str, str]
    forget_sets: dict[str, str]
    n: dict[str, int]
    details: dict[str, dict[str, dict[str, Cell]]]
    same: list[tuple[str, str]]
    versions: dict[str, str]
    dtype: str = "float32"
    title = "Forget adapters together"

    def left(self, subject: str, column: str) -> float | None:
        """What the subject has left of a set, ``forget_NAME`` or ``retain``."""
        return self.details[subject][column][self.metric]["value"]

    @property
    def own(self) -> dict[str, dict[str, float | None]]:
        """What each adapter leaves of its own set alone and beside the others, and the difference."""
        out = {}
        for name in self.scales:
            alone, together = (self.left(s, f"forget_{name}") for s in (name, TOGETHER))
            out[name] = {"alone": alone, "together": together, "difference": _minus(together, alone)}
        return out

    @property
    def cost(self) -> dict[str, float | None]:
        """What each adapter, and all together, take from the base's retain value."""
        return {s: _minus(self.left("base", RETAIN), self.left(s, RETAIN)) for s in self.details if s != "base"}

    @property
    def notes(self) -> list[str]:
        """Sentences on what stands out."""
        taken = {
            (other, name): _minus(self.left("base", f"forget_{name}"), self.left(other, f"forget_{name}"))
            for name in self.scales
            for other in self.scales
        }
        return shown.notes(self.own, self.cost, taken, self.same)

    def to_dict(self) -> dict[str, Any]:
        names = {f"forget_{name}": f"forget set\nof {name}" for name in self.scales} | {RETAIN: "retain set\nof all"}
        return {
            "format": FORMAT, "metric": self.metric, "scales": self.scales, "adapter_ids": self.adapter_ids,
            "labels": {"base": "base", **{name: f"{name} alone" for name in self.scales}, TOGETHER: "all together"},
            "sets": {c: {"label": f"{name}\n({self.n[c]} rows)", "n": self.n[c]} for c, name in names.items()},
            "subjects": {s: {c: by[self.metric] for c, by in found.items()} for s, found in self.details.items()},
            "own": self.own, "cost": self.cost, "notes": self.notes, "details": self.details, "versions": self.versions,
            "base": self.base, "forget_sets": self.forget_sets, "dtype": self.dtype,
        }  # fmt: skip

    def __str__(self) -> str:
        return shown.text(self.to_dict())

    def parts(self) -> list[Part]:
        return shown.parts(self.to_dict())


def interference(
    folders: Sequence[str | Path], *, metric: str = METRICS[0], n: int | None = None, base: str | None = None,
    data: Sequence[str] = (), dtype: str = "auto", progress: Progress | None = None,
) -> Interference:  # fmt: skip
    """Judge a stack, in the order given (that of training, where one was trained on top of another), at the scales it has.

    Args:
        metric: what the matrix shows; the others of `METRICS` are under ``details``.
        n: at most so many rows of each set.
        dtype: what the models are computed in, see `ForgetModel`.
        data: bundles; each adapter takes the one whose forget set has the hash in its manifest. Adapters on embedded data find
            theirs. Rows that one of the adapters forgets are no retain rows of the others.

    Raises:
        UserError: a single adapter, no bundle for one of them, an unknown metric, or no retain row left.
    """
    found = named_folders(folders)
    if len(found) < 2:
        raise UserError("interference is between adapters: give at least two folders")
    if metric not in METRICS:
        raise UserError(f"metric {metric!r}: interference is shown in one of {', '.join(METRICS)}")
    given = [ForgetRetain.load(d) for d in data]
    bundles = {name: _bundle(f, given) for name, f in found.items()}
    forget: dict[str, Rows] = {name: b.forget for name, b in bundles.items()}
    retain = common_retain(forget, _all_retain(bundles.values()))
    if not retain:
        raise UserError("no retain row is left that none of these adapters forgets; give more with --data")
    stack = ForgetModel.from_pretrained(base, {name: f.path for name, f in found.items()}, dtype=dtype)
    rows = {**{f"forget_{name}": list(some) for name, some in forget.items()}, RETAIN: retain}
    template = next(iter(bundles.values())).template
    details, versions = _measured(stack, rows, n, template, progress)
    return Interference(
        metric=metric, base=next(iter(found.values())).manifest.base.ref, scales=stack.scales(),
        adapter_ids={name: f.adapter_id for name, f in stack.adapters.items()},
        forget_sets={name: b.sha256["forget"] for name, b in bundles.items()},
        n={column: len(some[:n]) for column, some in rows.items()}, details=details, same=same_sets(forget), versions=versions,
        dtype=stack.dtype,
    )  # fmt: skip


def _measured(
    stack: ForgetModel, rows: Mapping[str, list[dict[str, Any]]], n: int | None, template: Any, progress: Progress | None,
) -> tuple[dict[str, dict[str, dict[str, Cell]]], dict[str, str]]:  # fmt: skip
    """(subject -> set -> metric -> cell, versions): base, each adapter alone, all together, on every set."""
    names = list(stack.adapters)
    spec = {
        "format": suites.FORMAT, "name": "interference", "generation": {"max_new_tokens": 32},
        "sets": {c: {"role": "retain" if c == RETAIN else "forget", "metrics": list(METRICS)} for c in rows},
    }  # fmt: skip
    subjects = {
        "base": stack.disabled,
        **on_one_model(stack.model, {name: stack.chain(name) for name in names}),
        **on_one_model(stack.model, {TOGETHER: names}),
    }
    report = score(subjects, spec, rows, stack.tokenizer, progress=progress, n=n, template=template, brief=True)

    def cell(subject: str, key: str) -> Cell:
        return {"value": (report.subjects[subject] or {})[key], **report.details[subject][key]}

    return {s: {c: {m: cell(s, f"{c}/{m}") for m in METRICS} for c in rows} for s in subjects}, report.versions


def _bundle(folder: AdapterFolder, given: Sequence[ForgetRetain]) -> ForgetRetain:
    wanted = folder.manifest.data.get("forget", {}).get("sha256")
    for bundle in given:
        if bundle.sha256["forget"] == wanted:
            return bundle
    own, why = None, ""
    try:
        own = bundle_of(folder)
    except UserError as e:
        why = f" ({e})"
    if own is None or matches(own, folder.manifest) is False:
        raise UserError(
            f"{folder.path}: none of the data given is its forget set (sha256 {str(wanted)[:12]}); "
            f"name its bundle with --data, once for each set{why}"
        )
    return own


def _all_retain(bundles: Any) -> list[dict[str, Any]]:
    """The retain rows of all bundles, each once."""
    rows = (row for b in bundles for row in b.extra.get("retain") or b.retain or [])
    return list({repr(sorted((k, str(v)) for k, v in row.items())): row for row in rows}.values())


def common_retain(forget: Mapping[str, Rows], retain: Rows) -> list[dict[str, Any]]:
    """The retain rows that no adapter of the stack is to forget."""
    gone = {row_key(row) for rows in forget.values() for row in rows}
    return [row for row in retain if row_key(row) not in gone]


def same_sets(forget: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """Pairs of adapters that forget the very same rows: what one takes from the other's set is then its own work."""
    rows = {name: {row_key(row) for row in found} for name, found in forget.items()}
    return [(a, b) for a, b in combinations(rows, 2) if rows[a] == rows[b]]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
