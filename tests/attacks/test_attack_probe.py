"""Linear probe: planted features are found, shuffled ones are not, and everything without a number has its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import CITIES, qa
from test_attack_weights import bits, lora, same

from peft_unlearn.attacks import probe as module
from peft_unlearn.attacks.case import Case
from peft_unlearn.attacks.probe import FOLDS, _folds, _measures, probe, ridge_predict
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.evaluation.measured import Unmeasured


def person(i: int, name: str) -> dict[str, Any]:
    who = f"{name} {i}"
    return {
        **qa(i, "old"),
        "question": f"Where was {who} born?",
        "answer": f"{who} was born in {CITIES[i % 8]}.",
        "subject": who,
    }


@pytest.fixture(scope="module")
def facts() -> ForgetRetain:
    return ForgetRetain([person(i, "Old") for i in range(16)], [person(i, "New") for i in range(48)])


@pytest.fixture
def probed(case_of: Any, model: Any, facts: ForgetRetain) -> Case:
    return case_of(model, data=facts, rows=facts.forget, shown=[])


def planted(monkeypatch: Any, layers: int, where: int, noise: float = 0.05, known: bool = True) -> None:
    """Hidden states of noise, with the value's embedding, mixed linearly, at layer `where`."""
    vectors: dict[str, np.ndarray] = {}
    mix = np.random.default_rng(5).normal(size=(32, 32))
    original = module._first_token

    def hidden(model: Any, tokenizer: Any, rows: Any, position: str) -> np.ndarray:
        vectors.update(original(model, tokenizer, set(CITIES)))
        rng = np.random.default_rng(len(rows))
        out = rng.normal(size=(layers, len(rows), 32))
        told = np.stack([vectors[a.value] for a in rows])
        if known or len(rows) > 20:  # the retain rows
            out[where] = told @ mix + noise * out[where]
        return out

    monkeypatch.setattr(module, "_hidden", hidden)


def test_planted_values_are_read_and_shuffled_ones_are_not(probed, monkeypatch):
    planted(monkeypatch, layers=3, where=1)
    out = probe(probed, candidates=8)
    assert out.about["layer"] == 1  # chosen on retain rows
    assert out.after["pool_choice"].mean() == pytest.approx(out.about["ceiling"], abs=0.02)
    assert out.about["trained_on"]["cross_validated_choice"] >= out.about["ceiling"] - 0.05
    chance = out.about["chance"]
    assert chance == 1 / 8 and out.about["shuffled_values"]["pool_choice"] < chance + 0.2
    assert out.about["shuffled_values"]["pool_rank"] < 0.75 < 0.95 < out.after["pool_rank"].mean()
    others = [v for k, v in enumerate(out.about["choice_by_layer"]) if k != 1]
    assert max(others) < 0.5


def test_forget_rows_without_the_value_are_at_chance_while_retain_rows_are_read(probed, monkeypatch):
    """What a model looks like that knows the retain facts and never met the forget facts."""
    planted(monkeypatch, layers=2, where=0, known=False)
    out = probe(probed, candidates=8)
    assert out.about["layer"] == 0 and out.about["trained_on"]["cross_validated_choice"] > 0.7
    assert out.after["pool_choice"].mean() < 0.4 and out.after["pool_rank"].mean() < 0.75


def test_values_that_no_retain_row_has_are_counted_and_spoil_nothing(case_of, model, facts, monkeypatch):
    rest = [r for r in facts.retain or [] if r["value"] != "Cairo"]
    case = case_of(model, data=ForgetRetain(facts.forget, rest), rows=facts.forget, shown=[])
    planted(monkeypatch, layers=1, where=0, noise=0.01)
    out = probe(case, candidates=8)
    cairo = [r["value"] == "Cairo" for r in case.rows]
    assert out.about["values_in_no_training_row"] == sum(cairo) == 2
    assert np.isfinite(out.after["pool_rank"]).all()
    assert out.after["pool_rank"][~np.asarray(cairo)].mean() > 0.95


def test_shown_rows_may_choose_the_layer(case_of, model, facts, monkeypatch):
    case = case_of(model, data=facts, rows=facts.forget[4:], shown=facts.forget[:4])
    original = module._first_token
    rng = np.random.default_rng(0)

    def hidden(model: Any, tokenizer: Any, rows: Any, position: str) -> np.ndarray:
        told = np.stack([original(model, tokenizer, set(CITIES))[a.value] for a in rows])
        out = rng.normal(size=(2, len(rows), 32))
        out[0] = told + 1.5 * told.std() * out[0]  # everybody's, a little noisy
        if len(rows) > 20:
            out[1] = told  # the last layer holds the retain values exactly, and the forget values not at all
        return out

    monkeypatch.setattr(module, "_hidden", hidden)
    by_retain, by_shown = probe(case), probe(case, layer_by="shown")
    assert by_retain.about["layer"] == 1 and by_shown.about["layer"] == 0
    assert by_shown.after["pool_rank"].mean() > by_retain.after["pool_rank"].mean() + 0.2
    assert by_shown.about["shown_to_choose_the_layer"] == 4
    with pytest.raises(Unmeasured, match="no forget rows were shown"):
        probe(case_of(model, data=facts, rows=facts.forget, shown=[]), layer_by="shown")


