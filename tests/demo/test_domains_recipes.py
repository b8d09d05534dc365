"""Every recipe for the embedded mixture of experts: understood, trained for a moment, saved, loaded elsewhere, judged, taken off."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import zygote

import peft_unlearn
from peft_unlearn.data import embedded
from peft_unlearn.data.formats import to_text
from peft_unlearn.demo import child
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.stack.model import ForgetModel, remove
from peft_unlearn.training.recipe import prepare

# name -> parameters that are trained: 5,120 for an expert (gate and up, down; rank 8), 1,024 for a router
TRAINED = {
    "domains-npo": 20_480, "domains-top1": 5_120, "domains-top3": 15_360, "domains-random-expert": 5_120,
    "domains-uoe-npo": 6_144, "domains-uoe-ga": 6_144, "domains-routers-only": 4_096,
    "domains-lora-all": 192_512, "domains-target-parameters": 163_840,
    "domains-wagle": 31_457,
}  # fmt: skip
QUICK = ("domains-uoe-npo", "domains-npo")
OURS_ALONE = (
    "domains-wagle",
)  # no stock type holds single entries of experts: it needs this package (tests/tuners/test_sparse.py)
PROMPTS = [to_text(row)[0] for row in embedded.rows("embedded:domains")["forget"][:4]]


def short(name: str) -> dict[str, Any]:
    recipe = load_recipe(embedded.asset("recipes", f"{name}.yaml"))
    recipe["train"] |= {"max_steps": 3, "warmup_steps": 0}
    if "every" in recipe["eval"]:
        recipe["eval"] |= {"n": 5}
    return recipe


def test_all_are_here():
    found = {p.stem for p in embedded.asset("recipes").glob("domains-*.yaml")}
    assert found == set(TRAINED)


@pytest.mark.parametrize("name", TRAINED)
def test_understood_and_what_it_would_train(name, tmp_path):
    path = embedded.asset("recipes", f"{name}.yaml")
    recipe = load_recipe(path)
    assert recipe["name"] == name
    assert f"peft-unlearn train adapters/recipes/{name}.yaml --out" in path.read_text(encoding="utf-8")
    run = prepare(recipe, tmp_path / "out")
    assert len(run.data.forget) == 80 and len(run.data.retain or []) == 640
    assert peft_unlearn.plan(recipe, tmp_path / "out").trainable == TRAINED[name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TRAINED if n not in OURS_ALONE]
)
def test_from_the_recipe_to_proof_of_removal(name, tmp_path, monkeypatch):
    if name != QUICK[0]:  # one in a process that is new in every respect
        monkeypatch.setattr(child, "subprocess", zygote)
    lines: list[str] = []
    folder = peft_unlearn.train(short(name), tmp_path / "a", progress=lines.append)
    assert folder is not None and f"({TRAINED[name]:,} trainable of" in "\n".join(lines)
    ours = "expert_lora" in str(folder.recipe["adapter"]["type"])
    if ours:  # on both sets, though ascent reads one
        assert all(f"\n  {k} " in lines[-1] for k in ("forget", "retain"))
    stock = json.loads((tmp_path / "a" / "adapter_config.json").read_text(encoding="utf-8"))
    assert stock["peft_type"] == "LORA" and stock["base_model_name_or_path"] == "peft-unlearn/domains"
    assert (tmp_path / "a" / "expert_lora" / "adapter_config.json").is_file() == ours

    there = child.run(embedded.base_path("domains"), tmp_path / "a", PROMPTS)
    stack = ForgetModel.from_pretrained(None, tmp_path / "a")
    moved = 0.0
    with torch.no_grad():
        for text, theirs in zip(PROMPTS, there["logits"], strict=True):
            ids = stack.tokenizer(text, return_tensors="pt")["input_ids"]
            here = stack.model(input_ids=ids).logits[0, -1]
            assert float((here - torch.tensor(theirs)).abs().max()) <= 1e-4
            with stack.model.disable_adapter():
                moved = max(moved, float((here - stack.model(input_ids=ids).logits[0, -1]).abs().max()))
    assert moved > 1e-3 or name == "domains-random-expert"

    report = peft_unlearn.evaluate([tmp_path / "a"], n=3)
    assert report.suite == "domains"
    assert report.subjects["base"]["forget/value_accuracy"] is not None
    assert report.subjects["retain_only"] is not None
    assert report.subjects["adapter"]["retain_unseen_geo/value_accuracy"] is not None

    removal = remove(tmp_path / "a")
    assert removal.ok and removal.digest == removal.base_digest
