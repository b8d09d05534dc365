"""What a suite may say about its sets, and inputs that come from providers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import pytest
from eval_helpers import qa, tiny

from peft_unlearn import registry
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import cache, suites
from peft_unlearn.evaluation import plan as plan_module
from peft_unlearn.evaluation import provider as provider_module
from peft_unlearn.evaluation.measured import Ragged, Unmeasured
from peft_unlearn.evaluation.plan import cut_at, make_plan, measure
from peft_unlearn.evaluation.provider import Context, provider
from peft_unlearn.evaluation.score import on_one_model, score

SOURCE = registry.Source("a paper", "https://example.org", 2026)


def subject(model: Any) -> Any:
    return lambda: nullcontext(model)


def suite(sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": 1, "name": "s", "sets": sets, **more}


@pytest.fixture
def plugins() -> Iterator[None]:
    """Metrics and providers of a test are gone after it."""
    metrics, found = dict(registry._METHODS["metric"]), dict(provider_module._PROVIDERS)
    yield
    registry._METHODS["metric"].clear()
    registry._METHODS["metric"].update(metrics)
    provider_module._PROVIDERS.clear()
    provider_module._PROVIDERS.update(found)


def add(name: str, fn: Any, **about: Any) -> None:
    registry.metric(name, source=SOURCE, better={"forget": "lower"}, **about)(fn)


def test_a_provider_runs_only_where_it_is_asked_for(model: Any, tokenizer: Any, data: Any, plugins: None) -> None:
    calls: list[Any] = []

    @provider("length_of")
    def length_of(
        model: Any, plan: Any, measured: Any, context: Context, *, times: Annotated[int, registry.Range(1)] = 1
    ) -> dict[str, dict[str, Any]]:
        calls.append((context.subject, sorted(context.sets), context.base is not None))
        return {
            "length_of": {
                k: np.array([times * len(a) for a in s.answers], dtype=float) for k, s in context.sets.items()
            }
        }

    def answer_length(length_of: Any) -> Any:
        return length_of

    add("answer_length", answer_length, needs=("length_of",))
    sets = {
        "forget": {"role": "forget", "metrics": ["answer_length", "probability"]},
        "retain": {"role": "retain", "metrics": ["probability"]},
    }
    got = score({"base": subject(model), "adapter": subject(tiny(1))}, suite(sets), data, tokenizer)
    assert calls == [("base", ["forget"], True), ("adapter", ["forget"], True)]
    lengths = [len(row["answer"]) for row in data["forget"]]
    assert got.subjects["base"]["forget/answer_length"] == np.mean(lengths)
    assert got.details["base"]["forget/answer_length"]["ci95"] is not None
    doubled = score({"base": subject(model)}, suite(sets, settings={"length_of": {"times": 2}}), data, tokenizer)
    assert doubled.subjects["base"]["forget/answer_length"] == 2 * np.mean(lengths)
    calls.clear()
    score({"base": subject(model)}, suite({"retain": sets["retain"]}), data, tokenizer)
    assert not calls
    with pytest.raises(UserError, match=r"no setting 'time'. Did you mean 'times'"):
        suites.load(suite(sets, settings={"length_of": {"time": 2}}))
    with pytest.raises(UserError, match=r"times=0 is outside"):
        suites.load(suite(sets, settings={"length_of": {"times": 0}}))


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (Unmeasured("no such layer"), "no such layer"),
        (UserError("give --base"), "broken failed: give --base"),
        (ZeroDivisionError("by zero"), "broken failed: ZeroDivisionError: by zero"),
        (None, "broken returned no values for this set"),
        ({"broken": {"forget": [1.0]}}, "broken returned 1 values for 6 rows"),
        ({"broken": {"forget": Unmeasured("not this set")}}, "not this set"),
    ],
)
def test_a_failing_provider_costs_its_own_metrics_only(
    model: Any, tokenizer: Any, data: Any, plugins: None, fails: Any, reason: str
) -> None:
    @provider("broken")
    def broken(model: Any, plan: Any, measured: Any, context: Context) -> Any:
        if isinstance(fails, Exception):
            raise fails
        return fails or {}

    add("needs_it", lambda broken: np.array(broken), needs=("broken",))
    sets = {"forget": {"role": "forget", "metrics": ["needs_it", "probability", "rouge_l_recall"]}}
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report = score({"base": subject(model)}, suite(sets), data, tokenizer)
        got = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    values, details = got["subjects"]["base"], got["details"]["base"]
    assert values["forget/needs_it"] is None and details["forget/needs_it"]["reason"] == reason
    assert values["forget/probability"] is not None and values["forget/rouge_l_recall"] is not None
    # a defect is not only in the JSON
    assert any("ZeroDivision" in str(w.message) for w in heard) == isinstance(fails, ZeroDivisionError)


def test_the_base_is_at_hand_under_every_subject(tokenizer: Any, data: Any, plugins: None) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    seen: dict[str, list[Any]] = {}
    ids = torch.tensor([tokenizer("Where was")["input_ids"]])

    @provider("look")
    def look(model: Any, plan: Any, measured: Any, context: Context) -> Any:
        with torch.no_grad():
            before = model(ids).logits
            assert context.base is not None
            with context.base() as base:
                under = base(ids).logits
            seen[context.subject] = [before, under, model(ids).logits]
        return {"look": {k: np.zeros(len(s.rows)) for k, s in context.sets.items()}}

    add("looks", lambda look: look)
    subjects = on_one_model(wrapped, {"base": None, "adapter": "default"})
    score(subjects, suite({"forget": {"role": "forget", "metrics": ["looks"]}}), data, tokenizer)
    with torch.no_grad():
        base = tiny()(ids).logits
    assert torch.equal(seen["base"][0], base) and torch.equal(seen["base"][2], base)
    assert torch.equal(seen["adapter"][1], base) and not torch.equal(seen["adapter"][0], base)
    assert torch.equal(seen["adapter"][0], seen["adapter"][2])  # and is itself again afterwards


def test_prefixes_feed_other_subjects_and_the_other_set(tokenizer: Any, data: Any, plugins: None) -> None:
    heard: dict[str, Any] = {}

    def everything(
        logp: Ragged, against_logp: Ragged, reference_logp: Ragged, base_logp: Ragged, reference_against_logp: Ragged
    ) -> float:
        heard.update(
            own=logp.flat, against=against_logp.flat, reference=reference_logp.flat, base=base_logp.flat,
            both=reference_against_logp.flat,
        )  # fmt: skip
        return 1.0

    add("everything", everything)
    models = {"base": tiny(0), "retain_only": tiny(1), "adapter": tiny(2)}
    sets = {
        "forget": {"role": "forget", "metrics": ["everything"], "against": "holdout"},
        "holdout": {"role": "holdout", "metrics": []},
    }
    got = score({k: subject(m) for k, m in models.items()}, suite(sets), data, tokenizer)
    assert got.subjects["adapter"]["forget/everything"] == 1.0
    plan = make_plan(suites.load(suite(sets)), data, tokenizer)
    read = {k: measure(m, plan).forced.logp for k, m in models.items()}
    mine, theirs = plan.sets["forget"].answer, plan.sets["holdout"].answer
    np.testing.assert_array_equal(heard["own"], read["adapter"].take(mine).flat)
    np.testing.assert_array_equal(heard["against"], read["adapter"].take(theirs).flat)
    np.testing.assert_array_equal(heard["reference"], read["retain_only"].take(mine).flat)
    np.testing.assert_array_equal(heard["base"], read["base"].take(mine).flat)
    np.testing.assert_array_equal(heard["both"], read["retain_only"].take(theirs).flat)

    lone = score({"adapter": subject(models["adapter"])}, suite(sets), {"forget": data["forget"]}, tokenizer)
    assert "no holdout rows" in lone.details["adapter"]["forget/everything"]["reason"]
    sets["forget"].pop("against")
    lone = score({"adapter": subject(models["adapter"])}, suite(sets), data, tokenizer)
    assert "names no set to compare" in lone.details["adapter"]["forget/everything"]["reason"]


def test_shots_stand_before_each_prompt_with_their_answers(tokenizer: Any, data: Any) -> None:
    rows = {**data, "icl": [{"question": "One?", "answer": "1"}, {"question": "Two?", "answer": "2"}]}
    plan = make_plan(
        suites.load(suite({"forget": {"role": "forget", "metrics": ["probability"], "shots": "icl"}})), rows, tokenizer
    )
    before = "Question: One?\nAnswer: 1\n\nQuestion: Two?\nAnswer: 2\n\n"
    s = plan.sets["forget"]
    assert all(p.text.startswith(before) and p.text.endswith("\nAnswer:") for p in s.prompts)
    assert plan.pairs[s.answer[0]][1] == f" {data['forget'][0]['answer']}"
    missing = score(
        {"base": subject(tiny())},
        suite({"forget": {"role": "forget", "metrics": ["probability"], "shots": "icl"}}),
        data,
        tokenizer,
    )
    assert "no set 'icl'" in missing.details["base"]["forget/probability"]["reason"]


def test_template_and_length_and_stop_are_the_sets_own(tokenizer: Any, data: Any, monkeypatch: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    try:
        sets = {
            "forget": {"role": "forget", "metrics": ["rouge_l_recall"], "max_new_tokens": 5, "stop": ["\n\n", "Q:"]},
            "same": {"source": "forget", "role": "forget", "metrics": ["rouge_l_recall"]},
            "chat": {"source": "forget", "role": "forget", "metrics": ["rouge_l_recall"], "template": "chat", "shots": "holdout"},
        }  # fmt: skip
        plan = make_plan(suites.load(suite(sets, generation={"max_new_tokens": 7})), data, tokenizer)
    finally:
        tokenizer.chat_template = None
    first = plan.sets["chat"].prompts[0].text
    assert first.startswith(
        f"<user>{data['holdout'][0]['question']}\n<assistant>{data['holdout'][0]['answer']}\n<user>"
    )
    assert first.endswith(f"<user>{data['forget'][0]['question']}\n<assistant>")
    asked: list[tuple[str, int]] = []

    def asking(m: Any, t: Any, prompts: Any, max_new_tokens: int = 0, **kwargs: Any) -> list[str]:
        asked.extend((p, max_new_tokens) for p in prompts)
        return ["yes \n\nQuestion: no" if max_new_tokens == 5 else "all\n\nof it" for _ in prompts]

    monkeypatch.setattr(plan_module, "greedy", asking)
    monkeypatch.setattr(cache, "cacheable", lambda *_: False)
    measured = measure(tiny(), plan)
    assert len(asked) == len(set(asked)) == 6 + 6 + 6 and {n for _, n in asked} == {5, 7}
    assert {measured.answers[p] for p in plan.sets["forget"].prompts} == {"yes"}
    assert {measured.answers[p] for p in plan.sets["same"].prompts} == {"all\n\nof it"}


def test_cut_at_the_first_of_several() -> None:
    assert cut_at(" a b\n\nc Question: d", ("Question:", "\n\n")) == "a b"
    assert cut_at("a", ("x",)) == "a" and cut_at("xa", ("x",)) == ""


def test_unknown_keys_are_refused_with_the_nearest_spelling() -> None:
    bad = suite(
        {
            "forget": {
                "role": "forget", "metrics": ["probability"], "shot": "icl", "against": "holdouts", "template": "chatt",
                "max_new_tokens": 0, "stop": [""], "measurable_if": {"subject": "base", "metrics": "probability"},
            },
            "holdout": {"role": "holdout", "metrics": []},
        },
        generation={"max_tokens": 3}, setings={}, settings={"min_k": {}, "mia_min_k": {"k": 2}}, quick={"row": 3},
    )  # fmt: skip
    with pytest.raises(UserError) as e:
        suites.load(bad)
    for part in (
        "unknown key 'shot' in sets.forget. Did you mean 'shots'?", "Did you mean 'holdout'?", "Did you mean 'chat'?",
        "max_new_tokens must be a whole number from 1 on, not 0",
        "stop[0] must be text that is not empty", "Did you mean 'metric'?", "Did you mean 'max_new_tokens'?",
        "Did you mean 'settings'?", "Did you mean 'mia_min_k'?", "k=2 is outside", "Did you mean 'rows'?",
    ):  # fmt: skip
        assert part in str(e.value), part


def test_all_shipped_suites_are_read() -> None:
    for name in suites.names():
        assert suites.load(name).sets


def test_gradient_norms_are_those_of_the_merged_weights(tokenizer: Any, data: Any) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    plain = tiny()
    rows = {"forget": [qa(i, "old") for i in range(2)], "holdout": [qa(i, "nobody") for i in range(2)]}
    sets = {
        "forget": {"role": "forget", "metrics": ["mia_gradnorm"], "against": "holdout"},
        "holdout": {"role": "holdout", "metrics": []},
    }
    plan = make_plan(suites.load(suite(sets)), rows, tokenizer)
    flags = [p.requires_grad for p in plain.parameters()]
    extra = measure(plain, plan).extra["gradient_norm"]
    assert [p.requires_grad for p in plain.parameters()] == flags and set(extra) == {"forget", "holdout"}
    for s in plan.sets.values():
        for k, i in enumerate(s.answer):
            row = plan.encoded[i]
            plain.zero_grad()
            ids, labels = row["input_ids"][:-1], row["labels"][:-1]  # the appended end is no part of the answer
            plain(torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
            want = np.mean([float(p.grad.norm()) for p in plain.parameters() if p.grad is not None])
            assert extra[s.spec.name][k] == pytest.approx(want, rel=1e-4)
    plain.zero_grad()
    wrapped = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    got = measure(wrapped, plan).extra["gradient_norm"]["forget"]
    merged = wrapped.merge_and_unload()
    np.testing.assert_allclose(got, measure(merged, plan).extra["gradient_norm"]["forget"], rtol=1e-4)
    assert not np.allclose(got, extra["forget"], rtol=1e-2)
