"""Adapters on their base: checked, switched, scaled, stacked."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tinyfolder import IDS, adapted, logits, save_base, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.stack.model import ForgetModel


def test_one_adapter(base_dir: Path, adapter_dir: Path) -> None:
    model = ForgetModel.from_pretrained(base_dir, adapter_dir)
    assert model.active() == ["default"] and model.base_dir == base_dir
    assert torch.equal(logits(model.model), logits(adapted(base_dir)))
    with model.disabled() as inner:
        assert model.active() == [] and torch.equal(logits(inner), logits(load_base(base_dir)))
    assert not any(p.requires_grad for p in model.model.parameters())
    assert model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 8)
    assert model.tokenizer("The")["input_ids"] == [3]


def test_the_scale_of_an_adapter(base_dir: Path, adapter_dir: Path) -> None:
    model = ForgetModel.from_pretrained(base_dir, [adapter_dir], scales=[0.0])
    assert torch.equal(logits(model.model), logits(load_base(base_dir))) and model.scales() == {"default": 0.0}
    model.scale("default", 1)
    assert torch.equal(logits(model.model), logits(adapted(base_dir)))
    with pytest.raises(UserError, match="no adapter 'x'"):
        model.scale("x", 1)
    with pytest.raises(UserError, match="finite"):
        model.scale("default", float("nan"))
    with pytest.raises(UserError, match="2 given for 1"):
        ForgetModel.from_pretrained(base_dir, adapter_dir, scales=[1, 2])


def test_the_manifests_scale_holds(base_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "half", base_dir, scale=0.5)
    assert ForgetModel.from_pretrained(base_dir, tmp_path / "half").scales() == {"default": 0.5}


def test_two_adapters_add_up(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", base_dir, seed=2)
    both = ForgetModel.from_pretrained(base_dir, {"one": adapter_dir, "two": tmp_path / "b"})
    assert sorted(both.active()) == ["one", "two"]
    base, first, second = load_base(base_dir), adapted(base_dir, 1), adapted(base_dir, 2)
    for name, w in base.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            for m in (first, second):
                w.data += m.get_submodule("base_model.model." + name.removesuffix(".weight")).get_delta_weight(
                    "default"
                )
    assert torch.allclose(logits(both.model), logits(base), atol=1e-5)
    both.scale("two", 0)
    assert torch.allclose(logits(both.model), logits(first), atol=1e-6)
    named = ForgetModel.from_pretrained(base_dir, [adapter_dir, tmp_path / "b"])
    assert list(named.adapters) == [adapter_dir.name, "b"]


def test_dependencies_stand_below(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    below = read_adapter(adapter_dir).adapter_id
    write(tmp_path / "top", base_dir, seed=2, depends_on=[below])
    for order in ([tmp_path / "top"], [tmp_path / "top", adapter_dir]):
        with pytest.raises(UserError, match="not below it"):
            ForgetModel.from_pretrained(base_dir, order)
    ForgetModel.from_pretrained(base_dir, [adapter_dir, tmp_path / "top"])


def test_other_weights_are_refused(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="other weights, on which this adapter means nothing"):
        ForgetModel.from_pretrained(other, adapter_dir)
    with pytest.raises(UserError, match="--base"):  # the manifest knows the base by its digest alone
        ForgetModel.from_pretrained(None, adapter_dir)
    with pytest.raises(UserError, match="No adapter"):
        ForgetModel.from_pretrained(base_dir, [])
    with pytest.raises(UserError, match="letters, digits"):
        ForgetModel.from_pretrained(base_dir, {"a.b": adapter_dir})


def test_an_adapter_of_other_shapes_is_refused(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(adapter_dir, bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    manifest = json.loads((bad / "forget.json").read_text())
    manifest["files"]["adapter_config.json"] = None
    (bad / "forget.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="PEFT cannot put this adapter on the base"):
        ForgetModel.from_pretrained(base_dir, bad)
