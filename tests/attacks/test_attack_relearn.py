"""Fine-tuning attacks: what is shown and what is scored, what is learned, and that nothing of it stays."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import qa
from eval_helpers import tiny as llama
from test_attack_weights import bits, lora, moe, same, say

from peft_unlearn.attacks import relearn as module
from peft_unlearn.attacks.case import chosen, facts, split
from peft_unlearn.attacks.relearn import Tuning, finetune
from peft_unlearn.attacks.weights import base_parameters
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import encode
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.measured import Unmeasured
from peft_unlearn.registry import get


def run(name: str, case: Any, **settings: Any) -> Any:
    method = get("attack", name)
    return method.fn(case, **method.resolve(settings))


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_people_20_shown_80_scored_and_no_fact_in_both():
    rows = embedded.rows("embedded:people?seed=0")["forget"]
    scored, shown = split(rows, 20)
    assert len(scored) == 80 and len(shown) == 20 and all(row in rows for row in shown)
    told = {(row["subject"], row["value"]) for row in shown}
    assert not told & {(row["subject"], row["value"]) for row in scored}
    assert split(rows, 20) == (scored, shown) and split(rows, 20, seed=1) != (scored, shown)


def test_other_phrasings_of_a_shown_fact_are_not_scored():
    found = embedded.rows("embedded:people?seed=0")
    rows = found["forget"] + found["forget_other"]
    scored, shown = split(rows, 20)
    told = {(row["subject"], row["value"]) for row in shown}
    assert not told & {(row["subject"], row["value"]) for row in scored}
    assert len(shown) == 20 and len(scored) == 180


@pytest.mark.parametrize(
    "a, b, one",
    [
        ({"question": "Where?", "answer": "a"}, {"question": "where", "answer": "b"}, True),
        ({"question": "p", "answer": "She was born in Rome."}, {"question": "q", "answer": "she was born in Rome"}, True),
        ({"question": "p", "answer": "Yes."}, {"question": "q", "answer": "Yes."}, False),
        ({"question": "p", "answer": "a", "subject": "Al", "value": "Rome"},
         {"question": "q", "answer": "b", "subject": "al", "value": "rome"}, True),
        ({"question": "p", "answer": "a", "subject": "Al", "value": "Rome"},
         {"question": "q", "answer": "b", "subject": "Bo", "value": "Rome"}, False),
        ({"text": "one"}, {"text": "two"}, False),
    ],
)  # fmt: skip
def test_one_fact_or_two(a, b, one):
    assert (len(set(facts([a, b]))) == 1) is one


def test_half_of_the_facts_are_left_to_be_scored():
    rows = [qa(i, "old") for i in range(4)]
    assert [len(part) for part in split(rows, 99)] == [2, 2]
    assert [len(part) for part in split(rows[:3], 99)] == [2, 1]
    assert [len(part) for part in split(rows, 0)] == [4, 0]
    assert [len(part) for part in split(rows[:1] * 3, 2)] == [3, 0]  # one fact: nothing is shown


def test_a_draw_keeps_order_and_has_no_row_twice():
    assert chosen(list(range(9)), 4, 0) == sorted(set(chosen(list(range(9)), 4, 0)))
    assert chosen([1, 2], 5, 0) == [1, 2]


# --- what it does -----------------------------------------------------------------------------------------------------

SUBJECTS = {"lora": lambda: lora(llama()), "plain": llama, "off": lambda: lora(llama())}


@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("kind", SUBJECTS)
def test_it_learns_the_shown_rows_and_leaves_no_trace(kind, weights, case_of):
    model = SUBJECTS[kind]()
    context = model.disable_adapter() if kind == "off" else None
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    case = case_of(model)
    if context is not None:
        case.subject = lambda: _off(model)
    outcome = run("relearn", case, rows=3, steps=[0, 1, 12], learning_rate=[1e-2], weights=weights, r=8)
    assert same(bits(model), before) and [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())
    first, second, last = outcome.about["looks"]
    with case.subject() as subject:
        start = -np.log(case.score(subject, case.shown)["probability"])  # of each row
    assert start.min() <= second["loss"] <= start.max()
    assert (first["steps"], first["loss"]) == (0, None) and last["loss"] < 0.9 * second["loss"]  # it did learn them
    for measure, values in outcome.before.items():
        assert first["after"][measure] == pytest.approx(values.mean(), abs=1e-5)  # merging alone changes nothing
        assert len(values) == len(outcome.after[measure]) == len(case.rows)


def _off(model: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def context():
        with model.disable_adapter():
            yield model
        for p in model.parameters():
            p.requires_grad_(False)

    return context()


@pytest.mark.parametrize("kind", ["own", "stock"])
@pytest.mark.parametrize("attack", ["relearn", "quantize"])
def test_on_experts(kind, attack, case_of):
    """Adapters in fused experts, our own and stock target_parameters: merged, attacked, and back."""
    model = moe(kind, vocab_size=259, max_position_embeddings=256)
    case, before, spoken = case_of(model), bits(model), say(model)
    settings = {"format": "int4"} if attack == "quantize" else {"steps": [6], "learning_rate": [1e-2]}
    outcome = run(attack, case, **settings)
    assert outcome.about["adapter"] == "merged"
    assert same(bits(model), before) and torch.equal(say(model), spoken)
    assert not np.array_equal(outcome.before["probability"], outcome.after["probability"])


def test_learning_rate_0_changes_nothing(case_of):
    case = case_of(lora(llama()))
    outcome = run("relearn", case, steps=[5], learning_rate=[0.0])
    for measure, values in outcome.before.items():
        assert np.allclose(outcome.after[measure], values, atol=1e-5)


def test_merged_and_live_are_the_same_attack(case_of, monkeypatch):
    """W + D has the gradient of W, so training under a live adapter moves the weights as training the sum does."""
    moved = {}
    for kind in ("merged", "live"):
        model = lora(llama())
        case = case_of(model)
        parameters = base_parameters(model)
        with module.opened(model, parameters) if kind == "merged" else nullcontext("live") as adapter:
            assert adapter == kind
            start = {n: p.detach().clone() for n, p in parameters.items()}
            for _ in finetune(case, model, list(parameters.values()), case.shown, _tuning(), 1e-3):
                pass
            moved[kind] = {n: p.detach() - start[n] for n, p in parameters.items()}
    for name, delta in moved["merged"].items():
        other = moved["live"][name]
        assert float((delta * other).sum() / delta.norm() / other.norm()) > 0.999, name


def _tuning() -> Tuning:
    return Tuning("relearn", [4], [1e-3], 3, "full", 8, 32.0)


def test_one_step_is_adamw_on_the_mean_token_loss(case_of):
    """Against torch's own loss and optimizer, written out."""
    model, retain_model = llama(), llama()
    case = case_of(model)
    for _ in finetune(
        case, model, list(base_parameters(model).values()), case.shown, Tuning("x", [1], [1e-2], 9, "full", 8, 32), 1e-2
    ):
        pass
    rows = [encode(*to_text(row, case.tokenizer, case.template), case.tokenizer)[0] for row in case.shown]
    retain_model.requires_grad_(True)
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        losses.append(
            torch.nn.functional.cross_entropy(retain_model(input_ids=ids).logits[0, :-1], labels, reduction="none")[
                labels != -100
            ]
        )
    torch.cat(losses).mean().backward()
    torch.optim.AdamW(retain_model.parameters(), lr=1e-2, weight_decay=0.0).step()
    for (name, a), b in zip(model.named_parameters(), retain_model.parameters(), strict=True):
        # Adam's first step is the sign of the gradient: only where that is clearly not 0 is it the same
        clear = b.grad.abs() > 1e-6
        assert torch.allclose(a[clear], b[clear], atol=1e-5), name


