"""Suffixes, of words and of vectors: gradients against differences, search that never gets worse, nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_attack_weights import bits, lora, same

from peft_unlearn.attacks import suffix as suffix_module
from peft_unlearn.attacks.gcg import Search, allowed_tokens, gcg, search, survives, token_gradient
from peft_unlearn.attacks.prompt_slot import PromptSlot, embeddings_at, mean_nll, placeholder, spans
from peft_unlearn.attacks.suffix import fit, suffix
from peft_unlearn.evaluation.measured import Unmeasured


@pytest.fixture(scope="module")
def tok() -> Any:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def slots(tok: Any) -> list[PromptSlot]:
    return [PromptSlot.of(row, tok, "qa") for row in tiny.rows(3, "ask")]


def wild(**over: Any) -> Any:
    """Random weights far enough from uniform that a suffix has something to move."""
    model = tiny.llama(**over)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim > 1 else None
    return model


def slotted_rows(slots: list[PromptSlot], ids: list[int], tok: Any) -> list[Any]:
    found = [slot.tokens(tok.decode(ids), tok) for slot in slots]
    assert all(found)
    return found


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def plain_loss(model: Any, row: Any, ids: list[int], weights: torch.Tensor) -> torch.Tensor:
    """Mean token NLL with full float64 logits; weights (length, vocab) multiply the embeddings in the slot."""
    filled = row.filled(ids)
    tokens, labels = torch.tensor([filled["input_ids"]]), torch.tensor(filled["labels"])
    e = model.get_input_embeddings().weight
    x = e[tokens].clone()
    x[0, row.start : row.stop] = weights @ e
    z = model(inputs_embeds=x).logits[0, :-1]
    keep = labels[1:] != -100
    return torch.nn.functional.cross_entropy(z[keep], labels[1:][keep])


@pytest.mark.parametrize("tied", [False, True])
def test_token_gradient_is_that_of_one_hot_weights(tok, slots, tied):
    model = wild(tie_word_embeddings=tied).double()
    ids = [*tok.encode(" w12", add_special_tokens=False), tok.convert_tokens_to_ids("!")]
    assert len(ids) == 3
    rows = slotted_rows(slots, ids, tok)
    loss, scores = token_gradient(model, rows, ids, 0)

    one_hot = torch.nn.functional.one_hot(torch.tensor(ids), 320).double()
    weights = one_hot.clone().requires_grad_(True)
    whole = torch.stack([plain_loss(model, r, ids, weights) for r in rows]).mean()
    (expected,) = torch.autograd.grad(whole, weights)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)

    with torch.no_grad():

        def at(w: torch.Tensor) -> float:
            return float(sum(plain_loss(model, r, ids, w) for r in rows) / len(rows))

        assert loss == pytest.approx(at(one_hot), rel=1e-5)
        for place, token in ((0, 5), (1, 40), (2, 200), (2, ids[2])):
            up, down = one_hot.clone(), one_hot.clone()
            up[place, token] += 2e-3  # Llama's norms round to float32: smaller steps drown in it
            down[place, token] -= 2e-3
            slope = (at(up) - at(down)) / 4e-3
            assert float(scores[place, token]) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_token_gradient_counts_the_embeddings_own_scale(tok, slots):
    """Gemma multiplies inside its embedding module: the weights alone would be off by that factor."""

    class Scaled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 7.0

    plain, scaled = tiny.llama(), tiny.llama()
    weight: Any = scaled.get_input_embeddings().weight
    with torch.no_grad():
        layer = Scaled(320, 32, _weight=weight / 7.0)
    scaled.set_input_embeddings(layer)
    ids, _ = placeholder(slots, 2, tok)
    rows = slotted_rows(slots, ids, tok)
    a, b = token_gradient(plain, rows, ids, 0), token_gradient(scaled, rows, ids, 0)
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter off"])
def test_search_never_gets_worse_and_leaves_nothing(tok, slots, kind):
    model = wild() if kind == "plain" else lora(wild())
    before, count = bits(model), hooks(model)
    settings = Search(length=3, steps=6, candidates=24, top_k=32)
    if kind == "adapter off":
        with model.disable_adapter():
            found = search(model, slots, tok, settings)
    else:
        found = search(model, slots, tok, settings)
    assert all(b <= a for a, b in zip(found.losses, found.losses[1:], strict=False)) and len(found.losses) == 7
    assert found.losses[-1] < found.losses[0] - 1e-3  # on random weights some token always helps
    assert same(bits(model), before) and hooks(model) == count
    assert all(p.grad is None for p in model.parameters())
    # decoded it is what was searched, and costs what the search reports
    assert survives(found.ids, slots, tok) and not set(found.ids) & set(tok.all_special_ids)
    rows = slotted_rows(slots, found.ids, tok)
    if kind != "adapter off":
        with torch.no_grad():
            again = float(mean_nll(model, [r.filled(found.ids) for r in rows], 0).mean())
        assert again == pytest.approx(found.losses[-1], rel=1e-5)


def test_search_with_all_candidates_takes_the_best_single_change(tok):
    """One step over every allowed token of one place: nothing tried could have been better."""
    model = wild()
    slots = [PromptSlot.of(tiny.rows(1, "ask")[0], tok, "qa")]
    ids, _ = placeholder(slots, 1, tok)
    found = search(model, slots, tok, Search(length=1, steps=1, candidates=6000, top_k=320))
    row = slotted_rows(slots, ids, tok)[0]
    allowed = allowed_tokens(model, tok).nonzero().squeeze(1).tolist()
    tried = [[t] for t in allowed if survives([t], slots, tok)]
    with torch.no_grad():
        every = mean_nll(model, [row.filled(t) for t in tried], 0)
    assert found.losses[-1] == pytest.approx(float(every.min()), rel=1e-5)


def test_tokens_that_merge_are_refused(tok, slots):
    w, one, two = (tok.convert_tokens_to_ids(t) for t in ("Ġw", "1", "2"))
    assert survives([w, one], slots, tok) and survives([one, w, two], slots, tok)
    assert not survives([w, one, two], slots, tok)  # read back as " w", "12"
    assert not allowed_tokens(wild(), tok)[tok.all_special_ids].any()


def test_spans_cut_where_the_texts_meet(tok):
    left, middle, right = spans([("w1 w2?", " w3 w4", "\nAnswer:")], tok)[0]  # type: ignore[misc]
    assert tok.decode(middle) == " w3 w4" and tok.decode(right) == "\nAnswer:"
    assert left[0] == tok.bos_token_id and tok.decode(left[1:]) == "w1 w2?"
    assert spans([("w1 w1", "2", " w3")], tok) == [None]


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_vectors_stand_in_for_embeddings(tok, slots):
    model = wild()
    ids, _ = placeholder(slots, 2, tok)
    row = slotted_rows(slots, ids, tok)[0]
    v = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([row.filled(ids)["input_ids"]])
    with torch.no_grad():
        x = model.get_input_embeddings()(tokens).clone()
        x[0, row.start : row.stop] = v
        expected = model(inputs_embeds=x).logits
        with embeddings_at(model, ids, v):
            torch.testing.assert_close(model(input_ids=tokens).logits, expected)
            bare = torch.tensor([[1, 5, 6, 7, 8]])
            torch.testing.assert_close(model(input_ids=bare).logits, model(input_ids=bare.clone()).logits)
            # generation: prompt with vectors, then single tokens without
            got = model.generate(tokens[:, : row.stop + 2], max_new_tokens=4, do_sample=False, pad_token_id=0)
        y = x[:, : row.stop + 2]
        want = model.generate(inputs_embeds=y, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(got[:, row.stop + 2 :], want)
    assert hooks(model) == 0


@pytest.mark.parametrize("optimizer, rate", [("adam", 0.05), ("sign", 0.01)])
@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter off"])
def test_vectors_lower_the_loss_and_move_no_weight(tok, slots, optimizer, rate, kind):
    model = wild() if kind == "plain" else lora(wild())
    before, count = bits(model), hooks(model)
    ids, _ = placeholder(slots, 3, tok)
    rows = [r.filled(ids) for r in slotted_rows(slots, ids, tok)]
    if kind == "adapter off":
        with model.disable_adapter():
            vectors, losses = fit(model, rows, ids, 0, 20, rate, optimizer)
    else:
        vectors, losses = fit(model, rows, ids, 0, 20, rate, optimizer)
        with torch.no_grad(), embeddings_at(model, ids, vectors):
            assert float(mean_nll(model, rows, 0).mean()) == pytest.approx(min(losses), rel=1e-5)
    assert len(losses) == 21 and min(losses) < losses[0] - 0.05
    assert np.mean(np.diff(losses) < 0) >= 0.7  # mostly downhill
    assert same(bits(model), before) and hooks(model) == count and all(p.grad is None for p in model.parameters())


def test_an_exception_inside_leaves_no_hook_and_no_mode(tok, slots, monkeypatch):
    model = lora(wild()).train()
    before = bits(model)
    calls = []

    def fails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop here")
        return mean_nll(*args)

    monkeypatch.setattr(suffix_module, "mean_nll", fails)
    ids, _ = placeholder(slots, 3, tok)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(model, [r.filled(ids) for r in slotted_rows(slots, ids, tok)], ids, 0, 9, 0.1)
    assert hooks(model) == 0 and model.training and same(bits(model), before)


# --- as attacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "adapter", "adapter off"])
def test_suffix_trains_on_shown_and_scores_the_others(case_of, model, kind):
    subject = model if kind == "plain" else lora(model)
    before, count = bits(subject), hooks(subject)
    case = case_of(subject)
    if kind == "adapter off":
        with subject.disable_adapter():
            out = suffix(case, length=3, steps=15, learning_rate=0.05)
    else:
        out = suffix(case, length=3, steps=15, learning_rate=0.05)
    trained = out.about["trained_on"]
    assert trained["n"] == len(case.shown) and out.about["loss"]["least"] < out.about["loss"]["first"]
    assert trained["after"]["probability"] > trained["before"]["probability"]
    assert out.n == len(case.rows) and {len(v) for v in (*out.before.values(), *out.after.values())} == {out.n}
    assert same(bits(subject), before) and hooks(subject) == count


def test_gcg_reports_trained_beside_transferred(case_of, model):
    case = case_of(lora(model))
    out = gcg(case, length=3, steps=3, candidates=16, train_rows=2)
    trained = out.about["trained_on"]
    assert trained["n"] == 2 and trained["after"]["probability"] > trained["before"]["probability"]
    assert out.n == len(case.rows) == len(out.after["probability"])


def test_gcg_for_each_row_its_own(case_of, model):
    case = case_of(model)
    out = gcg(case, scope="per_row", length=3, steps=3, candidates=16, train_rows=2)
    assert out.n == 2 == len(out.before["probability"]) and out.about["suffix_spells_the_value"] in (0, 1, 2)
    assert (out.after["probability"] >= 0).all() and out.about["loss"]["least"] <= out.about["loss"]["first"]


def test_without_shown_rows_or_with_nan_there_is_a_reason(case_of, model):
    with pytest.raises(Unmeasured, match="no forget rows were shown"):
        suffix(case_of(model, shown=[]))
    with pytest.raises(Unmeasured, match="no forget rows were shown"):
        gcg(case_of(model, shown=[]))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Unmeasured, match="loss of the suffix is nan"):
        suffix(case_of(model), steps=2)
    with pytest.raises(Unmeasured, match="loss of the suffix is nan"):
        gcg(case_of(model), steps=2)
