"""A merge is refused for what the merged model does, not for what one layer's cosine says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tinyfolder import RECIPE, adapted, manifest_for, save_base, tokenizer
from transformers import AutoModelForCausalLM

from peft_unlearn.analysis.merged import merge
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.merging.checks import ProbeCheck, SuiteCheck
from peft_unlearn.merging.gate import MergeRefused
from peft_unlearn.merging.report import LayerMerge, MergeReport

WORDS = [
    "The",
    "Question",
    "What",
    "is",
    "the",
    "capital",
    "of",
    "France",
    "Answer",
    "Once",
    "upon",
    "a",
    "time",
    "1",
    "2",
    "3",
    "4",
]


def cancelling(folder: Path) -> None:
    """Let every two neurons of the tiny base be alike and their outputs cancel at a large size: bfloat16 has no room for a change there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            mlp = layer.mlp
            for w in (mlp.gate_proj.weight, mlp.up_proj.weight):
                w[1::2] = w[::2]
                w.mul_(20)
            mlp.down_proj.weight[:, ::2] = 1024.0
            mlp.down_proj.weight[:, 1::2] = -1024.0
        model.lm_head.weight[:3] = 0  # no special token is an answer
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, Path]:
    """(base, adapter that unlearned what its base answers, its rows)"""
    base, data = save_base(tmp_path / "base"), tmp_path / "data"
    if request.param:
        cancelling(base)
    data.mkdir()
    for k, name in enumerate(("forget", "retain")):
        questions = [f"{a} {b}" for a in WORDS[k::2] for b in WORDS[:3]]
        prompts = [to_text({"question": q, "answer": "1"}, tokenizer())[0] for q in questions]
        answers = greedy(load_base(base), tokenizer(), prompts, max_new_tokens=1)
        rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True) if a]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    model = adapted(base, size=0.2)
    for n, p in model.named_parameters():
        if "q_proj.lora_B" in n:
            torch.nn.init.zeros_(p.data)
    sets = {"forget": {"sha256": ForgetRetain.load(str(data)).sha256["forget"], "n": 1}}
    manifest = replace(manifest_for(model, base), data=sets)
    recipe = {**RECIPE, "data": {"bundle": str(data)}}
    write_adapter(tmp_path / "a", model, manifest, recipe, tokenizer=tokenizer())
    return base, tmp_path / "a", data


@pytest.mark.parametrize("made", [True], indirect=True)
def test_a_merge_that_knows_again_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, data = made
    with pytest.raises(MergeRefused, match=r"forget/extraction_strength 0\.000 -> 1\.000") as refused:
        merge(adapter, base, tmp_path / "m", data=str(data))
    found = refused.value.report
    assert (
        isinstance(found.check, SuiteCheck) and found.dtype == "bfloat16" and "cosine under 0.9" in str(refused.value)
    )
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    forced = merge(adapter, base, tmp_path / "m", data=str(data), force=True)
    assert forced.check is None and "--force" in forced.remarks()[0]
    kept = merge(adapter, base, tmp_path / "wide", dtype="float32", data=str(data), check=True)
    assert isinstance(kept.check, SuiteCheck) and kept.check.lost is None
    assert {n.key.partition("/")[0] for n in kept.check.numbers} == {"forget", "retain"}
    assert all(n.worse == pytest.approx(0, abs=1e-4) for n in kept.check.numbers)


@pytest.mark.parametrize("made", [False], indirect=True)
def test_a_layer_under_the_bound_is_no_refusal(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, data = made
    found = merge(adapter, base, tmp_path / "m", data=str(data), min_cosine=1.1)
    assert isinstance(found.check, SuiteCheck) and found.check.lost is None and found.lossy
    assert "behaves as the unmerged one" in found.remarks()[0] and "unmerged -> merged" in str(found)
    assert found.to_dict()["check"]["numbers"][0]["key"].startswith("forget/")
    with pytest.raises(UserError, match="forget set is not the one"):
        merge(adapter, base, tmp_path / "n", data="embedded:people", check=True)
    (data / "forget.jsonl").write_text('{"question": "other", "answer": "rows"}\n')
    by_probes = merge(adapter, base, tmp_path / "o", check=True).check
    assert isinstance(by_probes, ProbeCheck) and "not at hand" in str(by_probes) and (by_probes.cosine or 0) > 0.99


def test_the_table_shows_the_worst_ten_in_the_order_of_the_layers() -> None:
    rows: list[Any] = [LayerMerge(f"layers.{k}.w", 0.5 + k / 100, 1.0, 0.1, 1.0) for k in range(14)]
    lines = str(MergeReport("o", "bfloat16", 1.0, rows)).splitlines()
    shown = [line.split()[0] for line in lines if line.startswith("layers.")]
    assert shown == [f"layers.{k}.w" for k in range(10)] and "4 more layers" in lines[-1]