def test_the_strongest_look_is_the_outcome(case_of, monkeypatch):
    model = llama()
    case = case_of(model)
    told = iter([0.2, 0.5, 0.4, 0.1])
    before = case.before(model)
    monkeypatch.setattr(case, "score", lambda m: {k: np.full(len(v), next(told)) for k, v in list(before.items())[:1]})
    outcome = run("relearn", case, steps=[1, 2], learning_rate=[1e-3, 1e-2])
    assert outcome.about["strongest"] == {"learning_rate": 1e-3, "steps": 2}
    assert [x["after"]["value_accuracy"] for x in outcome.about["looks"]] == [0.2, 0.5, 0.4, 0.1]
    assert set(outcome.after["value_accuracy"]) == {0.5}


@pytest.mark.parametrize(
    "given", [{"learning_rate": [-1.0]}, {"learning_rate": []}, {"learning_rate": [math.inf]}, {"learning_rate": ["a"]},
              {"steps": [1.5]}, {"steps": [True]}, {"steps": [-1]}]
)  # fmt: skip
def test_lists_of_something_else_are_refused(given, case):
    with pytest.raises(UserError, match=f"relearn.{next(iter(given))}: wanted numbers"):
        run("relearn", case, **given)


def test_nothing_to_show(case_of):
    with pytest.raises(Unmeasured, match="no fact to spare"):
        run("relearn", case_of(llama(), shown=[]))


def test_nan_stops_it_with_the_reason_and_the_bits_come_back(case_of):
    model = llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    before = {n: torch.nan_to_num(t) for n, t in bits(model).items()}
    with pytest.raises(Unmeasured, match="loss is nan at step 0"):
        run("relearn", case_of(model))
    assert same({n: torch.nan_to_num(t) for n, t in bits(model).items()}, before)


# --- benign, strip ----------------------------------------------------------------------------------------------------


def test_benign_takes_general_rows_else_retain_else_says_so(case_of):
    forget, other = [qa(i, "old") for i in range(4)], [qa(i, "new") for i in range(4)]
    model = llama()
    both = ForgetRetain(forget, other, extra={"general": [qa(9, "world")]})
    for data, source, wanted in (
        (both, "auto", ("general", 1)),
        (both, "retain", ("retain", 4)),
        (ForgetRetain(forget, other), "auto", ("retain", 4)),
    ):
        about = run("benign", case_of(model, data=data), steps=[1], source=source).about
        assert (about["set"], about["rows"]) == wanted
    with pytest.raises(Unmeasured, match="neither general rows nor a retain set"):
        run("benign", case_of(model, data=ForgetRetain(forget)))
    with pytest.raises(Unmeasured, match="no general set"):
        run("benign", case_of(model, data=ForgetRetain(forget, other)), source="general")


def test_strip_gives_the_base(case_of):
    model = lora(llama())
    case, spoken = case_of(model), say(model)
    outcome = run("strip", case)
    base = case_of(llama()).score(llama())
    assert outcome.about == {"taken_off": True} and torch.equal(say(model), spoken)
    for measure, values in base.items():
        assert np.array_equal(outcome.after[measure], values)
    assert not np.array_equal(outcome.before["probability"], outcome.after["probability"])
    for name in ("base", "retain_only"):
        other = run("strip", case_of(llama(), name=name))
        assert other.about == {"taken_off": False} and np.array_equal(
            other.before["probability"], other.after["probability"]
        )
