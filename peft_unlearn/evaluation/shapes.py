"""Suites, what is to be read for one, and what one model answered: the data that the rest of this room passes around."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.chat import Template
from .measured import Array, Unmeasured
from .teacher import Encoded, TeacherForced

Role = Literal["forget", "retain", "holdout"]
FORMATS = {
    "own": "the data's own wording",
    "question": "the question alone",
    "role": "an instruction and a role",
    "stub": "the answer's beginning up to the value",
}
"""Ways in which a question is asked, see `sampling.worded`."""


@dataclass(frozen=True)
class Gate:
    """A set counts only if `subject` reaches `at_least` in `metric` on it; else it is not measurable for the others."""

    subject: str
    metric: str
    at_least: float


@dataclass(frozen=True)
class EvalSet:
    """One set of rows, as a suite names it.

    source: its name in the data.   perturbed_rows: of how many rows the wrong answers are read.   template: wording of
    question/answer rows, default the data's own.   max_new_tokens: longest greedy answer, default the suite's.
    shots: a source whose rows, answers included, stand in front of each prompt.   stop: a greedy answer ends before
    the first of these strings.   against: the set of this suite that pair metrics compare with.
    """

    name: str
    source: str
    role: Role
    metrics: tuple[str, ...]
    perturbed_rows: int | None = None
    measurable_if: Gate | None = None
    template: Template | None = None
    max_new_tokens: int | None = None
    shots: str | None = None
    stop: tuple[str, ...] = ()
    against: str | None = None


@dataclass(frozen=True)
class Suite:
    """A suite as its YAML says it. `whole` maps a metric over metrics to its parts, keys like
    ``retain/probability``."""

    name: str
    summary: str
    reference: str
    sets: Mapping[str, EvalSet]
    whole: Mapping[str, tuple[str, ...]]
    max_new_tokens: int
    quick_sets: tuple[str, ...]
    quick_metrics: tuple[str, ...]
    quick_rows: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of metrics and providers, by name

    def quick(self) -> Suite:
        """The small suite that is run while training."""
        sets = {
            name: replace(s, metrics=tuple(m for m in self.quick_metrics if m in s.metrics), measurable_if=None)
            for name, s in self.sets.items()
            if name in self.quick_sets
        }
        return replace(self, sets=sets, whole={})


class Prompt(NamedTuple):
    """One greedy answer that is wanted: the same text with another length or stop is another answer."""

    text: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()


def no_indices() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass
class SetPlan:
    """One set's rows and where their texts stand in the list of pairs."""

    spec: EvalSet
    rows: list[dict[str, Any]]
    template: Template = "qa"
    prompts: list[Prompt] = field(default_factory=list)  # one per row
    answers: list[str] = field(default_factory=list)  # the right ones
    answer: list[int] = field(default_factory=list)  # pair of each row's answer
    chosen: NDArray[np.int64] = field(default_factory=no_indices)  # rows with wrong answers read
    right: list[int] = field(default_factory=list)  # pair of the paraphrase, one per chosen row
    wrong: list[list[int]] = field(default_factory=list)  # pairs of the wrong answers, per chosen row
    missing: dict[str, str] = field(default_factory=dict)  # input -> why the rows do not give it
    generates: bool = False  # whether a metric needs greedy answers
    against: SetPlan | None = None  # the set that pair metrics compare with
    absent: str | None = None  # why there are no rows

    def rows_of(self, needs: Sequence[str]) -> NDArray[np.int64]:
        """The rows that a metric with these needs is about."""
        return self.chosen if "perturbed" in needs else np.arange(len(self.rows))

    def answered(self, too_long: Container[str]) -> bool:
        """Whether greedy answers are wanted and can be had. too_long: sets that the model cannot read."""
        return self.generates and "generation" not in self.missing and self.spec.name not in too_long

    def require(self, measured: Measured, field: str = "") -> None:
        """Raise Unmeasured where a provider has nothing to look at: NaN logits (a model that gives nothing away would count as
        having forgotten), or a `field` that rows lack."""
        if bad := int(np.isnan(measured.mean_logp[self.answer]).sum()):
            raise Unmeasured(f"{bad} of {len(self.rows)} rows have no value: the model's logits are NaN there")
        if field in self.missing:
            raise Unmeasured(self.missing[field])


@dataclass
class Plan:
    """Every (prompt, answer) of a suite exactly once, tokenized, with the sets that point into it."""

    suite: Suite
    tokenizer: Any
    sets: dict[str, SetPlan]
    pairs: list[tuple[str, str]]
    encoded: list[Encoded]
    providers: dict[str, list[str]] = field(default_factory=dict)  # provider -> the sets it is asked about
    moments: NDArray[np.bool_] | None = None  # (pairs,) where mean and spread of log p over the vocabulary are wanted
    brief: bool = False  # answers end where no metric needs more of them


@dataclass
class Measured:
    """One model's reading of every pair, and its greedy answer to every prompt that some metric asks for."""

    forced: TeacherForced
    mean_logp: Array  # (pairs,)
    answers: dict[Prompt, str]
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # provider's input -> set -> values or Unmeasured
    too_long: dict[str, str] = field(default_factory=dict)  # set -> why this model cannot read it

    def answered(self, s: SetPlan) -> bool:
        """Whether the set's greedy answers were generated."""
        return s.answered(self.too_long)
