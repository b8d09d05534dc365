"""Metrics on the model's greedy answer against the right one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...data.facts import accepted, names_value, words
from ...registry import metric
from ..measured import KNOWLEDGE, UNIT, Array, Unmeasured
from ..provider import Context, provider
from ..shapes import Measured, Plan, SetPlan
from .sources import CONTAINS, MUSE, PARSES, ROUGE


def _named(text: str, row: Mapping[str, Any]) -> bool:
    """Whether the value stands in the words that are complete: what follows cannot take it away."""
    return names_value(re.sub(r"\w+$", "", text), accepted(row))


def _closed(text: str, row: Mapping[str, Any]) -> bool:
    """Whether the first fence of code is closed: nothing after it is looked at."""
    found = _FENCE.search(text)
    return found is not None and found[2] == "```"


_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(```|\Z)", re.DOTALL)
SETTLED: dict[str, Callable[[str, Mapping[str, Any]], bool]] = {"value_accuracy": _named, "python_parses": _closed}
"""Metric -> (answer so far, row) -> whether no longer answer would have another value. Metrics that are not here see whole answers."""


@metric("value_accuracy", within=UNIT, source=CONTAINS, title="names the right value", better=KNOWLEDGE)
def value_accuracy(generation: Sequence[str], value: Sequence[str | Sequence[str]]) -> Array:
    """1 where the gold value, or one of several accepted ones, stands in the generated answer, at word boundaries, else 0.

    generation: one string per row.   value: one string, or several accepted ones, per row. Case, punctuation, spacing and Unicode
    forms do not count ("St. Malo" = "st malo").
    Returns (rows,) of 0.0 and 1.0; NaN for a value without a word. It asks whether the value is named, not whether
    the sentence is
    true: "not in Paris" names Paris.
    Why it leads: where answers follow a template, ROUGE has a floor of 0.7 from the template's words alone.
    """
    right = np.empty(len(value))
    for i, (found, gold) in enumerate(zip(generation, value, strict=True)):
        wanted = [gold] if isinstance(gold, str) else list(gold)
        right[i] = float(names_value(found, wanted)) if any(map(words, wanted)) else np.nan
    return right


@metric("rouge_l_recall", within=UNIT, source=ROUGE, title="ROUGE-L recall", better=KNOWLEDGE)
def rouge_l_recall(generation: Sequence[str], answer: Sequence[str]) -> Array:
    """ROUGE-L recall of the greedy answer: longest common subsequence of words / words of the right answer, Porter
    stems.

    generation, answer: one string per row. Returns (rows,) in [0, 1]. As in TOFU; without the stemmer 16 of 100
    published rows differ. The package rouge-score reads ASCII letters and digits only: NaN where the right answer
    has none.
    Raises Unmeasured where rouge-score is not installed.
    """
    return _rouge_l(generation, answer, stem=True, part="recall")


@metric("rouge_l_f1", within=UNIT, source=ROUGE, title="ROUGE-L F1", better=KNOWLEDGE)
def rouge_l_f1(generation: Sequence[str], answer: Sequence[str]) -> Array:
    """ROUGE-L F1 of the greedy answer, without a stemmer: MUSE's VerbMem and KnowMem, here in [0, 1] and not times 100.

    generation, answer: one string per row. F1 of precision LCS / words given and recall LCS / words of the right answer.
    Returns (rows,) in [0, 1]; 0 for an empty answer; NaN where the right answer has no ASCII letter or digit. Open-unlearning
    stems here, so its VerbMem is a little higher.
    Raises Unmeasured where rouge-score is not installed.
    """
    return _rouge_l(generation, answer, stem=False, part="fmeasure")


@metric("verbatim_rouge_l_f1", within=UNIT, source=MUSE, title="verbatim ROUGE-L F1", better=KNOWLEDGE)
def verbatim_rouge_l_f1(generation: Sequence[str], answer_start: Sequence[str]) -> Array:
    """`rouge_l_f1` against the right text cut to as many tokens as may be generated: MUSE's VerbMem, in [0, 1].

    generation: greedy continuations.   answer_start: the right texts' first max_new_tokens tokens (128 in MUSE).
    """
    return _rouge_l(generation, answer_start, stem=False, part="fmeasure")


def _rouge_l(generation: Sequence[str], answer: Sequence[str], stem: bool, part: str) -> Array:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise Unmeasured("the package rouge-score is not installed: pip install rouge-score") from None
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stem)
    out = np.empty(len(answer))
    for i, (found, gold) in enumerate(zip(generation, answer, strict=True)):
        readable = re.search(r"[a-z0-9]", gold.lower())
        out[i] = getattr(scorer.score(gold, found)["rougeL"], part) if readable else np.nan
    return out


@provider("answer_start", gives=("answer_start",))
def answer_start(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """list[str], each right answer's first max_new_tokens tokens: what a greedy answer of that length can be compared with."""

    def start_of(s: SetPlan) -> list[str]:
        length = s.spec.max_new_tokens or plan.suite.max_new_tokens
        tokens = [plan.tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in s.answers]
        return [plan.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    return {"answer_start": context.per_set(start_of)}


@metric("python_parses", within=UNIT, source=PARSES, title="writes Python that parses", better=KNOWLEDGE)
def python_parses(generation: Sequence[str]) -> Array:
    """1 where the Python code of the generated answer parses and defines or does something, else 0.

    generation: one string per row. The code is what stands in the first fence of backticks, to the end where the fence is still open, or
    the whole answer where there is none. An answer cut by the limit of new tokens is forgiven its last, unfinished statement.
    Nothing is run. Returns (rows,) of 0.0 and 1.0.
    """
    return np.array([float(_parses(text)) for text in generation], dtype=np.float64)


def _parses(text: str) -> bool:
    fenced = _FENCE.search(text)
    lines = (fenced[1] if fenced else text).rstrip().splitlines()
    whole = fenced is not None and fenced[2] == "```"
    while lines:
        try:
            return any(not isinstance(node, ast.Expr) for node in ast.parse("\n".join(lines)).body)
        except (SyntaxError, ValueError):
            if whole:
                return False
            lines.pop()
    return False
