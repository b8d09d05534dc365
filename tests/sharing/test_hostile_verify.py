"""`verify` never says ok of what it did not look at: emptied probes and lists, logits that are no numbers, odd scales, swapped ids."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tinyfolder
import torch

from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.manifest import probe_difference
from peft_unlearn.folder.read import file_sha256, read_adapter
from peft_unlearn.sharing import verify as verify_module
from peft_unlearn.sharing.verify import Verification, verify
from peft_unlearn.stack.model import remove


@pytest.fixture
def folder(local: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(local, tmp_path / "adapter"))


def edit(folder: Path, change: Any, name: str = "forget.json") -> None:
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    if name != "forget.json":
        edit(folder, lambda m: m["files"].update({name: file_sha256(folder / name)}))


def failed(found: Verification) -> set[str]:
    return {c.name for c in found.checks if c.verdict == "failed"}


def test_every_check_says_how_many_values_it_compared(folder: Path, base_dir: Path) -> None:
    found = verify(folder, base_dir)
    assert found.verdict == "ok" and len(found.checks) >= 8
    for check in found.checks:
        assert re.match(r"[1-9][\d,]* ", check.detail), check


PROBES: dict[str, tuple[Any, set[str]]] = {
    "all lists": (lambda p: p.update(prompts=[], base=[], adapter=[]), {"probes, adapter on", "probes, adapter off"}),
    "all values": (
        lambda p: [r.update(ids=[], logits=[]) for r in (*p["base"], *p["adapter"])], {"probes, adapter on", "probes, adapter off"},
    ),
    "values with it on": (lambda p: [r.update(ids=[], logits=[]) for r in p["adapter"]], {"probes, adapter on"}),
    "values with it off": (lambda p: [r.update(ids=[], logits=[]) for r in p["base"]], {"probes, adapter off"}),
}  # fmt: skip


@pytest.mark.parametrize("what", PROBES)
def test_hostile_emptied_probes(what: str, folder: Path, base_dir: Path) -> None:
    change, expected = PROBES[what]
    edit(folder, lambda m: change(m["probes"]))
    found = verify(folder, base_dir)
    assert failed(found) == expected and found.verdict == "failed" and "nothing to compare" in str(found)
    if "adapter off" in str(expected):
        assert remove(folder, base_dir).verdict == "cannot tell"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["all", "one"])
def test_hostile_logits_that_are_no_numbers(
    bad: float, where: str, folder: Path, base_dir: Path, monkeypatch: Any
) -> None:
    load = load_base

    def broken(*a: Any, **k: Any) -> Any:
        model = load(*a, **k)

        def spoil(m: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[..., slice(None) if where == "all" else slice(0, 1)] = bad
            return out

        model.lm_head.register_forward_hook(spoil)
        return model

    rows = read_adapter(folder).manifest.probes
    assert rows is not None and any(0 in r["ids"] for r in rows.base)
    assert probe_difference(broken(base_dir), tinyfolder.tokenizer(), rows.prompts, rows.base) == float("inf")
    monkeypatch.setattr("peft_unlearn.folder.base.load_base", broken)
    monkeypatch.setattr("peft_unlearn.stack.model.load_base", broken)
    found = verify(folder, base_dir)
    assert "probes, adapter off" in failed(found) and "not a number" in str(found)
    report = remove(folder, base_dir)
    assert not report.ok and "do not give the base's logits" in str(report)
    json.dumps(report.to_dict()), json.dumps(found.to_dict())


@pytest.mark.parametrize("scale", [0, 0.0, -1, -0.5, -0.0])
def test_hostile_scale(scale: float, folder: Path, base_dir: Path) -> None:
    edit(folder, lambda m: m.update(scale=scale))
    found = verify(folder, base_dir)
    assert failed(found) == {"scale"} and f"scale is {scale!r}" in str(found)


@pytest.mark.parametrize("change", [{"lora_alpha": 0}, {"lora_alpha": -8}, {"alpha_pattern": {"q_proj": -3}}], ids=str)
def test_hostile_scale_in_the_configuration(change: dict[str, Any], folder: Path, base_dir: Path) -> None:
    edit(folder, lambda c: c.update(change), "adapter_config.json")
    assert "scale" in failed(verify(folder, base_dir))


def test_hostile_swapped_ids_of_the_tokenizer(folder: Path, base_dir: Path) -> None:
    """Two words that no probe has in it."""

    def swap(t: dict[str, Any]) -> None:
        vocab = t["model"]["vocab"]
        vocab["</s>"], vocab["<s>"] = vocab["<s>"], vocab["</s>"]

    edit(folder, swap, "tokenizer.json")
    found = verify(folder, base_dir)
    assert "tokenizer" in failed(found) and "2 of its words have other ids" in str(found)


@pytest.mark.parametrize("name", ["adapter_config.json", "recipe.yaml", "tokenizer.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["left out", "no hash"])
def test_hostile_files_without_a_hash(name: str, how: str, folder: Path, base_dir: Path) -> None:
    edit(folder, lambda m: m["files"].update({name: None}) if how == "no hash" else m["files"].pop(name))
    assert "files" in failed(verify(folder, base_dir))
    edit(folder, lambda m: m.update(files={}))
    assert "files" in failed(verify(folder, base_dir))


def test_hostile_targets(folder: Path, base_dir: Path) -> None:
    edit(folder, lambda m: m["base"].update(digest_targeted=None))
    assert failed(verify(folder, base_dir)) == {"targets"}  # neither names nor a digest: nothing to compare
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    names += [n.replace(".0.", ".1.") for n in names]
    edit(folder, lambda m: m.update(targets=names))
    found = verify(folder, base_dir)
    assert found.verdict == "ok" and "4 adapted weights" in str(found)
    for wrong in (names[:1], [*names, "model.layers.0.self_attn.k_proj"], ["lm_head"], ["model.layer"]):
        edit(folder, lambda m, wrong=wrong: m.update(targets=wrong))
        assert failed(verify(folder, base_dir)) == {"targets"}, wrong


def test_a_check_of_no_values_has_failed() -> None:
    found = Verification("x")
    found.compared("a", 3, "things")
    assert found.verdict == "ok"
    found.compared("b", 0, "things")
    assert found.verdict == "failed" and "nothing to compare" in found.checks[1].detail
    assert verify_module.Check
