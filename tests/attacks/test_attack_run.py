"""The runner: recovery and its interval, reasons, labels, settings, and the shape of the JSON."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from eval_helpers import tiny as llama
from test_attack_weights import bits, lora, same

from peft_unlearn.attacks.case import Outcome
from peft_unlearn.attacks.requests import wanted
from peft_unlearn.attacks.run import recovery, run_attacks
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.score import on_one_model
from peft_unlearn.registry import methods


def outcome(before: Any, after: Any) -> Outcome:
    a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    return Outcome({"m": a}, {"m": b}, len(a))


# --- recovery -----------------------------------------------------------------------------------------------------------


def test_recovery_of_nothing_half_and_all():
    base = outcome([1, 1, 1, 1], [1, 1, 1, 1])
    start = [0, 0, 0, 0]
    for after, value in (([0, 0, 0, 0], 0.0), ([1, 1, 0, 0], 0.5), ([1, 1, 1, 1], 1.0)):
        assert recovery(outcome(start, after), base)["m"].value == value
    assert recovery(outcome(start, start), base)["m"].ci95 == [0.0, 0.0]
    assert recovery(outcome(start, [1, 1, 1, 1]), base)["m"].ci95 == [1.0, 1.0]


def test_recovery_is_of_means_and_its_interval_pairs_the_rows():
    rng = np.random.default_rng(1)
    base, before = rng.random(30) * 0.2 + 0.8, rng.random(30) * 0.3
    after = before + 0.4 * (base - before) + rng.normal(size=30) * 0.1
    found = recovery(outcome(before, after), outcome(base, base))["m"]
    assert found.value == pytest.approx((after.mean() - before.mean()) / (base.mean() - before.mean()))
    shares = []
    draw = np.random.default_rng(7)
    for _ in range(4000):
        i = draw.integers(0, 30, 30)
        shares.append((after[i] - before[i]).mean() / (base[i] - before[i]).mean())
    assert found.ci95 == pytest.approx(list(np.percentile(shares, [2.5, 97.5])), abs=0.02)
    exact = recovery(outcome(before, before + 0.4 * (base - before)), outcome(base, base))["m"]
    assert exact.ci95 == pytest.approx([0.4, 0.4])  # unpaired draws would give it a width


@pytest.mark.parametrize(
    "before, base, why",
    [
        ([0.5] * 4, [0.5] * 4, "too small a gap"),  # the adapter does nothing
        ([0.9] * 4, [0.5] * 4, "too small a gap"),  # the "unlearned" model knows more
        ([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.1], "too small a gap"),  # the gap may be chance
        ([0.0, math.nan], [1.0, 1.0], "1 of 2 rows have no value"),
        ([0.0, 0.0], [1.0, math.nan], "1 of 2 rows have no value"),
        ([0.0, 0.0], [1.0], "2, 2 and 1 rows"),
    ],
)
def test_recovery_that_has_no_value_is_null_with_a_reason(before, base, why):
    found = recovery(outcome(before, before), outcome(base, base))["m"]
    assert found.value is None and found.ci95 is None and why in str(found.reason)


def test_recovery_without_a_base_or_without_the_measure():
    assert "was not given" in str(recovery(outcome([0], [1]), None)["m"].reason)
    assert "broken" in str(recovery(outcome([0], [1]), None, "broken")["m"].reason)
    lost = Outcome({"m": np.zeros(3)}, {}, 3)
    assert "no such measure" in str(recovery(lost, outcome([1, 1, 1], [1, 1, 1]))["m"].reason)


# --- what is requested ----------------------------------------------------------------------------------------------------


def test_labels_settings_and_single_values():
    found = wanted(
        [("quantize", {"format": "int8"}), ("quantize", {"format": "nf4"}), ("relearn", {"learning_rate": 1e-4})]
    )
    assert [w.label for w in found] == ["quantize:int8", "quantize:nf4", "relearn"]
    assert found[2].settings["learning_rate"] == [1e-4] and found[2].settings["steps"] == [20]
    assert [w.label for w in wanted([("quantize", {"format": "int4"})])] == ["quantize:int4"]
    two = wanted([("relearn", {"rows": 10}), ("relearn", {"rows": 20})])
    assert [w.label for w in two] == ["relearn:10", "relearn:20"]


def test_every_mistake_at_once():
    asked: list[tuple[str, dict[str, Any]]] = [
        ("relern", {}), ("relearn", {"learning_rates": 1}), ("quantize", {}), ("quantize", {"format": "int3"}), ("relearn", {"batch": 0})
    ]  # fmt: skip
    with pytest.raises(UserError) as e:
        wanted(asked)
    text = str(e.value)
    for part in ("Did you mean 'relearn'", "'learning_rate'", "needs format", "int3", "batch=0"):
        assert part in text
    with pytest.raises(UserError, match="requested twice"):
        wanted([("strip", {}), ("strip", {})])
    with pytest.raises(UserError, match="name at least one"):
        wanted([])


def test_the_registry_knows_them():
    assert {"relearn", "quantize", "benign", "strip"} <= {m.name for m in methods("attack")}
    for m in methods("attack"):
        json.dumps(m.to_dict(), allow_nan=False)
        assert m.summary and m.source.url.startswith("http")


# --- a run ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block(bundle: ForgetRetain, tokenizer: Any) -> tuple[dict[str, Any], bool]:
    model = lora(llama())
    subjects: dict[str, Any] = on_one_model(model, {"base": None, "adapter": "default"})
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    subjects |= {"adapter:nan": lambda: nullcontext(broken), "retain_only": None}
    before = bits(model)
    asked = wanted([("strip", {}), ("quantize", {"format": "int8"}), ("relearn", {"steps": 2, "batch": 2})])
    calls: list[tuple[str, int, int]] = []
    found = run_attacks(
        subjects, asked, bundle, tokenizer, shown=3, adapter_id="sha256:x", base="embedded:people",
        progress=lambda *a: calls.append(a),
    )  # fmt: skip
    assert {what for what, _, _ in calls} >= {"adapter: relearn 0.0003", "base: quantize int8"}
    return found.to_dict(), same(bits(model), before)


def test_the_shape_of_the_json(block):
    found, untouched = block
    assert untouched
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"format", "attacks", "rows", "adapter_id", "base", "versions"}
    assert found["rows"] == {"scored": 5, "shown": 3, "seed": 0}
    for one in found["attacks"].values():
        assert set(one) == {"attack", "settings", "n", "subjects", "recovery", "about", "reasons"}
        assert one["n"] == 5 and set(one["subjects"]) == {"base", "adapter", "adapter:nan", "retain_only"}
        assert one["subjects"]["retain_only"] is None and "not given" in one["reasons"]["retain_only"]
        assert set(one["subjects"]["base"]) == {"before", "after"}
        assert set(one["recovery"]) == {"adapter", "adapter:nan", "retain_only"}
        for measure in one["recovery"]["adapter"].values():
            assert set(measure) == {"value", "ci95", "reason"} and (measure["value"] is None) == bool(measure["reason"])


def test_strip_recovers_exactly_what_the_base_has(block):
    one = block[0]["attacks"]["strip"]
    assert one["subjects"]["adapter"]["after"] == one["subjects"]["base"]["before"]


def test_nan_is_null_with_a_reason_and_the_others_are_measured(block):
    attacks = block[0]["attacks"]
    assert "loss is nan" in attacks["relearn"]["reasons"]["adapter:nan"]
    assert (
        attacks["relearn"]["subjects"]["adapter:nan"] is None and attacks["relearn"]["recovery"]["adapter:nan"] is None
    )
    rounded = attacks["quantize:int8"]
    assert set(rounded["subjects"]["adapter:nan"]["after"].values()) == {None}
    assert "logits are NaN" in rounded["recovery"]["adapter:nan"]["probability"]["reason"]
    assert rounded["subjects"]["adapter"]["after"]["probability"] is not None


def test_a_bundle_of_one_fact_has_nothing_to_show_but_is_scored(tokenizer):
    from eval_helpers import qa

    data = ForgetRetain([qa(0, "old")], [qa(1, "new")])
    model = lora(llama())
    found = run_attacks(
        on_one_model(model, {"base": None, "adapter": "default"}),
        wanted([("relearn", {}), ("strip", {})]),
        data,
        tokenizer,
    )
    assert found.rows == {"scored": 1, "shown": 0, "seed": 0}
    assert "no fact to spare" in found.attacks["relearn"].reasons["adapter"]
    assert (found.attacks["strip"].subjects["adapter"] or {})["after"]["probability"] is not None


def test_rows_without_values_have_the_other_measures(tokenizer):
    data = ForgetRetain([{"question": f"q{i}?", "answer": f"answer number {i}"} for i in range(3)])
    model = lora(llama())
    found = run_attacks(
        on_one_model(model, {"base": None, "adapter": "default"}), wanted([("strip", {})]), data, tokenizer, n=2
    )
    one = found.attacks["strip"]
    assert set((one.subjects["adapter"] or {})["before"]) == {"extraction_strength", "probability"} and one.n == 2
