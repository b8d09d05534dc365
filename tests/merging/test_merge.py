"""Merging keeps the adapter or is refused, and says per layer what was kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tinyfolder import RECIPE, adapted, logits, manifest_for, save_base, write
from transformers import AutoModelForCausalLM

from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.merging.gate import MergeRefused
from peft_unlearn.merging.merge import merge


def test_float32_merge_equals_the_adapted_model(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    report = merge(adapter_dir, base_dir, out, dtype="float32")
    assert len(report.layers) == 4 and (report.worst_cosine or 0) > 0.9999
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.allclose(logits(model), logits(adapted(base_dir)), atol=1e-5)
    assert report.digest == digest_checkpoint(out)
    assert (out / "tokenizer.json").is_file() and list(tmp_path.iterdir()) == [out]
    for path in out.glob("*.json"):
        assert str(base_dir) not in path.read_text()


def test_table_against_a_literal_computation(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    report = merge(adapter_dir, base_dir, tmp_path / "m", dtype="bfloat16", scale=3.0)
    assert report.dtype == "bfloat16" and "cosine" in str(report)
    base, merged = (load_file(str(d / "model.safetensors")) for d in (base_dir, tmp_path / "m"))
    model = adapted(base_dir)
    for row in report.layers:
        w = base[row.name + ".weight"].double()
        d = model.get_submodule("base_model.model." + row.name).get_delta_weight("default").double() * 3
        new = merged[row.name + ".weight"]
        assert new.dtype == torch.bfloat16
        kept = new.double() - w
        assert row.cosine == pytest.approx(torch.cosine_similarity(kept.flatten(), d.flatten(), dim=0).item(), abs=1e-6)
        assert row.changed == pytest.approx((kept != 0).double().mean().item())
        assert row.relative == pytest.approx((d.norm() / w.norm()).item(), rel=1e-5)


def test_a_small_delta_is_not_lost_silently(base_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "small", base_dir, size=1e-5)
    with pytest.raises(MergeRefused, match="--dtype float32") as e:
        merge(tmp_path / "small", base_dir, tmp_path / "m", dtype="bfloat16")
    assert (e.value.report.worst_cosine or 0) < 0.9 and not (tmp_path / "m").exists()
    assert merge(tmp_path / "small", base_dir, tmp_path / "m", dtype="float32").worst_cosine is not None


def test_refusals(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=9)
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    for kwargs, message in (
        ({"base_dir": other, "out": tmp_path / "m"}, "other weights"),
        ({"base_dir": base_dir, "out": full}, "never replaces"),
        ({"base_dir": base_dir, "out": tmp_path / "m", "dtype": "int8"}, "expected one of"),
        ({"base_dir": base_dir}, "--out"),
        ({"base_dir": base_dir, "out": tmp_path / "m", "dtype": "float16", "scale": 1e8}, "does not fit float16"),
    ):
        with pytest.raises(UserError, match=message):
            merge(adapter_dir, **kwargs)
    assert not (tmp_path / "m").exists()


def test_what_is_not_a_plain_sum(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    for key, value, message in (
        ("use_dora", True, "DoRA"),
        ("bias", "all", "biases"),
        ("peft_type", "IA3", "type IA3"),
    ):
        bad = tmp_path / key
        shutil.copytree(adapter_dir, bad)
        config = json.loads((bad / "adapter_config.json").read_text())
        (bad / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        manifest = json.loads((bad / "forget.json").read_text())
        manifest["files"]["adapter_config.json"] = None
        (bad / "forget.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=message):
            merge(bad, base_dir, tmp_path / "m")


def test_an_adapted_tied_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from tinyfolder import randomize

    from peft_unlearn.folder.base import load_base

    base = save_base(tmp_path / "base", tie=True)
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    randomize(model, 0)
    manifest = manifest_for(adapted(base), base)
    write_adapter(tmp_path / "head", model, manifest, RECIPE)
    with pytest.raises(UserError, match="is tied to"):
        merge(tmp_path / "head", base, tmp_path / "m")
