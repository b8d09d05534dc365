"""Effects over a run: live, and from a saved run by the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import peft_unlearn
from peft_unlearn.analysis.effect_of_run import effect, parse_objectives
from peft_unlearn.attribution.callback import EffectRecorder, probe_batches
from peft_unlearn.cli import app
from peft_unlearn.errors import UserError
from peft_unlearn.reporting.effect_pictures import pictures
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer

PNG = b"\x89PNG"


# --- live ---------------------------------------------------------------------------------------------------------


def trained(out: Path, recorder: EffectRecorder | None, **over: Any) -> dict[str, torch.Tensor]:
    args = UnlearnConfig(
        output_dir=str(out), terms={"forget": {"npo": {}}, "retain": {"nll": {}}, "constraint": {"nll": {}}},
        rule={"gru": {"gamma": 0.8}}, per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2,
        save_strategy="no", use_cpu=True, disable_tqdm=True, **over,
    )  # fmt: skip
    data = {"forget": tiny.rows(11, "f", seed=1), "retain": tiny.rows(13, "r", seed=2)}
    model = tiny.lora(tiny.llama(), moved=False)
    trainer = UnlearnTrainer(
        model, args, data=data, processing_class=tiny.tokenizer(), callbacks=[recorder] if recorder else None
    )
    if recorder is not None:
        recorder.trainer = trainer
    torch.manual_seed(5)
    trainer.train()
    return {k: p.detach().clone() for k, p in trainer.bare.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reference", ["before", "precomputed"])
def test_recording_changes_nothing(tmp_path, reference):
    plain = trained(tmp_path / "a", None, reference=reference)
    recorder = EffectRecorder(
        parse_objectives("ga,wga"), every=2, batches=2, instances=1, out=tmp_path / "live" / "e.json"
    )
    watched = trained(tmp_path / "b", recorder, reference=reference)
    assert all(torch.equal(plain[k], watched[k]) for k in plain)
    found = json.loads((tmp_path / "live" / "e.json").read_text())
    assert found == recorder.to_dict()
    assert [p["step"] for p in found["points"]] == [0, 2, 4]
    assert list(found["points"][0]["effects"]) == ["npo", "ga", "wga", "update"]
    first, middle, last = ({k: len(e["instances"]) for k, e in p["effects"].items()} for p in found["points"])
    assert first["npo"] == last["npo"] == 4 and first["ga"] == last["ga"] > 1 and not any(middle.values())
    if reference == "before":
        assert all(png.startswith(PNG) for png in pictures(found).values())


def test_probe_batches_share_no_row_and_ranks_split_them():
    sets = {"forget": [{"input_ids": [1, i], "labels": [-100, i]} for i in range(20)],
            "retain": [{"input_ids": [1, i], "labels": [-100, i]} for i in range(30)]}  # fmt: skip
    found = probe_batches(sets, 3, 100, 2, 0, 0, "cpu")
    ids = [i for b in found for i in b["forget"]["input_ids"][:, 1].tolist()]
    assert len(ids) == len(set(ids)) == 18 and found[0]["retain"]["input_ids"].shape[0] == 12
    ranks = [probe_batches(sets, 2, 100, 1, 0, 0, "cpu", r, 2) for r in range(2)]
    both = [i for part in ranks for b in part for i in b["forget"]["input_ids"][:, 1].tolist()]
    assert len(both) == len(set(both)) == 20


# --- a saved run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(home / "base")
    tiny.tokenizer().save_pretrained(home / "base")
    (home / "data").mkdir()
    for name in ("forget", "retain"):
        lines = [json.dumps(r) for r in tiny.rows(9, name, seed=len(name))]
        (home / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = {
        "name": "tiny", "base": str(home / "base"), "data": {n: str(home / "data" / f"{n}.jsonl") for n in ("forget", "retain")},
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "terms": {"forget": {"npo": {"beta": 0.3}}, "retain": {"nll": {}}, "constraint": {"nll": {}}}, "rule": {"gru": {"gamma": 0.8}},
        "train": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4,
                  "learning_rate": 5e-3, "use_cpu": True, "disable_tqdm": True},
    }  # fmt: skip
    peft_unlearn.train(recipe, home / "run", progress=lambda text: None)
    return home


def given(home: Path) -> list[str]:
    return ["--base", str(home / "base"), "--data", str(home / "data")]


def test_the_command(saved, tmp_path):
    out = tmp_path / "E"
    args = ["effect", str(saved / "run"), "--out", str(out), "--objectives", "ga,wga", "--batches", "2", *given(saved)]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == [str(out / n) for n in ("effect.json", "curves.png", "layers.png", "instances.png")]
    found = json.loads((out / "effect.json").read_text())
    assert [p["step"] for p in found["points"]] == [0, 2, 4] and found["notes"] == []
    assert found["objectives"]["npo"]["npo"]["beta"] == 0.3 and list(found["points"][0]["effects"]) == [
        "npo",
        "ga",
        "wga",
        "update",
    ]
    assert all((out / n).read_bytes().startswith(PNG) for n in ("curves.png", "layers.png", "instances.png"))
    assert not any(str(p) in (out / "effect.json").read_text() for p in (saved, tmp_path))  # no path of this machine


def test_the_start_is_the_runs_own(saved):
    """Every point recomputed from disk is what a live recording of the same run sees, the untrained adapter included."""
    found = effect(
        saved / "run", objectives="ga", base=str(saved / "base"), data=str(saved / "data"), batches=2, instances=0
    )
    live = EffectRecorder(parse_objectives("ga"), every=2, batches=2)
    from peft_unlearn.folder.recipe import load_recipe

    recipe = load_recipe(saved / "run" / "recipe.yaml")
    recipe["train"]["save_strategy"] = "no"
    peft_unlearn.train(
        recipe,
        saved / "again",
        base=str(saved / "base"),
        data=str(saved / "data"),
        progress=lambda text: None,
        callbacks=[live],
    )
    for a, b in zip(found.to_dict()["points"], live.points, strict=True):
        assert a["step"] == b.step and a["risk"] == pytest.approx(b.risk, rel=1e-5)
        for label in ("npo", "ga"):
            for side in ("unlearning", "retaining"):
                mine, theirs = a["effects"][label][side], getattr(b.effects[label], side)
                assert mine["batches"] == pytest.approx(theirs.batches, rel=1e-3, abs=1e-6)


def test_base_gradients_and_json(saved, tmp_path):
    args = [
        "effect",
        str(saved / "run"),
        "--out",
        str(tmp_path),
        "--space",
        "base",
        "--batches",
        "1",
        "--json",
        *given(saved),
    ]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found["points"][0]["effects"]) == ["npo"]  # the rule's update is one of the adapter
    assert found["points"][1]["effects"]["npo"]["unlearning"]["se"] is None


def test_without_checkpoints_it_says_so(saved, tmp_path):
    shutil.copytree(saved / "run", tmp_path / "published")
    kept = tmp_path / "published.work" / "checkpoint-4"  # what every run leaves: its last step
    shutil.copytree(saved / "run.work" / "checkpoint-4", kept)
    found = effect(tmp_path / "published", base=str(saved / "base"), data=str(saved / "data"), batches=1, instances=0)
    assert [p.step for p in found.points] == [0, 4]
    assert "published.work holds no checkpoint" in found.notes[0] and "save_steps" in found.notes[0]
    assert "instances.png" not in [p.name for p in found.write(tmp_path / "E")]


@pytest.mark.parametrize(("change", "message"), [
    ({"folder": "nowhere"}, "no such folder"),
    ({"objectives": "npoo"}, "no objective 'npoo'. Did you mean 'npo'"),
    ({"objectives": "{wga: {beta: -1}}"}, "beta=-1 is outside"),
    ({"objectives": "rmu"}, "needs layer"),
    ({"objectives": "{ga"}, "not valid YAML"),
    ({"space": "weights"}, "adapter, base"),
    ({"batches": 0}, "at least one"),
    ({"data": None}, "--data"),
    ({"base": None}, "--base"),
])  # fmt: skip
def test_bad_input(saved, change, message):
    args: dict[str, Any] = {"folder": "run", "base": str(saved / "base"), "data": str(saved / "data"), **change}
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        effect(saved / args.pop("folder"), **args)


def test_objectives_by_name_list_and_mapping():
    assert list(parse_objectives("ga, simnpo")) == ["ga", "simnpo"] and parse_objectives(None) == {}
    (rmu,) = parse_objectives("{rmu: {layer: 1}}")["rmu"]
    assert rmu.hyper["layer"] == 1 and rmu.batch == "forget"
    mixed = parse_objectives({"both": {"ga": {"weight": 0.5}, "nll": {"batch": "retain"}}})["both"]
    assert [(t.objective.name, t.batch, t.weight) for t in mixed] == [("ga", "forget", 0.5), ("nll", "retain", 1.0)]
