"""What every attack is given, and what it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.bundle import normal
from ..data.chat import Template
from ..data.formats import identity
from ..evaluation.measured import Array
from ..evaluation.plan import Progress

Rows = list[dict[str, Any]]
Means = dict[str, float | None]  # by measure
MEASURES = ("value_accuracy", "extraction_strength", "probability")
_SET = "scored"


@dataclass
class Case:
    """One subject under attack.

    name: "base", "adapter", "adapter:<folder>" or "retain_only".   tokenizer: of all subjects.   data: the
    `ForgetRetain`.   rows: the forget rows that are scored.   shown: the forget rows that the attacker sees; no fact
    of theirs is in `rows`.   subject: a function that returns a context manager, inside which the model it yields *is*
    the subject (a PEFT model with its adapters on, the same with adapters off, or the retain model). Whatever an attack
    changes in it has to be back, bit for bit, when the attack returns.   on_progress: called as (what, done, total).
    checkpoint: the folder whose files the base's weights were loaded from, where it is known.
    """

    name: str
    tokenizer: Any
    data: Any
    rows: Rows
    shown: Rows
    subject: Callable[[], AbstractContextManager[Any]]
    template: Template = "qa"
    seed: int = 0
    on_progress: Progress | None = None
    max_new_tokens: int = 32
    checkpoint: Any = None
    _before: dict[str, Array] | None = field(default=None, repr=False)

    def score(self, model: Any, rows: Rows | None = None) -> dict[str, Array]:
        """What `model` still answers: measure -> (rows,) values, in the order of `rows` (default: the case's own).

        Measures: value_accuracy (where all rows have a 'value' and a prompt), extraction_strength, probability. A row
        on which the model's logits are NaN is NaN. Each row is read once, and generated only where reading leaves the
        greedy answer open.
        """
        from ..evaluation import suites
        from ..evaluation.numbers import numbers_of
        from ..evaluation.plan import make_plan, measure

        suite = {
            "format": 1,
            "name": "attack",
            "generation": {"max_new_tokens": self.max_new_tokens},
            "sets": {_SET: {"role": "forget", "metrics": list(MEASURES)}},
        }
        rows = self.rows if rows is None else rows
        plan = make_plan(suites.load(suite), {_SET: rows}, self.tokenizer, template=self.template, brief=True)
        found = numbers_of(plan, measure(model, plan), None, ci=False)
        return {m: n.rows for m in MEASURES if (n := found[f"{_SET}/{m}"]).rows is not None}

    def before(self, model: Any) -> dict[str, Array]:
        """`score` of the un-attacked subject on the case's rows, measured in this process and dtype, once."""
        if self._before is None:
            self._before = self.score(model)
        return {m: values.copy() for m, values in self._before.items()}

    def progress(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of `what` are done."""
        if self.on_progress is not None:
            self.on_progress(f"{self.name}: {what}", done, total)


@dataclass
class Outcome:
    """before, after: measure -> (n,) values of the same rows in the same order.   about: JSON-ready details."""

    before: dict[str, Array]
    after: dict[str, Array]
    n: int
    about: dict[str, Any] = field(default_factory=dict)


def mean(values: Array) -> float | None:
    """None where there is no row, or one without a value."""
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def means(scores: Mapping[str, Array]) -> Means:
    return {m: mean(values) for m, values in scores.items()}


def facts(rows: Rows) -> list[int]:
    """For each row the number of its fact: two rows are one fact when they ask for the same value of the same subject,
    or share their question or an answer of four words and more (case, punctuation and white space apart)."""
    parent: list[int] = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[str, ...], int] = {}
    for i, row in enumerate(rows):
        for key in _keys(row):
            parent[root(i)] = root(seen.setdefault(key, i))
    return [root(i) for i in range(len(rows))]


def _keys(row: dict[str, Any]) -> list[tuple[str, ...]]:
    keys: list[tuple[str, ...]] = [(k, normal(row[k])) for k in ("question", "prompt") if isinstance(row.get(k), str)]
    if (answer := normal(str(row.get("answer", "")))).count(" ") >= 3:  # "Yes." is no fact
        keys.append(("answer", answer))
    if row.get("fact"):  # wordings of one thing, as its author says
        keys.append(("fact", normal(str(row["fact"]))))
    if row.get("subject") and row.get("value"):
        keys.append(("fact", normal(str(row["subject"])), normal(str(row["value"]))))
    return [key for key in keys if key[-1]] or [("row", identity(row))]


def split(rows: Rows, shown: int, seed: int = 0) -> tuple[Rows, Rows]:
    """(scored, shown): about `shown` rows for the attacker, and those rows none of whose facts is among them.

    Facts are drawn whole at random, the same for the same rows and seed, until `shown` rows are together; surplus rows
    of the last fact are left out of both. At least half of the facts are left to be scored.
    """
    fact = np.asarray(facts(rows))
    order = np.random.default_rng(seed).permutation(np.unique(fact))
    picked: list[int] = []
    taken: set[int] = set()
    for f in order[: len(order) // 2] if shown else order[:0]:
        if len(picked) >= shown:
            break
        picked += np.flatnonzero(fact == f).tolist()
        taken.add(int(f))
    scored = [row for row, f in zip(rows, fact, strict=True) if int(f) not in taken]
    return scored, [rows[i] for i in sorted(picked[:shown])]


def chosen(rows: Sequence[Any], n: int, seed: int) -> list[Any]:
    """At most n of the rows, drawn without replacement, in their own order."""
    if n >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).permutation(len(rows))[:n].tolist())]
