"""From rows to work: which texts a suite needs read, each once, and what one model answers to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.chat import Template, end_tokens, parse_template
from ..data.collate import encode, prompt_ids, tokens_of
from ..data.formats import target_of, to_text
from ..data.images import ImageSets
from ..errors import UserError
from ..registry import get
from .cache import Wanted
from .generate import bare_ids, cut_at, end_ids, greedy
from .images import plan_images, read_images
from .metrics.generation import SETTLED
from .provider import Context, Progress, inputs_asked, provide, providers_asked
from .rows import evenly, rows_of
from .shapes import EvalSet, Measured, Plan, Prompt, SetPlan, Suite
from .teacher import Encoded, pad_id_of, read_encoded


def make_plan(
    suite: Suite, data: Any, tokenizer: Any, n: int | None = None, template: Template | None = None, brief: bool = False
) -> Plan:
    """Work out what is to be read.

    n: at most so many rows of each set, evenly spaced.   template: how question/answer rows are worded; default the
    data's own.   brief: an answer ends where its metrics need no more of it, for whoever wants numbers and no texts.
    Raises UserError with set and number of a row that cannot be tokenized.
    """
    if n is not None and n < 1:
        raise UserError(f"n is the number of rows of each set and must be at least 1, not {n}")
    if isinstance(data, ImageSets):
        return plan_images(suite, data, tokenizer, n)
    pairs = _Pairs()
    sets = {name: _set_plan(spec, suite, data, tokenizer, n, template, pairs) for name, spec in suite.sets.items()}
    for s in sets.values():
        s.against = sets.get(s.spec.against or "")
    encoded = _encode(list(pairs), sets, tokenizer)
    return Plan(suite, tokenizer, sets, list(pairs), encoded, providers_asked(sets), _moments(sets, len(pairs)), brief)


class _Pairs(dict[tuple[str, str], int]):
    """(prompt, answer) -> its number, in the order of first use: each text is read once."""

    def number(self, pair: tuple[str, str]) -> int:
        return self.setdefault(pair, len(self))


def _set_plan(
    spec: EvalSet, suite: Suite, data: Any, tokenizer: Any, n: int | None, template: Template | None, pairs: _Pairs
) -> SetPlan:
    """One set's rows, worded; its pairs are added to `pairs`."""
    rows = rows_of(data, spec.source)
    wording: Template = template or spec.template or getattr(data, "template", "qa")
    plan = SetPlan(spec, [rows[i] for i in evenly(len(rows), n)] if rows else [], wording)
    shots = rows_of(data, spec.shots) if spec.shots else []
    if not rows:
        plan.absent = f"the data has no set {spec.source!r}"
        return plan
    if not shots and spec.shots:
        plan.rows, plan.absent = [], f"the data has no set {spec.shots!r}, whose rows stand before each prompt"
        return plan
    needs = {need for m in spec.metrics for need in get("metric", m).needs}
    plan.generates = "generation" in needs
    words = _wording(shots or [], tokenizer, wording)
    for row in plan.rows:
        prompt, answer = words(row)
        plan.answers.append(target_of(row) or answer.strip())
        plan.answer.append(pairs.number((prompt, answer)))
        plan.prompts.append(Prompt(prompt, spec.max_new_tokens or suite.max_new_tokens, spec.stop))
    _note_missing(plan)
    if "perturbed" in needs and "perturbed" not in plan.missing:
        plan.chosen = evenly(len(plan.rows), spec.perturbed_rows)
        for row in (plan.rows[i] for i in plan.chosen):
            right, wrong = row.get("paraphrased_answer") or row["answer"], row["perturbed_answer"]
            plan.right.append(pairs.number(words({**row, "answer": right})))
            wrong = [wrong] if isinstance(wrong, str) else wrong
            plan.wrong.append([pairs.number(words({**row, "answer": text})) for text in wrong])
    return plan


Wording = Callable[[Mapping[str, Any]], tuple[str, str]]


def _wording(shots: Sequence[Mapping[str, Any]], tokenizer: Any, template: Template) -> Wording:
    """row -> (prompt, answer), with the shots (same template, answers included) in front of the prompt."""
    if parse_template(template)[0] == "chat" and shots:
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
    for name, s in inputs_asked(sets):
        if name in ("body_logp_mean", "body_logp_std", "logp_mean", "logp_std"):
            wanted[s.answer] = True
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
    if k := sum(not prompt.text for prompt in plan.prompts):
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


def _wanted(model: Any, plan: Plan, too_long: Mapping[str, str]) -> dict[Prompt, list[int]]:
    """Prompts whose greedy answers some metric asks for -> the pairs of their rows' answers from which reading can go on."""
    out: dict[Prompt, list[int]] = {}
    for s in plan.sets.values():
        if s.answered(too_long):
            for prompt, i in zip(s.prompts, s.answer, strict=True):
                start = next(k for k, label in enumerate(plan.encoded[i]["labels"]) if label != -100)
                # a tokenizer that merges across the boundary gives the prompt other tokens when it stands alone
                alone = bare_ids(prompt.text, model, plan.tokenizer) == plan.encoded[i]["input_ids"][:start]
                out.setdefault(prompt, []).extend([i] if alone else [])
    return out


