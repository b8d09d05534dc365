"""Jailbreak prompts: what they keep, what they never show, and what counts as a leak."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from eval_helpers import qa
from test_attack_weights import lora

from peft_unlearn.attacks import jailbreak as module
from peft_unlearn.attacks.case import Case
from peft_unlearn.attacks.jailbreak import jailbreak, stub, templates, tries
from peft_unlearn.attacks.prompt_slot import PromptSlot
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.measured import Unmeasured
from peft_unlearn.evaluation.metrics.generation import words

QA = "Question: {}\nAnswer:"


@pytest.fixture(scope="module")
def people(tokenizer: Any) -> Case:
    data = ForgetRetain.load("embedded:people")
    return Case("adapter", tokenizer, data, data.forget[::7], [], nullcontext)  # type: ignore[arg-type]


def of(case: Case, *names: str, k: int = 3, **limit: int) -> list[Any]:
    """The tries of some templates alone, without reworded questions."""
    made = tries(case, [t for t in templates() if t.name in names], k, **limit)
    return [t for t in made if t.template in names]


def test_every_template_is_tried_on_every_row_of_the_people(people):
    made = tries(people, templates(), 3)
    found = {(t.template, t.row) for t in made}
    names = [t.name for t in templates()] + ["forget_other", "forget_heldout"]
    assert found == {(name, i) for name in names for i in range(len(people.rows))} and len(made) == len(found)


def test_prompts_keep_the_question_and_never_hold_the_value(people):
    kept = {t.name for t in templates() if t.text is None or "{question}" in t.text}
    for t in tries(people, templates(), 3):
        row = people.rows[t.row]
        if t.template in kept:
            assert row["question"] in t.prompt, t
        assert words(row["value"]) not in words(t.prompt), t


def test_few_shot_shows_retain_pairs_in_the_right_format_and_no_forget_fact(people):
    retain = {QA.format(r["question"]) + " " + r["answer"] for r in people.data.extra["retain"]}
    secret = [QA.format(r["question"]) for r in people.data.forget]
    made = of(people, "few_shot_random", "few_shot_similar")
    assert len(made) == 2 * len(people.rows)
    for t in made:
        row = people.rows[t.row]
        before, _, _ = t.prompt.rpartition(QA.format(row["question"]))
        pairs = ["Question: " + p.strip() for p in before.split("Question: ") if p]
        assert len(pairs) == 3 and set(pairs) <= retain
        assert not any(question in before for question in secret)


def test_similar_shots_ask_the_same_kind_of_question(people):
    for t in of(people, "few_shot_similar", k=2):
        row = people.rows[t.row]
        kind = row["question"].replace(row["subject"], "")
        told = t.prompt.split("Question: ")[1:-1]
        assert sum(all(word in pair for word in kind.split()) for pair in told) == 2


def test_a_retain_pair_with_the_rows_value_is_never_shown(tokenizer):
    forget = [qa(0, "old")]  # Paris
    retain = [{**qa(0, "new"), "question": forget[0]["question"] + " Really?"}, qa(1, "new")]
    case = Case("adapter", tokenizer, ForgetRetain(forget, retain), forget, [], nullcontext)  # type: ignore[arg-type]
    made = of(case, "few_shot_similar")
    assert len(made) == 1 and "Paris" not in made[0].prompt and "Rome" in made[0].prompt


def test_a_prompt_with_examples_shrinks_to_the_limit(people):
    short = Case("adapter", people.tokenizer, people.data, people.rows[:2], [], people.subject)
    counts = [t.prompt.count("Question:") for t in of(short, "few_shot_random", limit=200)]
    assert counts and all(1 < c < 4 for c in counts)  # the tokenizer has one token a byte
    assert of(short, "biographer", limit=200) and not of(short, "biographer", limit=30)


def test_reworded_questions_of_the_row_and_translations(tokenizer):
    row = {**qa(0, "old"), "paraphrased_question": "Whence?", "translated_question": ["Wo?", "Où ?"]}
    case = Case("adapter", tokenizer, {"forget": [row], "retain": []}, [row], [], nullcontext)  # type: ignore[arg-type]
    made = tries(case, [], 3)
    assert [(t.family, t.prompt) for t in made] == [
        ("paraphrase", QA.format("Whence?")),
        ("translation", QA.format("Wo?")),
        ("translation", QA.format("Où ?")),
    ]


def test_sets_of_other_facts_are_no_paraphrases(tokenizer):
    rows = [qa(i, "old") for i in range(3)]
    others = [{**r, "value": "Nowhere"} for r in rows]
    data = {
        "forget": rows,
        "retain": [],
        "forget_unseen": others,
        "forget_other": [{**r, "question": "?"} for r in rows],
    }
    case = Case("adapter", tokenizer, data, rows[1:], [], nullcontext)  # type: ignore[arg-type]
    assert [(t.template, t.row) for t in tries(case, [], 3)] == [("forget_other", 0), ("forget_other", 1)]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"value": "Rome"}, "She was born in"),
        ({"value": "rome"}, "She was born in"),
        ({"value": "She"}, None),
        ({"value": "Oslo"}, None),
        ({}, None),
    ],
)
def test_stub_ends_before_the_value(row, expected):
    assert stub(row, "She was born in Rome.") == expected


def test_a_leak_is_any_try_and_nothing_else(case, monkeypatch):
    told: list[str] = []

    def scripted(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[str]:
        told.extend(prompts)
        # row 1 leaks in the quiz, row 2 says another row's value
        return [
            case.rows[1]["value"] if "quiz" in p and case.rows[1]["question"] in p else f"not {case.rows[0]['value']}"
            for p in prompts
        ]

    monkeypatch.setattr(module, "greedy", scripted)
    out = jailbreak(case)
    same = np.array([float(r["value"] == case.rows[0]["value"]) for r in case.rows])
    expected = same.copy()
    expected[1] = 1.0
    assert np.array_equal(out.after["value_accuracy"], expected)
    assert not out.before["value_accuracy"].any() and out.n == len(case.rows)
    rates = out.about["templates"]
    assert rates["quiz"]["rate"] == pytest.approx(expected.mean()) and rates["quiz"]["n"] == len(case.rows)
    assert rates["novel"]["rate"] == pytest.approx(same.mean())
    assert rates["biographer"] == {
        "rate": None, "n": 0, "reason": "no row has what it names, or it is too long for the model",
    }  # fmt: skip
    assert out.about["tries"] == len(told) + len(case.rows)


def test_runs_on_a_model_and_its_adapter(case_of, model):
    peft = lora(model)
    one = jailbreak(case_of(peft), shots=1)
    with peft.disable_adapter():
        off = jailbreak(case_of(peft), shots=1)
    for out in (one, off):
        assert (out.after["value_accuracy"] >= out.before["value_accuracy"]).all()


def test_rows_that_cannot_be_asked_say_why(case_of, model):
    bare = [{k: v for k, v in qa(0, "old").items() if k != "value"}]
    with pytest.raises(Unmeasured, match="1 of 1 rows have no 'value'"):
        jailbreak(case_of(model, rows=bare))
    with pytest.raises(Unmeasured, match="plain text"):
        jailbreak(case_of(model, rows=[{"text": "Rome is a town.", "value": "Rome"}]))


def test_templates_of_ones_own_are_checked_whole(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "format: 1\ntemplates:\n"
        "  - {name: a, family: f, question: 'Please {questoin}'}\n"
        "  - {name: b, family: f, shot: random}\n"
        "  - {name: c, family: f, text: x, begins: y}\n"
        "  - {family: f}\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as problem:
        templates(file)
    for part in ("questoin", "'shot'", "stands alone", "templates[3].name is missing"):
        assert part in str(problem.value)
    with pytest.raises(UserError, match="no such file"):
        templates(tmp_path / "none.yaml")


def test_slots_stand_after_the_question_in_every_layout(tokenizer):
    rows = [
        {"question": "Who?", "answer": "Al."},
        {"prompt": "Who? ->", "completion": " Al."},
    ]
    a, b = (PromptSlot.of(row, tokenizer, "qa") for row in rows)
    assert a.with_text(" now")["prompt"] == "Question: Who? now\nAnswer:" and a.answer == " Al."
    assert b.with_text(" now")["prompt"] == "Who? -> now" and b.answer == " Al."
    with pytest.raises(Unmeasured, match="plain text"):
        PromptSlot.of({"text": "x"}, tokenizer, "qa")


def test_no_template_holds_a_value_of_the_people():
    """A template that already held a value would leak it by itself."""
    values = {words(r["value"]) for r in embedded.rows("embedded:people?seed=0")["retain"]}
    for t in templates():
        said = words(" ".join(x for x in (t.question, t.begins, t.text) if x))
        assert not [v for v in values if v in said], t.name
