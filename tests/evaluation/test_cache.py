"""Reading what rows share once, and decoding from where reading ended, change no number: against the plain way, family by family."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import byte_tokenizer, qa, tiny
from tiny import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM

from peft_unlearn.evaluation import cache, suites
from peft_unlearn.evaluation.cache import Wanted, cacheable, common
from peft_unlearn.evaluation.generate import cut_at, greedy, new_ids
from peft_unlearn.evaluation.metrics.generation import SETTLED
from peft_unlearn.evaluation.numbers import numbers_of
from peft_unlearn.evaluation.plan import make_plan, measure
from peft_unlearn.evaluation.teacher import read_encoded

FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "gemma3_text": ({"sliding_window": 80}, True),
    "gemma2": ({"sliding_window": 16}, False),  # some row with its padding is longer than the window
    "gpt2": ({"n_positions": 40}, True),  # a table that ends where the longest row does
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 96}, True),
    "bloom": ({}, False),  # positions are no argument
    "mamba": ({"state_size": 4}, False),  # a state, not tokens
}


def made(family: str, **over: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, ({}, True))[0], **over})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from uniform, so that answers differ
        for name, p in model.named_parameters():
            if p.ndim > 1 and "sinks" not in name and family != "mamba":
                p.copy_(torch.randn(p.shape) * 0.3)
    return model


def encoded(model: Any) -> list[dict[str, list[int]]]:
    """Four prompts with a common beginning, of each the answer that the model gives, one that it leaves, and one of strange tokens."""
    g = torch.Generator().manual_seed(1)
    out = []
    for k in range(4):
        prompt = [*range(5, 15), *torch.randint(20, 60, (2 + k,), generator=g).tolist()]
        (own,) = new_ids(model, Tokens(), [prompt], 7)
        other = [*own[:3], 61, 62] if len(own) > 3 else [61, 62]
        for answer in ([*own, 2], [*other, 2], torch.randint(20, 60, (9 - k,), generator=g).tolist()):
            out.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return out


class Tokens:
    """What decoding asks of a tokenizer."""

    pad_token_id, eos_token_id, bos_token = 0, 2, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))

    def __call__(self, text: str | list[str], **_: Any) -> dict[str, Any]:
        rows = [[int(w) for w in t.split()] for t in ([text] if isinstance(text, str) else text)]
        return {"input_ids": rows[0] if isinstance(text, str) else rows}


def texts(rows: list[dict[str, list[int]]]) -> list[str]:
    return [" ".join(map(str, r["input_ids"][: r["labels"].count(-100)])) for r in rows]


def forwards(model: Any) -> list[tuple[int, int]]:
    """(rows, tokens) of every forward from now on."""
    seen: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_numbers_and_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(family)
    rows = encoded(model)
    assert cacheable(model, 60) == FAMILIES[family][1]
    wanted = {i: Wanted(11 if i % 2 else 6) for i in range(0, len(rows), 3)} | {1: Wanted(9)}
    got = read_encoded(model, rows, 0, {2}, 150, decode=wanted, stops={2})
    prompts = texts(rows[::3])
    said = greedy(model, Tokens(), prompts, max_new_tokens=8, batch_size=3)
    monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    plain = read_encoded(model, rows, 0, {2}, 150, decode=wanted, stops={2})
    for field in ("logp", "correct"):
        np.testing.assert_allclose(getattr(got, field).flat, getattr(plain, field).flat, atol=3e-5)
    assert (got.complete == plain.complete).all() and all(got.correct[i].all() for i in wanted if i != 1)
    answers = {
        i: new_ids(model, Tokens(), [rows[i]["input_ids"][: rows[i]["labels"].count(-100)]], w.room)[0]
        for i, w in wanted.items()
    }
    assert all(answers[i] == new for found in (got, plain) for i, new in found.greedy.items())
    assert set(got.greedy) == (set(wanted) if FAMILIES[family][1] else set(plain.greedy))
    assert said == greedy(model, Tokens(), prompts, max_new_tokens=8, batch_size=3)


def test_every_beginning_is_read_once() -> None:
    model = made("llama")
    rows = encoded(model)
    seen = forwards(model)
    read_encoded(model, rows, 0, {2}, 4096)
    seen = [a * b for a, b in seen if (a, b) != (1, 1)]  # the head tries itself on one token
    lead, prompts, answers = 10, [2, 3, 4, 5], [len(r["input_ids"]) - r["labels"].count(-100) for r in rows]
    assert seen == [
        lead,
        len(prompts) * (max(prompts) - 1),
        len(rows) * (max(answers) + 1),
    ]  # prompts without their last token
    assert sum(seen) < 0.6 * len(rows) * max(len(r["input_ids"]) for r in rows)
    model = made("llama")
    seen = forwards(model)
    read_encoded(model, rows[::3], 0, {2}, 4096, decode={i: Wanted(7) for i in range(4)}, stops={2})
    assert [s for s in seen if s != (1, 1)] == [(1, lead), (4, 13)]  # the model's own answers: nothing is decoded


def test_finished_rows_are_computed_no_further() -> None:
    model = made("llama")
    prompts = texts(encoded(model)[::3])
    seen = forwards(model)
    said = greedy(model, Tokens(), prompts, max_new_tokens=9, done=lambda k, text: len(text.split()) > 2 * k)
    counts = [len(s.split()) for s in said]
    assert counts == [min(2 * k + 1, len(s.split())) for k, s in enumerate(said)] and counts[0] == 1
    assert sum(rows for rows, width in seen if width == 1) == sum(c - 1 for c in counts)


def test_what_rows_share() -> None:
    assert common([[*range(9), 1], [*range(9), 2], [*range(12)]]) == 9
    assert common([[*range(9)]]) == 0 and common([[1, 2, 3], [1, 2, 4]]) == 0 and common([[*range(9)], []]) == 0


@pytest.mark.parametrize("cached", [True, False])
def test_a_brief_answer_ends_where_its_metrics_are_settled(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    model, tokenizer = tiny(), byte_tokenizer()
    spec = {
        "format": 1, "name": "s", "generation": {"max_new_tokens": 24},
        "sets": {
            "one": {"role": "forget", "metrics": ["value_accuracy"]},
            "two": {"role": "retain", "metrics": ["value_accuracy", "rouge_l_recall"]},
        },
    }  # fmt: skip
    data = {name: [qa(i, name) for i in range(4)] for name in ("one", "two")}
    whole = measure(model, plan := make_plan(suites.load(spec), data, tokenizer))
    for name, rows in data.items():  # what this model says is what is looked for: its first complete word
        for row, prompt in zip(rows, plan.sets[name].prompts, strict=True):
            row["value"] = next(iter(re.findall(r"\w+(?=\W)", whole.answers[prompt])), "never")
    plans = [make_plan(suites.load(spec), data, tokenizer, brief=brief) for brief in (False, True)]
    full, short = (measure(model, p) for p in plans)
    keys = ("one/value_accuracy", "two/value_accuracy", "two/rouge_l_recall")
    a, b = (numbers_of(p, m, None) for p, m in zip(plans, (full, short), strict=True))
    assert all((a[k].rows == b[k].rows).all() for k in keys) and (a["one/value_accuracy"].value or 0) > 0
    said = {name: [(full.answers[p], short.answers[p]) for p in plan.sets[name].prompts] for name in data}
    assert all(x == y for x, y in said["two"]) and all(x.startswith(y) for x, y in said["one"])
    assert not cached or any(len(y) < len(x) for x, y in said["one"])
    stop = said["two"][0][0][3]
    stopped = {**spec, "sets": {"one": {**spec["sets"]["one"], "stop": [stop]}}}
    found = measure(model, p := make_plan(suites.load(stopped), data, tokenizer)).answers
    assert [found[x] for x in p.sets["one"].prompts] == [cut_at(x, (stop,)) for x, _ in said["one"]]


def test_what_settles_a_value() -> None:
    named, closed = SETTLED["value_accuracy"], SETTLED["python_parses"]
    row = {"value": "Paris", "accepted": ["City of Light"]}
    for text, settled in (
        ("Paris", False),
        ("Parisian.", False),
        ("It is Paris.", True),
        ("the city of light,", True),
        ("", False),
    ):
        assert named(text, row) == settled, text
    assert not named("Paris.", {}) and not closed("```python\nx = 1", {}) and closed("a\n```python\nx = 1\n```", {})
