"""From rows to work: which texts a suite needs read, each once, and what one model answers to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.collate import encode
from ..data.formats import to_text
from ..errors import UserError
from ..registry import get
from .generate import _end_ids, greedy
from .measured import Array, Ragged, Unmeasured
from .metrics.likelihood import truth_log_ratio
from .suites import EvalSet, Suite
from .teacher import Encoded, TeacherForced, pad_id_of, read_encoded

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass
class SetPlan:
    """One set's rows and where their texts stand in the list of pairs."""

    spec: EvalSet
    rows: list[dict[str, Any]]
    prompts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)  # pair of each row's answer
    chosen: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(0, dtype=np.int64)
    )  # rows with wrong answers read
    right: list[int] = field(default_factory=list)  # pair of the paraphrase, one per chosen row
    wrong: list[list[int]] = field(default_factory=list)  # pairs of the wrong answers, per chosen row
    missing: dict[str, str] = field(default_factory=dict)  # input -> why it cannot be had
    generates: bool = False

    def rows_of(self, needs: Sequence[str]) -> NDArray[np.int64]:
        """The rows that a metric with these needs is about."""
        return self.chosen if "perturbed" in needs else np.arange(len(self.rows))


@dataclass
class Plan:
    """Every (prompt, answer) of a suite exactly once, tokenized, with the sets that point into it."""

    suite: Suite
    tokenizer: Any
    sets: dict[str, SetPlan]
    pairs: list[tuple[str, str]]
    encoded: list[Encoded]


@dataclass
class Measured:
    """What one model said: its reading of every pair, and its greedy answer to every prompt that some metric asks
    for."""

    forced: TeacherForced
    mean_logp: Array  # (pairs,)
    said: dict[str, str]


def rows_of(data: Any, source: str) -> list[dict[str, Any]] | None:
    """The rows of a set by name, from a mapping or a `ForgetRetain`; None where the data has no such set."""
    if isinstance(data, Mapping):
        return data.get(source)
    # extra first: the bundle of the embedded people retains more than the suite's own retain set
    found = data.extra.get(source)
    return getattr(data, source, None) if found is None and source in ("forget", "retain", "holdout") else found


def evenly(count: int, n: int | None) -> NDArray[np.int64]:
    """(min(n, count),) indices spread evenly over range(count): rows lie person by person, so the first n are one
    person."""
    if n is None or n >= count:
        return np.arange(count)
    return (np.arange(n) * count) // n


def make_plan(suite: Suite, data: Any, tokenizer: Any, n: int | None = None, template: str | None = None) -> Plan:
    """Work out what is to be read.

    n: at most so many rows of each set, evenly spaced.   template: how question/answer rows are worded; default the
    data's own.
    Raises UserError with set and number of a row that cannot be tokenized.
    """
    if n is not None and n < 1:
        raise UserError(f"n is the number of rows of each set and must be at least 1, not {n}")
    wording: str = template or getattr(data, "template", "qa")
    index: dict[tuple[str, str], int] = {}
    sets: dict[str, SetPlan] = {}
    for name, spec in suite.sets.items():
        rows = rows_of(data, spec.source)
        plan = SetPlan(spec, [rows[i] for i in evenly(len(rows), n)] if rows else [])
        sets[name] = plan
        if not rows:
            continue
        needs = {need for m in spec.metrics for need in get("metric", m).needs}
        plan.generates = "generation" in needs
        for row in plan.rows:
            prompt, answer = to_text(row, tokenizer, wording)
            plan.prompts.append(prompt)
            plan.answers.append(str(row.get("answer", answer)).strip())
            plan.answer.append(index.setdefault((prompt, answer), len(index)))
        _note_missing(plan)
        if "perturbed" in needs and "perturbed" not in plan.missing:
            plan.chosen = evenly(len(plan.rows), spec.perturbed_rows)
            for i in plan.chosen:
                row = plan.rows[i]

                def pair(text: str, row: Mapping[str, Any] = row) -> int:
                    worded = to_text({**row, "answer": text}, tokenizer, wording)
                    return index.setdefault(worded, len(index))

                wrong = row["perturbed_answer"]
                plan.right.append(pair(row.get("paraphrased_answer") or row["answer"]))
                plan.wrong.append([pair(w) for w in ([wrong] if isinstance(wrong, str) else wrong)])
    pairs = list(index)
    return Plan(suite, tokenizer, sets, pairs, _encode(pairs, sets, tokenizer))


def _note_missing(plan: SetPlan) -> None:
    count = len(plan.rows)

    def lacking(key: str) -> int:
        return sum(not row.get(key) for row in plan.rows)

    if k := lacking("value"):
        plan.missing["value"] = f"{k} of {count} rows have no 'value'"
    if k := lacking("perturbed_answer"):
        plan.missing["perturbed"] = f"{k} of {count} rows have no 'perturbed_answer'"
    elif k := lacking("answer"):
        plan.missing["perturbed"] = f"{k} of {count} rows are not question and answer"
    if k := sum(not prompt for prompt in plan.prompts):
        plan.missing["generation"] = f"{k} of {count} rows are plain text without a prompt"


