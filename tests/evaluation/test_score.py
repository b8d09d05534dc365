"""`score` on tiny random models: every number against one plain forward per row, every null with its reason."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import qa, tiny

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import cache, suites
from peft_unlearn.evaluation import plan as plan_module
from peft_unlearn.evaluation.cache import cacheable
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.evaluation.plan import make_plan, measure
from peft_unlearn.evaluation.rows import evenly
from peft_unlearn.evaluation.score import Report, on_one_model, score
from peft_unlearn.evaluation.teacher import batches, teacher_forced


def subject(model: Any) -> Any:
    return lambda: nullcontext(model)


def check(report: Report) -> dict[str, Any]:
    """The JSON is valid, holds no NaN, and every null has a reason. Returns it as read back."""
    out = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(out) == {"format", "suite", "subjects", "details", "metrics", "adapter_id", "base", "versions"}
    for name, values in out["subjects"].items():
        if values is None:
            assert out["details"][name]["reason"]
            continue
        assert set(values) == set(out["details"][name])
        for key, value in values.items():
            detail = out["details"][name][key]
            assert (value is None) == (detail["reason"] is not None), (name, key, value, detail)
            assert value is None or math.isfinite(value)
            if detail["ci95"] is not None:
                assert detail["ci95"][0] <= value + 1e-12 and value <= detail["ci95"][1] + 1e-12
            assert key.rsplit("/", 1)[-1] in out["metrics"]
    return out


def literal(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[float], list[bool]]:
    """(log-probability, arg-max right) of every target, from one unbatched forward over full logits in float64."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        z = model(torch.tensor([ids])).logits[0].double()
    logp = z.log_softmax(-1)
    steps = range(start, len(ids))
    return [float(logp[t - 1, ids[t]]) for t in steps], [int(z[t - 1].argmax()) == ids[t] for t in steps]


def text(row: dict[str, Any], answer: str | None = None) -> tuple[str, str]:
    return f"Question: {row['question']}\nAnswer:", f" {answer or row['answer']}"


@pytest.mark.parametrize("budget", [1, 200, 10_000])
def test_teacher_forced_is_the_plain_forward(model: Any, tokenizer: Any, data: Any, budget: int) -> None:
    rows = [text(r) for r in data["forget"]] + [text(r, "Yes.") for r in data["retain"][:3]]
    model.train()
    got = teacher_forced(model, tokenizer, rows, token_budget=budget)
    assert model.training and all(m.training for m in model.modules())
    for i, (prompt, answer) in enumerate(rows):
        logp, right = literal(model, tokenizer, prompt, answer)
        np.testing.assert_allclose(got.logp[i], logp, atol=2e-5)
        assert got.correct[i].tolist() == [float(x) for x in right[:-1]]
        assert got.complete[i] == all(right)


def test_batches_cover_every_row_once() -> None:
    lengths = [5, 90, 3, 40, 41, 7]
    got = list(batches(lengths, 100))
    assert sorted(i for b in got for i in b) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in got)


def test_score_against_a_literal_reading(model: Any, tokenizer: Any, data: Any) -> None:
    retain_model = tiny(1)
    report = score(
        {"base": subject(model), "adapter": subject(tiny(2)), "retain_only": subject(retain_model)},
        "people",
        data,
        tokenizer,
    )
    out = check(report)
    assert out["format"] == 1 and out["suite"] == "people"
    values = out["subjects"]["base"]

    probabilities, strengths, ratios = [], [], []
    for row in data["forget"]:
        logp, right = literal(model, tokenizer, *text(row))
        probabilities.append(math.exp(sum(logp) / len(logp)))
        body = right[:-1]
        strengths.append(1 - next(k for k in range(len(body) + 1) if all(body[k:])) / len(body))
        means = [
            np.mean(literal(model, tokenizer, *text(row, a))[0])
            for a in [row["paraphrased_answer"], *row["perturbed_answer"]]
        ]
        ratio = math.exp(means[0] - np.mean(means[1:]))
        ratios.append(min(ratio, 1 / ratio))
    assert values["forget/probability"] == pytest.approx(np.mean(probabilities), rel=1e-4)
    assert values["forget/extraction_strength"] == pytest.approx(np.mean(strengths))
    assert values["forget/truth_ratio"] == pytest.approx(np.mean(ratios), rel=1e-4)
    np.testing.assert_allclose(report.per_row["base"]["forget/probability"], probabilities, rtol=1e-4)

    assert out["details"]["base"]["forget/probability"]["n"] == 6
    assert out["subjects"]["retain_only"]["forget/forget_quality"] == 1.0
    assert out["subjects"]["retain_only"]["forget/ks_distance"] == 0.0
    assert 0 <= values["forget/forget_quality"] <= 1
    assert out["metrics"]["forget_quality"]["reference"] == "retain_only"
    # texts are at hand in memory, never in the JSON
    assert report.rows["forget"] == data["forget"] and len(report.answers["base"]["forget"]) == 6
    dumped = json.dumps(report.to_dict())
    assert "born" not in dumped and not any(city in dumped for city in ("Paris", "Oslo"))


