"""The search for settings: what it is after, how it decides, what it leaves on disk, and that it goes on from there."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import suites
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.request.goal import LEAST, MOST, Goal, numbers_by_set
from peft_unlearn.request.runs import RATES, Trial, Tuner
from peft_unlearn.request.settings import Settings, seconds_of
from peft_unlearn.request.tune import tune, with_settings

RECIPE: dict[str, Any] = {
    "name": "tuned",
    "base": "embedded:people",
    "data": {"bundle": "embedded:people", "per_anchor": 1},
    "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "terms": {"forget": {"npo": {"weight": 1.0}}, "retain": {"nll": {}}},
    "train": {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True},
    "eval": {"suite": "people", "n": 4},
    "tune": {"trials": 1, "most": {"forget": 0.9}, "least": {"retain": 0.5}},
}


def goal(base: dict[str, float], rows: dict[str, int] | None = None) -> Goal:
    return Goal.of(suites.load("own"), base, rows or {})


def test_what_is_missing_and_what_is_best() -> None:
    g = goal({"forget": 1.0, "wordings": 1.0, "retain": 1.0, "neighbors": 0.9, "general": 1.0})
    assert set(g.most) == {"forget", "wordings"} and set(g.least) == {"neighbors", "general"}
    good = {"forget": MOST["forget"], "wordings": 0.0, "neighbors": LEAST["neighbors"] * 0.9, "general": 0.96}
    assert g.missing(good) == {}
    assert set(g.missing({**good, "wordings": 0.5, "neighbors": 0.1})) == {"wordings", "neighbors"}
    # whatever holds the floors comes before whatever does not, however much that forgets
    assert g.loss({**good, "forget": 1.0, "wordings": 1.0}) < g.loss({**good, "forget": 0.0, "neighbors": 0.7})
    # 18 of 24 where the base has 19: no whole number of rows lies between that and the floor of .95
    close = {"general": 18 / 24}
    assert goal({"general": 19 / 24}).missing(close) and not goal({"general": 19 / 24}, {"general": 24}).missing(close)
    assert goal({"general": 19 / 24}, {"general": 24}).missing({"general": 17 / 24})
    assert g.aims()["forget"] == "<= 0.10" and g.aims()["general"] == ">= 0.95"


def test_rows_without_a_value_are_judged_by_what_they_have() -> None:
    found = {
        "forget/probability": 0.5,
        "forget/extraction_strength": 0.4,
        "retain/value_accuracy": 1.0,
        "retain/probability": 0.2,
    }
    assert numbers_by_set(found) == {"forget": 0.4, "retain": 1.0}
    assert Goal.of(suites.load("people"), {"forget": 1.0, "retain": 1.0}, {}, {"forget": 0.3}).most == {"forget": 0.3}


def test_a_budget_in_words() -> None:
    assert seconds_of("90") == seconds_of("90s") == seconds_of("1.5m") == 90


def test_the_knobs_of_a_recipe() -> None:
    before = copy.deepcopy(RECIPE)
    made = with_settings(RECIPE, Settings(learning_rate=1e-3, steps=7, forget_weight=3.0))
    assert (
        before == RECIPE and made["terms"]["forget"]["npo"]["weight"] == 3.0 and made["terms"]["retain"] == {"nll": {}}
    )
    assert (made["train"]["learning_rate"], made["train"]["max_steps"]) == (1e-3, 7)


class Still(Tuner):
    """A tuner that trains nothing: what a run found is given."""

    def __init__(self, g: Goal, found: list[dict[str, float]], **ended: Any) -> None:
        self.goal, self.most_trials, self.trials, self.judging, self.deadline = g, 4, [None], 0.0, 1e12  # type: ignore[list-item]
        self.best = (0.0, None, found[-1], Settings(), 1)  # type: ignore[assignment]
        self.trial = Trial(Settings(), [{"step": i, **f} for i, f in enumerate(found)], **ended)

    def next(self) -> Settings | None:
        return self._next(self.trial, 1.0)


def test_the_order_of_knobs() -> None:
    g, s = goal({"forget": 1.0, "neighbors": 1.0}), Settings()
    assert Still(g, [{"forget": 0.0, "neighbors": 1.0}]).next() is None
    assert Still(g, [{"forget": 0.0, "neighbors": 0.2}]).next() == replace(
        s, learning_rate=s.learning_rate / 2, steps=60
    )
    assert Still(g, [{"forget": 0.9, "neighbors": 1.0}]).next() == replace(s, learning_rate=3 * s.learning_rate)
    assert Still(g, [{"forget": 0.3, "neighbors": 1.0}]).next() == replace(s, forget_weight=2.0, steps=50)
    lost = Still(g, [{"forget": 1.0, "neighbors": 1.0}], diverged=True).next()
    assert lost == replace(s, learning_rate=s.learning_rate / 3)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("out") / "T"
    lines: list[str] = []
    return tune(RECIPE, out, budget="5m", log=lines.append), out, lines


def test_a_recipe_is_tuned_into_an_adapter(tuned) -> None:
    found, out, lines = tuned
    assert found.found["forget"] < found.base["forget"] and len(found.trials) == 1
    assert found.exit_code == (1 if found.lacking else 0) and found.verdict() in str(found)
    assert read_adapter(out).recipe["train"]["learning_rate"] == found.best["learning_rate"]
    work = out.with_name("T.work")
    assert load_recipe(work / "recipe.yaml")["train"]["max_steps"] == found.trials[0]["settings"]["steps"]
    assert (work / "trials.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((work / "trials.json").read_text())
    assert kept["trials"] == found.trials and kept["best"]["numbers"] == found.found
    # The range probe went up through the rates and left no trace: the run began where the adapter does nothing.
    assert [r["rate"] for r in found.rates] == sorted(r["rate"] for r in found.rates) and found.rates[0][
        "rate"
    ] == RATES[0]
    assert any("the probe" in line for line in lines)


def test_a_search_goes_on_from_its_finished_runs(tuned) -> None:
    found, out, _ = tuned
    lines: list[str] = []
    again = tune({**RECIPE, "tune": {**RECIPE["tune"], "trials": 1}}, out, budget="5m", log=lines.append)
    assert any("going on after 1 run" in line for line in lines) and not any(line.startswith("run ") for line in lines)
    assert again.trials == found.trials and again.found == found.found
    (out.with_name("T.work") / "trials.json").write_text("{")  # half a file is as none
    lines.clear()
    third = tune({**RECIPE, "train": {**RECIPE["train"], "max_steps": 3}}, out, budget="5m", log=lines.append)
    assert any(line.startswith("run 1") for line in lines) and len(third.trials) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tune": {"budgte": "5m"}}, "tune has no 'budgte'"),
        ({"tune": {"most": {"forget": "x"}, "trials": 0}}, r"(?s)2 problems.*trials.*most|2 problems.*most.*trials"),
        ({"tune": [1]}, "tune is a section with keys"),
        ({"terms": {"retain": {"nll": {}}}}, "the recipe has none"),
        ({"adapter": {**RECIPE["adapter"], "negate": 1.0}}, "adapter.negate"),
        ({"tune": {"budget": "soon"}}, "--budget soon"),
    ],
)
def test_bad_input_of_tune(change, why, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        tune({**RECIPE, **change}, tmp_path / "T", log=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_the_masks_of_structures_hold_in_every_run(tmp_path: Path) -> None:
    recipe = {
        **RECIPE,
        "selection": {"method": "magnitude", "ratio": 0.1, "unit": "row", "budget": "module"},
        "eval": {"suite": "people", "n": 2},
    }
    recipe["train"] = {**RECIPE["train"], "max_steps": 2}
    tune(recipe, tmp_path / "T", budget="5m", log=lambda _: None)
    factors = load_file(tmp_path / "T" / "adapter_model.safetensors")
    moved = sum(int(t.any(1).sum()) for n, t in factors.items() if "lora_B" in n)
    rows = sum(len(t) for n, t in factors.items() if "lora_B" in n)
    assert 0 < moved <= 0.15 * rows
