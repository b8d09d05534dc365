"""The streamed merge is the merge through the model, bit for bit, whatever the layout on disk."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tinyfolder import RECIPE, randomize, tokenizer
from transformers import AutoModelForCausalLM

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import base_reference
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.manifest import Manifest
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.merging import layout
from peft_unlearn.merging.merge import merge

NAMES = ["olmoe", "mixtral", "gpt_oss", "granitemoe"]
MORE = ["qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v2", "deepseek_v3", "llama4_text"]


def save(model: Any, path: Path, shard: str = "30KB") -> Path:
    model.to(torch.bfloat16).save_pretrained(str(path), max_shard_size=shard)
    tokenizer().save_pretrained(str(path))
    return path


def adapter(base: Path, out: Path) -> Path:
    """Attention, both projections of the experts of one layer, and a router."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    blocks = families.moe_blocks(model)
    block = blocks[max(blocks)]
    targets = [f"{block.experts}.{p}" for p in ("gate_up_proj", "down_proj")] + [f"{block.router}.weight"]
    first = "q_a_proj" if "deepseek" in str(out) else "q_proj"
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[first], target_parameters=targets, task_type="CAUSAL_LM")
    model = families.quietly(get_peft_model, model, config).eval()
    randomize(model, 1, 0.2)
    with torch.no_grad():  # three of the eight experts
        for n, p in model.named_parameters():
            if "experts" in n and "lora_B" in n:
                p.view(p.shape[0], -1, 8)[:, :, [0, 2, 3, 5, 6]] = 0
    families.quietly(write_adapter, out, model, manifest(base), RECIPE, tokenizer=tokenizer())
    return out


def manifest(base: Path) -> Manifest:
    digest = digest_checkpoint(base)
    return Manifest(
        base=base_reference(str(base), base, digest),
        method={"terms": RECIPE["terms"]},
        data={"forget": {"sha256": "a" * 64, "n": 100}},
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("family", [*NAMES, *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)])
def test_streamed_equals_in_memory(family: str, tmp_path: Path) -> None:
    over = {"interleave_moe_layer_step": 1} if family == "llama4_text" else {}
    base = save(families.base(family, **over), tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 2
    folder = adapter(base, tmp_path / f"{family}-adapter")
    streamed = merge(folder, base, tmp_path / "s", dtype="bfloat16")
    built = merge(folder, base, tmp_path / "m", dtype="bfloat16", in_memory=True)
    a, b = tensors(tmp_path / "s"), tensors(tmp_path / "m")
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    assert streamed.digest == digest_checkpoint(tmp_path / "s") == built.digest
    assert {r.name for r in streamed.layers} == {r.name for r in built.layers}
    ours = {r.name: r for r in streamed.layers}
    for row in built.layers:
        assert ours[row.name].cosine == pytest.approx(row.cosine, abs=1e-6)
        assert ours[row.name].changed == pytest.approx(row.changed)
    assert sum("gate_up_proj[" in r.name for r in streamed.layers) == 3
    merge(folder, base, tmp_path / "s32", dtype="float32")
    wanted = families.quietly(adapted, base, folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s32", dtype=torch.float32).eval()
    assert families.error(families.logits(model), families.logits(wanted)) < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert families.error(families.logits(model), families.logits(plain)) > 1e-2


def adapted(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder)
    ).eval()


def test_untouched_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    base = save(families.base("olmoe"), tmp_path / "base")
    report = merge(adapter(base, tmp_path / "a"), base, tmp_path / "m", dtype="bfloat16")
    touched = {"q_proj", "experts.1.", "experts.4.", "experts.7.", "2.mlp.gate"}
    before, after = tensors(base), tensors(tmp_path / "m")
    for name, t in before.items():
        moved = "q_proj" in name or ("layers.2" in name and any(x in name for x in touched))
        assert torch.equal(t, after[name]) != moved, name
    assert {p.name for p in base.glob("*.safetensors")} == {p.name for p in (tmp_path / "m").glob("*.safetensors")}
    assert report.resumed == 0


def test_a_layout_that_cannot_be_reversed_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(families.base("olmoe"), tmp_path / "base")
    folder = adapter(base, tmp_path / "a")
    run = layout.Layout._run

    def broken(self: Any, transform: Any, given: dict[str, Any], first: str) -> dict[str, Any]:
        out = run(self, transform, given, first)
        return {k: -(v[0] if isinstance(v, list) else v) for k, v in out.items()} if "down" in first else out

    def twice(self: Any, transform: Any, given: dict[str, Any], first: str) -> dict[str, Any]:
        return {k: v * 2 for k, v in broken(self, transform, given, first).items()}

    monkeypatch.setattr(layout.Layout, "_run", twice)
    with pytest.raises(UserError, match=r"experts.down_proj.*--in-memory"):
        merge(folder, base, tmp_path / "m")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))
    assert merge(folder, base, tmp_path / "m", in_memory=True).digest == digest_checkpoint(tmp_path / "m")
