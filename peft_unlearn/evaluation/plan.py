"""From rows to work: which texts a suite needs read, each once, and what one model answers to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.collate import encode, prompt_ids, tokens_of
from ..data.formats import to_text
from ..errors import UserError
from ..registry import get
from .feed import INPUTS as INPUTS
from .feed import feed as feed
from .generate import end_ids, greedy
from .provider import Context, Progress, asked_of, inputs_of, provide, stripped
from .shapes import Ask as Ask
from .shapes import Measured as Measured
from .shapes import Plan as Plan
from .shapes import SetPlan as SetPlan
from .shapes import Suite as Suite
from .teacher import Encoded, TeacherForced, pad_id_of, read_encoded


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
    index: dict[tuple[str, str], int] = {}
    sets: dict[str, SetPlan] = {}
    for name, spec in suite.sets.items():
        rows = rows_of(data, spec.source)
        wording: str = template or spec.template or getattr(data, "template", "qa")
        plan = SetPlan(spec, [rows[i] for i in evenly(len(rows), n)] if rows else [], template=wording)
        sets[name] = plan
        if not rows:
            plan.absent = f"the data has no set {spec.source!r}"
            continue
        shots = rows_of(data, spec.shots) if spec.shots else []
        if not shots and spec.shots:
            plan.rows, plan.absent = [], f"the data has no set {spec.shots!r}, whose rows stand before each prompt"
            continue
        needs = {need for m in spec.metrics for need in get("metric", m).needs}
        plan.generates = "generation" in needs
        words = _wording(shots or [], tokenizer, wording)
        length = spec.max_new_tokens or suite.max_new_tokens
        for row in plan.rows:
            prompt, answer = words(row)
            plan.prompts.append(prompt)
            plan.answers.append(str(row.get("answer", answer)).strip())
            plan.answer.append(index.setdefault((prompt, answer), len(index)))
            plan.asks.append(Ask(prompt, length, spec.stop))
        _note_missing(plan)
        if "perturbed" in needs and "perturbed" not in plan.missing:
            plan.chosen = evenly(len(plan.rows), spec.perturbed_rows)
            for i in plan.chosen:
                row = plan.rows[i]

                def pair(text: str, row: Mapping[str, Any] = row, words: Wording = words) -> int:
                    return index.setdefault(words({**row, "answer": text}), len(index))

                wrong = row["perturbed_answer"]
                plan.right.append(pair(row.get("paraphrased_answer") or row["answer"]))
                plan.wrong.append([pair(w) for w in ([wrong] if isinstance(wrong, str) else wrong)])
    for s in sets.values():
        s.against = sets.get(s.spec.against or "")
    pairs = list(index)
    providers = asked_of(sets, lambda m: get("metric", m))
    return Plan(suite, tokenizer, sets, pairs, _encode(pairs, sets, tokenizer), providers, _moments(sets, len(pairs)))


Wording = Callable[[Mapping[str, Any]], tuple[str, str]]


def _wording(shots: Sequence[Mapping[str, Any]], tokenizer: Any, template: str) -> Wording:
    """row -> (prompt, answer), with the shots (same template, answers included) in front of the prompt."""
    if template == "chat" and shots:
        turns = [m for shot in shots for m in _turns(shot)]
        return lambda row: to_text({"messages": [*turns, *_turns(row)]}, tokenizer, template)
    before = "".join(f"{''.join(to_text(shot, tokenizer, template))}\n\n" for shot in shots)

    def words(row: Mapping[str, Any]) -> tuple[str, str]:
        prompt, answer = to_text(row, tokenizer, template)
        return before + prompt, answer

    return words


def _turns(row: Mapping[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"])
    user, assistant = (row[k] for k in ("question", "answer")) if "question" in row else to_text(row)
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _moments(sets: Mapping[str, SetPlan], count: int) -> NDArray[np.bool_]:
    """Pairs of which some metric wants more than the log-probability: another pass over the logits, so only there."""
    wanted = np.zeros(count, dtype=np.bool_)
    for s in sets.values():
        for metric in s.spec.metrics:
            for bare, against in map(stripped, inputs_of(get("metric", metric))):
                where = s.against if against else s
                if bare in ("logp_mean", "logp_std") and where is not None:
                    wanted[where.answer] = True
    return wanted


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
    tokens = tokens_of(pairs, tokenizer) if pairs else None
    for i, (prompt, answer) in enumerate(pairs):
        try:
            encoded.append(encode(prompt, answer, tokenizer, tokens=None if tokens is None else tokens[i])[0])
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


def arg_max_is_greedy(model: Any) -> bool:
    config = getattr(model, "generation_config", None)
    return config is not None and all(getattr(config, k, None) in allowed for k, allowed in _NEUTRAL.items())


def _known_answers(model: Any, plan: Plan, forced: TeacherForced, wanted: Mapping[Ask, list[int]]) -> dict[Ask, str]:
    """Greedy answers that need no generation: where every token of an answer is the arg-max, greedy says that
    answer."""
    if not arg_max_is_greedy(model):
        return {}
    ends, tokenizer, said = end_ids(model, plan.tokenizer), plan.tokenizer, {}
    for ask, pairs in wanted.items():
        i = next((i for i in pairs if forced.complete[i]), None)
        if i is None:
            continue
        labels, ids = plan.encoded[i]["labels"], plan.encoded[i]["input_ids"]
        start = next(k for k, label in enumerate(labels) if label != -100)
        alone = prompt_ids(ask.prompt, tokenizer)
        if alone and alone[-1] in ends:
            alone = alone[:-1]
        # a tokenizer that merges across the boundary gives the prompt other tokens when it stands alone
        if alone != ids[:start] or ids[-1] not in ends:
            continue
        new = ids[start : start + ask.max_new_tokens]
        cut = next((k for k, token in enumerate(new) if token in ends), len(new))
        said[ask] = cut_at(tokenizer.decode(new[:cut], skip_special_tokens=True), ask.stop)
    return said


def context_length(model: Any) -> int | None:
    """How many positions a model has a learned table for; None where positions are computed (rotary and their kin read on, if
    badly, beyond what they were made for)."""
    import torch

    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words]
    return limit if any(t.num_embeddings in (limit, limit + 2) for t in tables) else None  # OPT's begins at 2


def _too_long(plan: Plan, limit: int) -> dict[str, str]:
    """Sets of which a row, or a prompt with its longest answer, does not fit into `limit` tokens, each with the reason."""
    sizes, out = [len(e["input_ids"]) for e in plan.encoded], {}
    for name, s in plan.sets.items():
        rows = [
            max(sizes[pair], len(prompt_ids(ask.prompt, plan.tokenizer)) + ask.max_new_tokens if s.generates else 0)
            for pair, ask in zip(s.answer, s.asks, strict=True)
        ]
        rows += [sizes[pair] for pair in [*s.right, *(w for ws in s.wrong for w in ws)]]
        over = [n for n in rows if n > limit]
        if over:
            what = "texts are longer than the model's context"
            out[name] = (
                f"{len(over)} of {len(rows)} {what} ({max(over)} tokens of {limit}); shorter rows, or fewer shots"
            )
    return out


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings, without blanks around it; blanks before a stop string count."""
    ends = [k for mark in stop if (k := text.find(mark)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def measure(
    model: Any, plan: Plan, progress: Progress | None = None, token_budget: int = 4096, context: Context | None = None
) -> Measured:
    """Run one model over a plan: each pair is read once; each prompt is generated once, and only where reading
    leaves it open; then whatever providers the suite's metrics need.

    context: what providers may use; without one they have no base.
    """

    def tell(what: str) -> Callable[[int, int], None] | None:
        if progress is None:
            return None
        return lambda done, total, report=progress: report(what, done, total)

    tokenizer = plan.tokenizer
    pad_id, eos = pad_id_of(tokenizer), tokenizer.eos_token_id
    limit = context_length(model)
    too_long = {} if limit is None else _too_long(plan, limit)
    readable = None if limit is None else np.array([len(e["input_ids"]) <= limit for e in plan.encoded], dtype=np.bool_)
    forced = read_encoded(
        model, plan.encoded, pad_id, eos, token_budget, tell("reading answers"), plan.moments, readable
    )
    wanted: dict[Ask, list[int]] = {}
    for name, s in plan.sets.items():
        if s.generates and "generation" not in s.missing and name not in too_long:
            for ask, i in zip(s.asks, s.answer, strict=True):
                wanted.setdefault(ask, []).append(i)
    said = _known_answers(model, plan, forced, wanted)
    lengths = sorted({ask.max_new_tokens for ask in wanted if ask not in said})
    for length in lengths:
        left = [ask for ask in wanted if ask not in said and ask.max_new_tokens == length]
        prompts = list(dict.fromkeys(ask.prompt for ask in left))
        answers = greedy(model, tokenizer, prompts, max_new_tokens=length, progress=tell("generating answers"))
        by_prompt = dict(zip(prompts, answers, strict=True))
        said.update({ask: cut_at(by_prompt[ask.prompt], ask.stop) for ask in left})
    measured = Measured(forced, forced.logp.mean(), said, too_long=too_long)
    if plan.providers:
        about = context or Context(settings=plan.suite.settings, progress=progress, token_budget=token_budget)
        measured.extra = provide(model, plan, measured, about)
    return measured
