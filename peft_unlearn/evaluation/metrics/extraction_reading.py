"""What is generated beside one greedy answer: continuations of the answer's beginnings, sampled answers in several
wordings, and the base's reading of what was said."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np

from ...data.collate import encode
from ...errors import UserError, nearest
from ...registry import Range
from ..measured import Ragged, Unmeasured
from ..plan import Measured, Plan, SetPlan, arg_max_is_greedy, cut_at
from ..provider import Context, provider
from ..sampling import FORMATS, answer_ids, bare_ids, sample, worded
from ..sampling import continuations as continue_ids
from ..teacher import pad_id_of, read_encoded
from .extraction import ngram_overlap, prefixes
from .generation import words

GENERATION_BUDGET = 16_384  # tokens in a batch, prompt and answer, padding included


def _healthy(s: SetPlan, measured: Measured) -> Unmeasured | None:
    """A model whose logits are NaN gives nothing away, which would count as having forgotten."""
    bad = int(np.isnan(measured.mean_logp[s.answer]).sum())
    return Unmeasured(f"{bad} of {len(s.rows)} rows have no value: the model's logits are NaN there") if bad else None


def _tell(context: Context, what: str) -> Any:
    report = context.progress
    return None if report is None else lambda done, total: report(what, done, total)


@provider("continuations", gives=("overlap",))
def continuations(
    model: Any,
    plan: Plan,
    measured: Measured,
    context: Context,
    *,
    n: Annotated[int, Range(1)] = 10,
    prefixes_per_row: Annotated[int | None, Range(1)] = None,
) -> dict[str, dict[str, Any]]:
    """n-gram overlap of greedy continuations with the true rest, from the answer's beginnings: what EL_n averages.

    n: length of the n-grams.   prefixes_per_row: how many beginnings of each answer are continued, evenly spread; null =
    all. Where teacher forcing shows that greedy decoding gives exactly the rest, nothing is generated.
    """
    out: dict[str, Any] = {}
    told = arg_max_is_greedy(model)
    for name, s in context.sets.items():
        if wrong := _healthy(s, measured):
            out[name] = wrong
            continue
        rows = [answer_ids(*plan.pairs[i], plan.tokenizer) for i in s.answer]
        overlap = [[1.0] * len(prefixes(len(answer), n, prefixes_per_row)) for _, answer in rows]
        todo: list[tuple[int, int, int]] = []  # row, number of the prefix, its length
        for r, ((_, answer), i) in enumerate(zip(rows, s.answer, strict=True)):
            wrong_at = np.flatnonzero(measured.forced.correct[i] != 1.0)
            known = int(wrong_at[-1]) + 1 if len(wrong_at) else 0  # from here on arg-max says the rest
            for j, k in enumerate(prefixes(len(answer), n, prefixes_per_row)):
                if not told or k < known:
                    todo.append((r, j, k))
        said = continue_ids(
            model,
            plan.tokenizer,
            [rows[r][0] + rows[r][1][:k] for r, _, k in todo],
            [len(rows[r][1]) - k for r, _, k in todo],
            token_budget=GENERATION_BUDGET,
            progress=_tell(context, "continuing answers"),
        )
        for (r, j, k), ids in zip(todo, said, strict=True):
            overlap[r][j] = ngram_overlap(ids, rows[r][1][k:], n)
        out[name] = Ragged.of(overlap)
    return {"overlap": out}


@provider("samples", gives=("leaks", "leak_formats"))
def samples(
    model: Any,
    plan: Plan,
    measured: Measured,
    context: Context,
    *,
    n: Annotated[int, Range(1)] = 16,
    temperature: Annotated[float, Range(0, None, open_low=True)] = 1.0,
    formats: tuple[str, ...] = tuple(FORMATS),
    seed: int = 0,
    max_new_tokens: Annotated[int | None, Range(1)] = None,
) -> dict[str, dict[str, Any]]:
    """How many of n sampled answers name the value, for every row and prompt format: (rows, formats, 2), hits and samples.

    Samples are whole-vocabulary (no top-k, no top-p); max_new_tokens: default the set's. A format in which a row cannot
    be asked has 0 samples.
    """
    for how in formats:
        if how not in FORMATS:
            raise UserError(f"there is no prompt format {how!r}.{nearest(how, FORMATS)}")
    leaks: dict[str, Any] = {}
    for name, s in context.sets.items():
        if wrong := _healthy(s, measured) or ("value" in s.missing and Unmeasured(s.missing["value"])):
            leaks[name] = wrong
            continue
        counts = np.zeros((len(s.rows), len(formats), 2), dtype=np.int64)
        asks: list[tuple[int, int, str]] = []
        for r, (row, i) in enumerate(zip(s.rows, s.answer, strict=True)):
            prompt, answer = plan.pairs[i]
            for f, how in enumerate(formats):
                text = worded(row, how, prompt, answer, plan.tokenizer, s.template)
                if text is not None and bare_ids(text, model, plan.tokenizer):
                    asks.append((r, f, text))
        said = sample(
            model,
            plan.tokenizer,
            [text for _, _, text in asks],
            n,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_new_tokens or s.spec.max_new_tokens or plan.suite.max_new_tokens,
            token_budget=GENERATION_BUDGET,
            progress=_tell(context, "sampling answers"),
        )
        for (r, f, _), texts in zip(asks, said, strict=True):
            value = words(str(s.rows[r]["value"]))
            counts[r, f] = sum(value in words(cut_at(text, s.spec.stop)) for text in texts), n
        leaks[name] = counts
    told = {name: wrong if isinstance(wrong, Unmeasured) else [formats] * len(wrong) for name, wrong in leaks.items()}
    return {"leaks": leaks, "leak_formats": told}


@provider("base_nll", gives=("said_nll",))
def base_nll(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """(rows,) mean token NLL of this model's greedy answers under the base; NaN for an empty answer.

    The answer's text is read, not the tokens that were generated, and without EOS, since an answer may be cut at its length.
    """
    if context.base is None:
        raise Unmeasured("there is no base to read the answers")
    out: dict[str, Any] = {}
    tokenizer = plan.tokenizer
    for name, s in context.sets.items():
        if wrong := _healthy(s, measured) or ("generation" in s.missing and Unmeasured(s.missing["generation"])):
            out[name] = wrong
            continue
        read, where = [], []
        for r, ask in enumerate(s.asks):
            text = measured.said.get(ask, "")
            if words(text):
                blank = "" if plan.pairs[s.answer[r]][1][:1].strip() else " "  # as the right answer begins
                row = encode(ask.prompt, blank + text, tokenizer)[0]
                if tokenizer.eos_token_id is not None and row["input_ids"][-1] == tokenizer.eos_token_id:
                    row["labels"][-1] = -100
                if any(label != -100 for label in row["labels"]):
                    read.append(row)
                    where.append(r)
        nll = np.full(len(s.rows), np.nan)
        if read:
            with context.base() as base:
                nll[where] = -read_encoded(base, read, pad_id_of(tokenizer), None, context.token_budget).logp.mean()
        out[name] = nll
    return {"said_nll": out}


@provider("answer_start", gives=("answer_start",))
def answer_start(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """list[str], each right answer's first max_new_tokens tokens: what a greedy answer of that length can be compared with."""
    out: dict[str, Any] = {}
    for name, s in context.sets.items():
        length = s.spec.max_new_tokens or plan.suite.max_new_tokens
        tokens = [plan.tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in s.answers]
        out[name] = [plan.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return {"answer_start": out}