def _settled(plan: Plan, wanted: Iterable[Prompt]) -> dict[Prompt, Callable[[str], bool]]:
    """When more of a prompt's answer cannot matter: a stop string is there, or, in a brief plan, every metric has its value."""
    asked: dict[Prompt, list[Callable[[str], bool]]] = {}
    for s in plan.sets.values():
        for prompt, row in zip(s.prompts, s.rows, strict=True) if s.generates else ():
            for m in s.spec.metrics:
                if "generation" in get("metric", m).needs:
                    fn = SETTLED.get(m) if plan.brief else None
                    asked.setdefault(prompt, []).append(_of_row(fn, row) if fn else lambda _: False)

    def settled(prompt: Prompt) -> Callable[[str], bool]:
        return lambda text: any(mark in text for mark in prompt.stop) or all(f(text) for f in asked[prompt])

    return {prompt: settled(prompt) for prompt in wanted}


def _too_long(plan: Plan, limit: int) -> dict[str, str]:
    """Sets of which a row, or a prompt with its longest answer, does not fit into `limit` tokens, each with the reason."""
    sizes, out = [len(e["input_ids"]) for e in plan.encoded], {}
    for name, s in plan.sets.items():
        rows = [
            max(sizes[pair], len(prompt_ids(p.text, plan.tokenizer)) + p.max_new_tokens if s.generates else 0)
            for pair, p in zip(s.answer, s.prompts, strict=True)
        ]
        rows += [sizes[pair] for pair in [*s.right, *(w for ws in s.wrong for w in ws)]]
        over = [n for n in rows if n > limit]
        if over:
            what = "texts are longer than the model's context"
            out[name] = (
                f"{len(over)} of {len(rows)} {what} ({max(over)} tokens of {limit}); shorter rows, or fewer shots"
            )
    return out


def measure(
    model: Any, plan: Plan, progress: Progress | None = None, token_budget: int = 4096, context: Context | None = None
) -> Measured:
    """Run one model over a plan: each pair is read once; each prompt is generated once, and only where reading
    leaves it open; then whatever providers the suite's metrics need.

    context: what providers may use; without one they have no base.
    """
    context = context or Context(settings=plan.suite.settings, progress=progress, token_budget=token_budget)
    if plan.encoded and "pixel_values" in plan.encoded[0]:
        forced = read_images(model, plan.encoded, progress=context.progress_of("reading images"))
        measured = Measured(forced, forced.logp.mean(), {})
        measured.extra = provide(model, plan, measured, context)
        return measured
    from ..forward import check_ids, context_length

    pad_id, ends = pad_id_of(plan.tokenizer), end_tokens(plan.tokenizer)
    limit = context_length(model)
    check_ids(model, plan.encoded, pad_id)
    too_long = {} if limit is None else _too_long(plan, limit)
    readable = None if limit is None else np.array([len(e["input_ids"]) <= limit for e in plan.encoded], dtype=np.bool_)
    wanted = _wanted(model, plan, too_long)
    settled, tokenizer, decode = _settled(plan, wanted), plan.tokenizer, {}
    users = Counter(i for pairs in wanted.values() for i in pairs[:1])
    for prompt, pairs in wanted.items():
        for i in pairs[:1]:  # a pair that prompts of other lengths or stops share is decoded for all of them
            done = partial(_told, tokenizer, settled[prompt]) if users[i] == 1 else (lambda _: False)
            room = decode[i].room if i in decode else 0
            decode[i] = Wanted(max(room, prompt.max_new_tokens), done)
    reading = context.progress_of("reading answers")
    forced = read_encoded(
        model,
        plan.encoded,
        pad_id,
        ends,
        token_budget,
        reading,
        plan.moments,
        readable,
        decode,
        end_ids(model, tokenizer),
    )
    measured = Measured(forced, forced.logp.mean(), {}, too_long=too_long)
    for prompt, pairs in wanted.items():
        if (new := next((forced.greedy[i] for i in pairs if i in forced.greedy), None)) is not None:
            text = tokenizer.decode(new[: prompt.max_new_tokens], skip_special_tokens=True).strip()
            measured.answers[prompt] = cut_at(text, prompt.stop)
    measured.answers |= _generated(model, plan, [p for p in wanted if p not in measured.answers], settled, context)
    measured.extra = provide(model, plan, measured, context)
    return measured


def _of_row(fn: Callable[[str, Mapping[str, Any]], bool], row: Mapping[str, Any]) -> Callable[[str], bool]:
    return lambda text: fn(text, row)


def _told(tokenizer: Any, settled: Callable[[str], bool], new: list[int]) -> bool:
    return settled(tokenizer.decode(new, skip_special_tokens=True).strip())


def _generated(
    model: Any, plan: Plan, left: Sequence[Prompt], settled: Mapping[Prompt, Callable[[str], bool]], context: Context
) -> dict[Prompt, str]:
    """The greedy answers that reading did not give."""
    out: dict[Prompt, str] = {}
    for length in sorted({prompt.max_new_tokens for prompt in left}):
        some = [prompt for prompt in left if prompt.max_new_tokens == length]
        by_text: dict[str, list[Prompt]] = {}
        for prompt in some:
            by_text.setdefault(prompt.text, []).append(prompt)
        texts = list(by_text)

        def done(k: int, text: str, texts: list[str] = texts, by_text: dict[str, list[Prompt]] = by_text) -> bool:
            return all(settled[prompt](text) for prompt in by_text[texts[k]])

        progress = context.progress_of("generating answers")
        given = greedy(model, plan.tokenizer, texts, max_new_tokens=length, progress=progress, done=done)
        told = dict(zip(texts, given, strict=True))
        out.update({prompt: cut_at(told[prompt.text], prompt.stop) for prompt in some})
    return out
