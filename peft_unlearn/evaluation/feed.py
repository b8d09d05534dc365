"""What a metric is given: its parameters by name, from what was read, generated and provided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.facts import accepted
from ..data.formats import layout_of
from .measured import Ragged, Unmeasured
from .metrics.likelihood import truth_log_ratio
from .provider import PREFIXES, provider_of
from .shapes import Measured, SetPlan


@dataclass(frozen=True)
class Reading:
    """One subject's reading of some rows of one set, and the subjects it may be compared with.

    select: indices of the rows.   reference: of the suite's reference; None where it was not evaluated, as for `base`.
    """

    s: SetPlan
    m: Measured
    select: NDArray[np.int64]
    reference: Measured | None = None
    base: Measured | None = None

    def of(self, s: SetPlan | None = None, m: Measured | None = None) -> Reading:
        """The same of another set (all its rows), or of another subject."""
        if s is not None:
            return Reading(s, self.m, np.arange(len(s.rows)), self.reference, self.base)
        return Reading(self.s, m or self.m, self.select, self.reference, self.base)

    def forced(self, name: str) -> Ragged:
        return getattr(self.m.forced, name).take([self.s.answer[i] for i in self.select])

    def body(self, name: str) -> Ragged:
        """The same without the end token, which is there because we put it there."""
        return self.forced(name).cut(self.forced("correct").lengths)

    def loss(self) -> Ragged:
        """Log-probabilities that membership by loss reads: of raw text, whose end was never written, those of the text."""
        raw = np.array([layout_of(self.s.rows[i]) == "text" for i in self.select], dtype=np.bool_)
        whole = self.forced("logp")
        return whole.cut(np.where(raw, self.forced("correct").lengths, whole.lengths))

    def right_logp(self) -> Any:
        if "perturbed" in self.s.missing:
            raise Unmeasured(self.s.missing["perturbed"])
        return self.m.mean_logp[self.s.right]

    def wrong_logp(self) -> Ragged:
        self.right_logp()
        return Ragged.of([self.m.mean_logp[w] for w in self.s.wrong])

    def rows(self, key: str | None = None) -> list[Any]:
        if key in self.s.missing:
            raise Unmeasured(self.s.missing[key])
        return [self.s.rows[i] if key is None else str(self.s.rows[i][key]) for i in self.select]

    def values(self) -> list[Any]:
        given, rows = self.rows("value"), self.rows()
        return [accepted(row) if "accepted" in row else v for v, row in zip(given, rows, strict=True)]

    def generation(self) -> list[str]:
        if "generation" in self.s.missing:
            raise Unmeasured(self.s.missing["generation"])
        return [self.m.answers[self.s.prompts[i]] for i in self.select]


INPUTS: dict[str, Callable[[Reading], Any]] = {
    "logp": lambda r: r.forced("logp"),  # Ragged, token log-probabilities of each row's answer, EOS included
    "logp_mean": lambda r: r.forced("logp_mean"),  # Ragged, mean of log p over the vocabulary under p at each target
    "logp_std": lambda r: r.forced("logp_std"),  # Ragged, its standard deviation
    "body_logp": lambda r: r.body("logp"),  # these three without the end token
    "body_logp_mean": lambda r: r.body("logp_mean"),
    "body_logp_std": lambda r: r.body("logp_std"),
    "loss_logp": Reading.loss,  # logp, of raw text rows without the end token
    "correct": lambda r: r.forced("correct"),  # Ragged, 1.0 / 0.0 arg-max right, without the end token
    "generation": Reading.generation,  # list[str], the greedy answers
    "answer": lambda r: [r.s.answers[i] for i in r.select],  # list[str], the right answers
    "value": Reading.values,  # list[str or list of accepted ones], what a right answer must contain
    "rows": Reading.rows,  # list[dict], the rows themselves
    "role": lambda r: r.s.spec.role,  # forget, retain or holdout
    "right_logp": Reading.right_logp,  # (rows,) mean token log-probability of the paraphrase, or of the answer itself
    "wrong_logp": Reading.wrong_logp,  # Ragged, mean token log-probabilities of each row's wrong answers
    "log_ratio": lambda r: truth_log_ratio(r.right_logp(), r.wrong_logp()),  # (rows,) log truth ratio
}


def feed(name: str, reading: Reading) -> Any:
    """What a metric's parameter of that name is given; Unmeasured where the rows or the subjects do not have it."""
    s, m = reading.s, reading.m
    if s.spec.name in m.too_long:
        raise Unmeasured(m.too_long[s.spec.name])
    if provider_of(name) is not None:
        values = m.extra.get(name, {}).get(s.spec.name, Unmeasured(f"{name} was not measured for this subject"))
        if isinstance(values, Unmeasured):
            raise values
        return _taken(values, reading.select)
    if name in INPUTS:
        return INPUTS[name](reading)
    prefix = next((p for p in PREFIXES if name.startswith(p)), None)
    if prefix is None:
        raise TypeError(f"no metric can be fed {name!r}; known: {', '.join(INPUTS)}")
    bare = name.removeprefix(prefix)
    if prefix == "against_":
        return feed(bare, reading.of(s=_against(s)))
    other, which = (reading.reference, "retain model") if prefix == "reference_" else (reading.base, "base")
    if other is None:
        raise Unmeasured(f"there is no {which} to compare with")
    return feed(bare, reading.of(m=_same_rows(other, m)))


def _same_rows(other: Measured, m: Measured) -> Measured:
    """Whoever brings a reading from elsewhere must have read the same pairs; else rows would be compared with strangers."""
    if len(other.mean_logp) != len(m.mean_logp):
        raise Unmeasured(
            f"the model to compare with was read on {len(other.mean_logp)} texts and this one on {len(m.mean_logp)}: other rows"
        )
    return other


def _taken(values: Any, select: NDArray[np.int64]) -> Any:
    if isinstance(values, Ragged):
        return values.take(select)
    return values[select] if isinstance(values, np.ndarray) else [values[i] for i in select]


def _against(s: SetPlan) -> SetPlan:
    if s.spec.against is None:
        raise Unmeasured("the suite names no set to compare this one with (key 'against')")
    if s.against is None or not s.against.rows:
        why = "" if s.against is None or s.against.absent is None else f": {s.against.absent}"
        raise Unmeasured(f"there are no {s.spec.against} rows to compare with{why}")
    return s.against
