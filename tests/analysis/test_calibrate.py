"""The scale of an adapter is the exact mix of two models, and the scale found is the one that was asked for."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_helpers import qa, tiny
from peft import LoraConfig, get_peft_model

from peft_unlearn.analysis.calibrate import at_scale, check_exact, make_read
from peft_unlearn.analysis.search import TOLERANCE, Levels, search
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.numbers import Number
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.disruption import make_kl, within

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def stacked(**config):
    """A ForgetModel without files: two random adapters on a tiny model."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **config)
    model = get_peft_model(tiny(), settings, adapter_name="mine")
    model.add_adapter("other", settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn_like(p))
    return ForgetModel(model.eval(), None, {"mine": None, "other": None}, "")  # type: ignore[arg-type, dict-item]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_ends_of_the_scale_are_the_base_and_the_unlearned_model_bit_for_bit():
    stack = stacked()
    at = at_scale(stack, "mine")
    base = logits(tiny())
    alone = logits(stacked().model)  # the first adapter is the active one
    with at(0.0) as model:
        assert torch.equal(logits(model), base)
    with at(1.0) as model:
        assert torch.equal(logits(model), alone) and not torch.allclose(alone, base)
    assert stack.scales() == {"mine": 1.0, "other": 1.0} and torch.equal(logits(stack.model), alone)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", [0.3, 0.75, 1.4])
def test_the_scale_is_the_explicit_interpolation_of_the_weights(scale, rslora):
    stack = stacked(use_rslora=rslora)
    before = {k: v.clone() for k, v in tiny().state_dict().items()}
    after = stacked(use_rslora=rslora).model.merge_and_unload().state_dict()
    mixed = tiny()
    mixed.load_state_dict({k: (1 - scale) * before[k] + scale * after[k] for k in before})
    with at_scale(stack, "mine")(scale) as model:
        torch.testing.assert_close(logits(model), logits(mixed), atol=1e-5, rtol=0)


def test_an_error_inside_leaves_the_scale_where_it_was():
    stack = stacked()
    stack.scale("mine", 0.7)
    with pytest.raises(RuntimeError, match="inside"), at_scale(stack, "mine")(0.2):
        raise RuntimeError("inside")
    assert stack.scales()["mine"] == 0.7


def test_levels_are_those_of_the_suite(tokenizer):
    from peft_unlearn.evaluation.score import score

    model, data = tiny(), {"forget": [qa(i, "old") for i in range(5)], "retain": [qa(i, "new") for i in range(7)]}
    found = make_read(data, tokenizer, "probability")(model)

    @contextmanager
    def subject():
        yield model

    sets = {s: {"role": s, "metrics": ["probability"]} for s in data}
    report = score({"base": subject}, {"format": 1, "name": "s", "sets": sets}, data, tokenizer)
    assert found.forget.value == report.subjects["base"]["forget/probability"]
    assert found.retain.value == report.subjects["base"]["retain/probability"]
    assert (found.forget.n, found.retain.n) == (5, 7)


def test_what_cannot_calibrate_is_refused(tokenizer):
    rows = {"forget": [qa(0, "old")], "retain": [qa(1, "new")]}
    for metric in ("value_accuracy", "truth_ratio", "forget_quality"):
        with pytest.raises(UserError, match="cannot calibrate"):
            make_read(rows, tokenizer, metric)
    with pytest.raises(UserError, match="needs a retain set"):
        make_read({"forget": rows["forget"]}, tokenizer)


# -- the search, on planted curves ------------------------------------------------------------------------------------


def level(forget, retain, n=1000):
    def number(value):
        return Number(value, n, rows=None if value is None else np.full(n, value))

    return Levels(number(forget), number(retain))


def run(forget, retain, floor=0.95, max_scale=1.0, n=1000):
    tried = []

    @contextmanager
    def at(scale):
        tried.append(scale)
        yield scale

    base = level(forget(0.0), retain(0.0), n)
    return search(lambda s: level(forget(s), retain(s), n), at, base, floor, max_scale), tried


FALLS = (lambda s: 1 - 0.7 * s, lambda s: 0.9 * (1 - 0.2 * s * s))


@pytest.mark.parametrize("floor", [0.999, 0.95, 0.9, 0.83])
def test_the_scale_found_holds_the_floor_and_a_tolerance_more_does_not(floor):
    found, tried = run(*FALLS, floor=floor)
    assert found.monotone and found.how == "bisection" and found.reason is None
    s, wanted = found.chosen.scale, floor * 0.9
    assert FALLS[1](s) >= wanted > FALLS[1](s + TOLERANCE)
    assert abs(s - ((1 - floor) / 0.2) ** 0.5) <= TOLERANCE
    assert len(tried) == len(set(tried)) <= 14  # nothing is read twice
    assert [p.scale for p in found.curve] == sorted({0.0, *tried})


def test_as_trained_where_that_holds_the_floor_and_beyond_where_asked():
    assert run(*FALLS, floor=0.8)[0].chosen.scale == 1.0
    found, tried = run(*FALLS, floor=0.7, max_scale=1.5)
    assert max(tried) == 1.5 and FALLS[1](found.chosen.scale) >= 0.63 > FALLS[1](found.chosen.scale + TOLERANCE)
    assert 1.2 < found.chosen.scale < 1.25