def _encode(pairs: list[tuple[str, str]], sets: Mapping[str, SetPlan], tokenizer: Any) -> list[Encoded]:
    encoded = []
    for i, (prompt, answer) in enumerate(pairs):
        try:
            encoded.append(encode(prompt, answer, tokenizer)[0])
        except UserError as problem:
            where = next(
                (f"{name} set: row {s.answer.index(i)}" for name, s in sets.items() if i in s.answer), "a wrong answer"
            )
            raise UserError(f"{where} {problem}") from None
    return encoded


# generation settings that make greedy decoding differ from taking the arg-max
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "guidance_scale": (None, 1.0),
    "stop_strings": (None,),
    "watermarking_config": (None,),
}


def _arg_max_is_greedy(model: Any) -> bool:
    config = getattr(model, "generation_config", None)
    return config is not None and all(getattr(config, k, None) in allowed for k, allowed in _NEUTRAL.items())


def _known_answers(model: Any, plan: Plan, forced: TeacherForced, wanted: Mapping[str, list[int]]) -> dict[str, str]:
    """Greedy answers that need no generation: where every token of an answer is the arg-max, greedy says that
    answer."""
    if not _arg_max_is_greedy(model):
        return {}
    ends, tokenizer, said = _end_ids(model, plan.tokenizer), plan.tokenizer, {}
    for prompt, pairs in wanted.items():
        i = next((i for i in pairs if forced.complete[i]), None)
        if i is None:
            continue
        labels, ids = plan.encoded[i]["labels"], plan.encoded[i]["input_ids"]
        start = next(k for k, label in enumerate(labels) if label != -100)
        alone = list(tokenizer(prompt)["input_ids"])
        if alone and alone[-1] in ends:
            alone = alone[:-1]
        # a tokenizer that merges across the boundary gives the prompt other tokens when it stands alone
        if alone != ids[:start] or ids[-1] not in ends:
            continue
        new = ids[start : start + plan.suite.max_new_tokens]
        cut = next((k for k, token in enumerate(new) if token in ends), len(new))
        said[prompt] = tokenizer.decode(new[:cut], skip_special_tokens=True).strip()
    return said


def measure(model: Any, plan: Plan, progress: Progress | None = None, token_budget: int = 4096) -> Measured:
    """Run one model over a plan: each pair is read once; each prompt is generated once, and only where reading
    leaves it open."""

    def tell(what: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total, report=progress: report(what, done, total)

    tokenizer = plan.tokenizer
    pad_id, eos = pad_id_of(tokenizer), tokenizer.eos_token_id
    forced = read_encoded(model, plan.encoded, pad_id, eos, token_budget, tell("reading answers"))
    wanted: dict[str, list[int]] = {}
    for s in plan.sets.values():
        if s.generates and "generation" not in s.missing:
            for prompt, i in zip(s.prompts, s.answer, strict=True):
                wanted.setdefault(prompt, []).append(i)
    said = _known_answers(model, plan, forced, wanted)
    open_prompts = [prompt for prompt in wanted if prompt not in said]
    answers = greedy(
        model, tokenizer, open_prompts, max_new_tokens=plan.suite.max_new_tokens, progress=tell("generating answers")
    )
    said.update(zip(open_prompts, answers, strict=True))
    return Measured(forced, forced.logp.mean(), said)


def feed(name: str, s: SetPlan, m: Measured, select: NDArray[np.int64], reference: Measured | None) -> Any:
    """What a metric's parameter of that name is given; Unmeasured where the rows or the subjects do not have it."""
    answer = [s.answer[i] for i in select]
    if name in ("right_logp", "wrong_logp", "log_ratio", "reference_log_ratio"):
        if "perturbed" in s.missing:
            raise Unmeasured(s.missing["perturbed"])
        if name == "reference_log_ratio":
            if reference is None:
                raise Unmeasured("there is no retain-only model to compare with")
            m = reference
        right = m.mean_logp[s.right]
        wrong = Ragged.of([m.mean_logp[w] for w in s.wrong])
        return {"right_logp": right, "wrong_logp": wrong}.get(name, truth_log_ratio(right, wrong))
    if name == "logp":
        return m.forced.logp.take(answer)
    if name == "correct":
        return m.forced.correct.take(answer)
    if name == "role":
        return s.spec.role
    key = {"generation": "generation", "value": "value"}.get(name)
    if key in s.missing:
        raise Unmeasured(s.missing[key])
    if name == "generation":
        return [m.said[s.prompts[i]] for i in select]
    if name == "value":
        return [str(s.rows[i]["value"]) for i in select]
    if name == "answer":
        return [s.answers[i] for i in select]
    raise TypeError(f"no metric can be fed {name!r}; known: {', '.join(INPUTS)}")


INPUTS = {
    "logp": "Ragged, token log-probabilities of each row's answer, EOS included",
    "correct": "Ragged, 1.0 / 0.0 arg-max right, EOS left out",
    "generation": "list[str], the greedy answers",
    "answer": "list[str], the right answers",
    "value": "list[str], what a right answer must contain",
    "right_logp": "(rows,) mean token log-probability of the paraphrased answer, or of the answer where there is none",
    "wrong_logp": "Ragged, mean token log-probabilities of each row's wrong answers",
    "log_ratio": "(rows,) log truth ratio, likelihood.truth_log_ratio",
    "reference_log_ratio": "(rows,) the same of the retain-only model",
    "role": "forget, retain or holdout",
}