def test_each_text_is_read_once(model: Any, tokenizer: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = {**data, "forget_other": data["forget"], "holdout": data["forget"][:2]}
    plan = make_plan(suites.load("people"), doubled, tokenizer)
    assert len(plan.pairs) == len(set(plan.pairs))
    read, asked = [], []
    real_read, real_greedy = plan_module.read_encoded, plan_module.greedy

    def reading(m: Any, encoded: Any, *args: Any, **kwargs: Any) -> Any:
        read.extend(tuple(e["input_ids"]) for e in encoded)
        return real_read(m, encoded, *args, **kwargs)

    def asking(m: Any, t: Any, prompts: Any, **kwargs: Any) -> Any:
        asked.extend(prompts)
        return real_greedy(m, t, prompts, **kwargs)

    monkeypatch.setattr(plan_module, "read_encoded", reading)
    monkeypatch.setattr(plan_module, "greedy", asking)
    score({"base": subject(model)}, "people", doubled, tokenizer)
    assert len(read) == len(set(read)) == len(plan.pairs)
    assert len(asked) == len(set(asked))


def memorizing(tokenizer: Any, rows: list[dict[str, Any]], steps: int = 250) -> Any:
    """A tiny model trained until it says (most of) these answers."""
    model = tiny(3)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(3.0) if p.ndim > 1 else None
    ids = [tokenizer("".join(text(r)))["input_ids"] + [tokenizer.eos_token_id] for r in rows]
    width = max(map(len, ids))
    x = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    y = x.masked_fill(x == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, attention_mask=(x != 0).long(), labels=y).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("cached", [False, True])
def test_an_answer_known_by_heart_is_not_generated_again(
    cached: bool, tokenizer: Any, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache unknown answers are generated from their prompts; with one the model goes on from where it was read."""
    if not cached:
        monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    rows = [
        {**qa(i, "x"), "question": f"Q{i}?", "answer": f"In {city}."}
        for i, city in enumerate(["Paris", "Rome", "Oslo"])
    ]
    unseen = [{**qa(i, "y"), "question": f"R{i}!", "answer": "Nobody knows."} for i in range(3)]
    model = memorizing(tokenizer, rows)
    asked: list[str] = []

    def asking(m: Any, t: Any, prompts: Any, **kwargs: Any) -> Any:
        asked.extend(prompts)
        return greedy(m, t, prompts, **kwargs)

    monkeypatch.setattr(plan_module, "greedy", asking)
    spec = {
        "format": 1, "name": "s", "generation": {"max_new_tokens": 12},
        "sets": {k: {"role": "forget", "metrics": ["rouge_l_recall", "value_accuracy"]} for k in ("forget", "retain")},
    }  # fmt: skip
    plan = make_plan(suites.load(spec), {"forget": rows, "retain": unseen}, tokenizer)
    answers = measure(model, plan).answers
    unknown = set() if cached else {p.text for p in plan.sets["retain"].prompts}
    assert set(asked) == unknown
    monkeypatch.setattr(cache, "cacheable", lambda *_: False)  # what transformers itself generates
    assert [answers[p] for p in plan.sets["forget"].prompts] == ["In Paris.", "In Rome.", "In Oslo."]
    prompts = [p.text for p in answers]
    assert list(answers.values()) == greedy(model, tokenizer, prompts, max_new_tokens=12)
    # cut at the same length as generation
    short = make_plan(
        suites.load({**spec, "generation": {"max_new_tokens": 4}}), {"forget": rows, "retain": unseen}, tokenizer
    )
    cut = measure(model, short).answers
    assert list(cut.values()) == greedy(model, tokenizer, [p.text for p in cut], max_new_tokens=4)
    # whatever the model's own settings would do to its decoding
    asked.clear()
    bent = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 1, "suppress_tokens": tokenizer("In")["input_ids"]}
    model.generation_config.update(**bent)
    if cached:
        monkeypatch.setattr(cache, "cacheable", cacheable)
    again = measure(model, plan).answers
    monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    assert again == answers and list(again.values()) == greedy(model, tokenizer, prompts, max_new_tokens=12)
    assert set(asked) == unknown
    assert {k: getattr(model.generation_config, k) for k in bent} == bent


def test_nan_logits_are_null_with_a_reason_and_nothing_passes(tokenizer: Any, data: Any) -> None:
    broken = tiny(4)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    out = check(
        score(
            {"base": subject(tiny()), "adapter": subject(broken), "retain_only": subject(tiny(1))},
            "people",
            data,
            tokenizer,
        )
    )
    assert all(v is None for v in out["subjects"]["adapter"].values())
    assert "NaN" in out["details"]["adapter"]["forget/value_accuracy"]["reason"]
    assert out["subjects"]["base"]["forget/probability"] is not None


def test_nan_in_one_set_leaves_the_others(tokenizer: Any, data: Any) -> None:
    model = tiny(5)
    with torch.no_grad():  # "~" stands in the forget rows only
        model.model.embed_tokens.weight[tokenizer("~")["input_ids"][-1]] = math.nan
        model.lm_head.weight.data = tiny(5).lm_head.weight.data.clone()
    marked = {**data, "forget": [{**r, "question": r["question"] + "~"} for r in data["forget"]]}
    out = check(score({"base": subject(model)}, "people", marked, tokenizer))
    values = out["subjects"]["base"]
    assert values["forget/probability"] is None and values["forget/value_accuracy"] is None
    assert values["retain/probability"] is not None and values["retain/value_accuracy"] is not None
    assert values["model_utility"] is not None


def test_what_the_rows_do_not_have_is_a_reason(model: Any, tokenizer: Any) -> None:
    plain = {
        "forget": [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)],
        "retain": [{"text": f"some plain text {i}"} for i in range(3)],
    }
    out = check(score({"base": subject(model)}, "people", plain, tokenizer))
    values, details = out["subjects"]["base"], out["details"]["base"]
    assert values["forget/probability"] is not None and values["forget/rouge_l_recall"] is not None
    assert details["forget/value_accuracy"]["reason"] == "3 of 3 rows have no 'value'"
    assert "perturbed_answer" in details["forget/truth_ratio"]["reason"]
    assert "plain text" in details["retain/rouge_l_recall"]["reason"] and values["retain/probability"] is not None
    assert details["general/probability"]["reason"] == "the data has no set 'general'"
    assert "retain/rouge_l_recall" in details["model_utility"]["reason"]
    assert out["subjects"]["retain_only"] is None


def test_a_missing_retain_model_is_a_reason(model: Any, tokenizer: Any, data: Any) -> None:
    out = check(score({"base": subject(model), "retain_only": None}, "people", data, tokenizer, n=2))
    assert "no retain model" in out["details"]["base"]["forget/forget_quality"]["reason"]
    assert out["subjects"]["retain_only"] is None and out["details"]["base"]["retain/probability"]["n"] == 2
    with pytest.raises(UserError, match="no model"):
        score({"base": None}, "people", data, tokenizer)


def test_a_base_that_cannot_answer_makes_the_row_not_measurable(tokenizer: Any, data: Any) -> None:
    out = check(score({"base": subject(tiny()), "adapter": subject(tiny(1))}, "people", data, tokenizer))
    assert out["subjects"]["base"]["forget_heldout/value_accuracy"] is not None
    assert out["subjects"]["adapter"]["forget_heldout/value_accuracy"] is None
    assert out["subjects"]["adapter"]["forget_heldout/probability"] is None
    assert "not measurable: value_accuracy of base" in out["details"]["adapter"]["forget_heldout/probability"]["reason"]
    assert out["subjects"]["adapter"]["forget_other/value_accuracy"] is not None
    alone = check(score({"adapter": subject(tiny(1))}, "people", data, tokenizer))
    assert "base was not evaluated" in alone["details"]["adapter"]["forget_heldout/value_accuracy"]["reason"]
    # a base that does know them lets the row count
    knowing = memorizing(
        tokenizer,
        (rows := [{**r, "question": f"Q{i}?", "answer": r["value"]} for i, r in enumerate(data["forget"][:4])]),
    )
    kept = check(
        score(
            {"base": subject(knowing), "adapter": subject(tiny(1))},
            "people",
            {**data, "forget_heldout": rows},
            tokenizer,
        )
    )
    assert kept["subjects"]["base"]["forget_heldout/value_accuracy"] >= 0.5
    assert kept["subjects"]["adapter"]["forget_heldout/value_accuracy"] is not None


def test_order_of_rows_does_not_matter(model: Any, tokenizer: Any, data: Any) -> None:
    turned = {name: rows[::-1] for name, rows in data.items()}
    subjects = {"base": subject(model), "retain_only": subject(tiny(1))}
    a, b = (score(subjects, "people", d, tokenizer).subjects["base"] for d in (data, turned))
    assert set(a) == set(b)
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_evenly_spreads() -> None:
    assert evenly(10, 3).tolist() == [0, 3, 6]
    assert evenly(3, 10).tolist() == [0, 1, 2] and evenly(4, None).tolist() == [0, 1, 2, 3]
    assert len(set(evenly(900, 300).tolist())) == 300


def test_perturbed_rows_limits_only_what_reads_wrong_answers(model: Any, tokenizer: Any, data: Any) -> None:
    spec = {
        "format": 1, "name": "s",
        "sets": {"retain": {"role": "retain", "metrics": ["probability", "truth_ratio", "probability_among_choices"], "perturbed_rows": 3}},
    }  # fmt: skip
    details = check(score({"base": subject(model)}, spec, data, tokenizer))["details"]["base"]
    assert [details[f"retain/{m}"]["n"] for m in ("probability", "truth_ratio", "probability_among_choices")] == [
        8,
        3,
        3,
    ]


def test_adapters_of_one_model_are_swapped_in_place(tokenizer: Any, data: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="one")
    torch.manual_seed(9)
    model.add_adapter("two", config)
    trainable = [p.requires_grad for p in model.parameters()]
    subjects = on_one_model(model, {"base": None, "adapter:one": "one", "adapter:two": "two", "both": ["one", "two"]})
    out = check(score(subjects, "people", data, tokenizer))
    assert model.active_adapters == ["one"] and [p.requires_grad for p in model.parameters()] == trainable
    key = "retain/probability"
    got = [out["subjects"][s][key] for s in ("base", "adapter:one", "adapter:two", "both")]
    assert len(set(got)) == 4
    assert got[0] == pytest.approx(
        score({"base": subject(tiny())}, "people", data, tokenizer).subjects["base"][key], rel=1e-5
    )


def test_subjects_are_left_also_when_evaluation_fails(model: Any, tokenizer: Any, data: Any) -> None:
    left = []

    @contextmanager
    def broken() -> Any:
        try:
            yield object()
        finally:
            left.append(True)

    with pytest.raises(AttributeError):
        score({"base": broken}, "people", data, tokenizer)
    assert left == [True]


def test_progress_and_bundle(model: Any, tokenizer: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_unlearn.data.bundle import ForgetRetain

    extra = {k: v for k, v in data.items() if k not in ("forget", "holdout")}
    bundle = ForgetRetain(data["forget"], data["retain"] + data["general"], data["holdout"], extra=extra)
    seen: list[tuple[str, int, int]] = []
    got = score({"base": subject(model)}, "people", bundle, tokenizer, progress=lambda *a: seen.append(a))
    assert got.details["base"]["retain/probability"]["n"] == 8  # the suite's retain set, not what is trained on
    assert got.subjects["base"] == score({"base": subject(model)}, "people", data, tokenizer).subjects["base"]
    whats = {what for what, _, _ in seen}
    assert whats == {"base: reading answers"}
    monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    score({"base": subject(model)}, "people", bundle, tokenizer, progress=lambda *a: seen.append(a))
    assert {what for what, _, _ in seen} == {"base: reading answers", "base: generating answers"}
    assert all(0 < done <= total for _, done, total in seen)


def test_a_malformed_suite_says_everything_at_once() -> None:
    with pytest.raises(UserError) as e:
        suites.load(
            {
                "format": 2,
                "setz": {},
                "sets": {"a": {"role": "enemy", "metrics": ["probabilty"]}},
                "whole": {"model_utility": ["b/x"]},
            }
        )
    for part in ("format must be 1", "'setz'", "not 'enemy'", "Did you mean 'probability'?", "'b/x'"):
        assert part in str(e.value)
    with pytest.raises(UserError, match="Did you mean 'people'"):
        suites.load("peeple")
    assert "people" in suites.names()