def test_where_the_curves_rise_the_best_grid_point_is_taken():
    def forget(s):  # lowest at 0.6, and worse again after it
        return 1 - 1.2 * s if s <= 0.6 else 0.28 + (s - 0.6)

    found, tried = run(forget, lambda s: 1 - 0.01 * s, floor=0.95)
    assert not found.monotone and found.chosen.scale == 0.6 and "best point of the grid" in found.how
    assert found.rises["forget"] == pytest.approx(0.1) and len(tried) == 10

    def retain(s):  # a hole at 0.3 and 0.4
        return 0.5 if 0.25 < s < 0.45 else 1 - 0.1 * s

    found, _ = run(FALLS[0], retain, floor=0.93)
    assert not found.monotone and found.chosen.scale == 0.7  # bisection would have stopped before the hole


def test_a_rise_of_one_row_is_no_rise():
    def retain(s):
        return 1.0 - 0.3 * s + (0.009 if s == 0.5 else 0) + (0.05 if s == 0.6 else 0)

    assert run(FALLS[0], retain, n=20)[0].monotone
    assert not run(FALLS[0], retain, n=200)[0].monotone


def test_no_scale_will_do():
    found, _ = run(FALLS[0], lambda s: 1.0 if s < 0.0002 else 0.2)
    assert found.chosen is None and "keeps 95 %" in found.reason
    assert found.to_dict()["scale"] is None and len(found.to_dict()["curve"]) >= 11
    found, _ = run(lambda s: 1.0, FALLS[1])
    assert found.chosen is None and "nothing is forgotten" in found.reason


@pytest.mark.parametrize("limit", [0.002, 0.03, 0.09])
def test_strong_adapters_are_looked_for_below_the_grid(limit):
    found, tried = run(FALLS[0], lambda s: 1.0 if s < limit else 0.2)
    assert limit / 1.2 < found.chosen.scale < limit and found.reason is None and len(tried) < 30


@pytest.mark.parametrize(("strength", "most"), [(1.0, 1.0), (4e4, 1.0), (1e8, 1.0), (0.3, 4.0)])
def test_the_largest_scale_within_a_budget(strength, most):
    def kl(s):  # as of small changes: quadratic
        return strength * s * s

    scale, seen = within(kl, 0.01, most)
    assert scale is not None and scale == min(most, max(s for s, v in seen.items() if v <= 0.01))
    assert kl(scale) <= 0.01 and (scale == most or kl(scale) >= 0.95 * 0.01 or kl(1.02 * scale) > 0.01)
    assert len(seen) <= 25


def test_budgets_that_no_scale_keeps_or_that_are_none():
    assert within(lambda s: 1.0, 0.01, 1.0)[0] is None and within(lambda s: float("nan"), 0.01, 1.0)[0] is None
    assert within(lambda s: 0.0, 0.01, 2.0)[0] == 2.0
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(UserError, match="--kl"):
            within(lambda s: s, bad, 1.0)
    with pytest.raises(UserError, match="--max-scale"):
        within(lambda s: s, 0.1, 0.0)


def test_the_kl_of_a_scale_is_that_of_the_whole_distributions():
    stack, at = (s := stacked()), at_scale(s, "mine")
    rows = [
        {"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in ([5, 6, 7, 8, 9], [11, 12, 13], [4, 5, 6, 7])
    ]
    data = SimpleNamespace(extra={"retain": rows}, encode=lambda name, tokenizer: [dict(r) for r in rows])
    measure, n = make_kl(stack.model, SimpleNamespace(pad_token_id=0), data, "retain", None, at)
    assert n == 3 and measure(0.0) == 0.0
    total, count, base = 0.0, 0, tiny().double()
    with at(0.7) as model, torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            q, p = (
                base(input_ids=ids).logits[0, 1:-1].log_softmax(-1),
                model(input_ids=ids).logits[0, 1:-1].double().log_softmax(-1),
            )
            total, count = total + float((q.exp() * (q - p)).sum()), count + len(q)
    assert measure(0.7) == pytest.approx(total / count, rel=1e-4) and total > 0


def test_a_model_of_nan_neither_forgets_nor_keeps():
    found, _ = run(lambda s: None if s > 0.55 else 1 - s, lambda s: None if s > 0.55 else 1.0)
    assert 0.54 <= found.chosen.scale <= 0.55
    assert found.to_dict()["curve"][-1]["forget"]["value"] is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"floor": 0.0}, "share of what the base has"), ({"floor": 95.0}, "share of what the base has"),
     ({"max_scale": 9.0}, "largest scale tried")],
)  # fmt: skip
def test_senseless_settings_are_refused(kwargs, message):
    with pytest.raises(UserError, match=message):
        run(*FALLS, **kwargs)


def test_a_base_without_levels_is_refused():
    with pytest.raises(UserError, match="nothing to keep"):
        run(FALLS[0], lambda s: 0.0)
    with pytest.raises(UserError, match="nothing can be held to it"):
        run(FALLS[0], lambda s: None)


@pytest.mark.parametrize(
    ("config", "why"),
    [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "biases"),
     ({"init_lora_weights": "pissa"}, "base's own weights"), ({"peft_type": "PREFIX_TUNING"}, "whose scale is not known"),
     ({"use_dora": False, "depends_on": ["sha256:" + "0" * 64]}, "on top of other adapters")],
)  # fmt: skip
def test_adapters_whose_scale_is_no_exact_mix_are_refused(tmp_path, config, why):
    manifest = SimpleNamespace(depends_on=config.pop("depends_on", []))
    folder = SimpleNamespace(config={"peft_type": "LORA", **config}, path=tmp_path, manifest=manifest)
    with pytest.raises(UserError, match=why):
        check_exact(folder)  # type: ignore[arg-type]