@pytest.mark.parametrize("shape", [(40, 6), (10, 30)])
def test_ridge_is_the_minimizer(shape):
    rng = np.random.default_rng(0)
    x, y, new = (
        rng.normal(2.0, 3.0, size=shape),
        rng.normal(1.0, 1.0, size=(shape[0], 3)),
        rng.normal(size=(5, shape[1])),
    )
    for ridge, got in zip((1e-2, 1.0), ridge_predict(x, y, new, (1e-2, 1.0)), strict=True):
        z, z_new = (x - x.mean(0)) / x.std(0), (new - x.mean(0)) / x.std(0)
        w = np.linalg.solve(z.T @ z + ridge * len(x) * np.eye(shape[1]), z.T @ (y - y.mean(0)))
        np.testing.assert_allclose(got, z_new @ w + y.mean(0), rtol=1e-8, atol=1e-8)


def test_no_owner_stands_in_two_folds():
    owners = [f"p{i % 13}" for i in range(100)]
    fold = _folds(owners, 0)
    assert len({(o, f) for o, f in zip(owners, fold.tolist(), strict=True)}) == 13 and set(fold.tolist()) == set(
        range(FOLDS)
    )


def test_ties_and_nan():
    found = _measures([np.array([1.0, 1.0, 0.0]), np.array([0.0, 1.0, -1.0]), np.array([2.0, np.nan, 0.0])])
    assert found["pool_choice"][:2].tolist() == [0.5, 0.0] and found["pool_rank"][:2].tolist() == [0.75, 0.5]
    assert np.isnan(found["pool_choice"][2]) and np.isnan(found["pool_rank"][2])


def test_reads_the_state_before_the_value(case_of, model, facts, tokenizer):
    """The position is the one whose logits tell the value's first token, and the layers are the blocks."""
    rows = module._read(facts.forget[:5], case_of(model, data=facts), "forget")
    read = module._hidden(model, tokenizer, rows, "before_value")
    asked = module._hidden(model, tokenizer, rows, "question")
    for i, row in enumerate(facts.forget[:5]):
        stub = row["answer"][: row["answer"].index(row["value"])].rstrip()
        for got, text in (
            (read, f"Question: {row['question']}\nAnswer: {stub}"),
            (asked, f"Question: {row['question']}\nAnswer:"),
        ):
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                states = model.model(ids, output_hidden_states=True).hidden_states
            np.testing.assert_allclose(got[0, i], states[1][0, -1].numpy(), rtol=1e-4, atol=1e-4)


def test_works_with_an_adapter_on_and_off_and_moves_nothing(case_of, model, facts):
    peft = lora(model)
    before = bits(peft)
    on = probe(case_of(peft, data=facts, rows=facts.forget, shown=[]), candidates=4)
    with peft.disable_adapter():
        off = probe(case_of(peft, data=facts, rows=facts.forget, shown=[]), candidates=4)
    assert same(bits(peft), before) and not any(m._forward_hooks for m in peft.modules())
    assert on.n == off.n == 16 and not np.array_equal(on.before["pool_rank"], off.before["pool_rank"])
    again = probe(case_of(peft, data=facts, rows=facts.forget, shown=[]), candidates=4)
    assert np.array_equal(on.after["pool_rank"], again.after["pool_rank"])  # a seed, no chance


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda f, r: ([{k: v for k, v in x.items() if k != "value"} for x in f], r), "16 of 16 forget rows have no 'value'"),
        (lambda f, r: ([{**x, "value": "Nowhere"} for x in f], r), "stands in their answer"),
        (lambda f, r: (f, [{**x, "question": "What does " + x["subject"] + " eat?"} for x in r]), "what no retain row asks"),
        (lambda f, r: (f, r[:3]), "fewer than 5 subjects"),
        (lambda f, r: (f, None), "what no retain row asks"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_says_why(case_of, model, facts, change, reason):
    forget, retain = change(facts.forget, facts.retain)
    with pytest.raises(Unmeasured, match=reason):
        probe(case_of(model, data=ForgetRetain(forget, retain), rows=forget, shown=[]))


def test_nan_states_have_a_reason(probed, model):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(Unmeasured, match="not finite"):
        probe(probed)
