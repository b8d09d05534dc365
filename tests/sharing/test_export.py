"""What is exported says the same to plain PEFT as the adapter, in a form from which nothing can be read wrongly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_unlearn.errors import UserError
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.sharing.export import NAMES, TARGETS, export

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinyfolder.save_base(tmp_path_factory.mktemp("export") / "base")


def make(base_dir: Path, out: Path, scale: float = 1.0, **config) -> Path:
    lora = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    )
    model = get_peft_model(tinyfolder.load_base(base_dir), lora)
    tinyfolder.randomize(model, 1)
    manifest = tinyfolder.manifest_for(model.eval(), base_dir, scale=scale)
    write_adapter(out, model, manifest, tinyfolder.RECIPE, tokenizer=tinyfolder.tokenizer())
    return out


def delta_logits(base_dir: Path, folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return tinyfolder.logits(PeftModel.from_pretrained(base, folder).eval())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"},
    ],
    ids=["plain", "rslora", "patterns", "one layer by regex"],
)
def test_the_same_to_plain_peft_with_nothing_left_to_misread(base_dir, tmp_path, config):
    folder = make(base_dir, tmp_path / "a", **config)
    done = export(folder, tmp_path / "x", "vllm")
    written = json.loads((tmp_path / "x/adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == done.rank == 4
    assert not (written["use_rslora"] or written["rank_pattern"] or written["alpha_pattern"])
    tensors = load_file(str(tmp_path / "x/adapter_model.safetensors"))
    assert all(NAMES.fullmatch(n) for n in tensors) and len(tensors) == done.tensors
    assert all(t.shape[0 if "lora_A" in n else 1] == 4 for n, t in tensors.items())
    torch.testing.assert_close(
        delta_logits(base_dir, tmp_path / "x"), delta_logits(base_dir, folder), rtol=0, atol=1e-5
    )


def test_the_manifests_scale_is_served(base_dir, tmp_path):
    folder = make(base_dir, tmp_path / "a", scale=0.5)
    export(folder, tmp_path / "x", "sglang")
    half = load_file(str(tmp_path / "x/adapter_model.safetensors"))
    export(folder, tmp_path / "y", "sglang", scale=1.0)
    whole = load_file(str(tmp_path / "y/adapter_model.safetensors"))
    assert all(torch.equal(half[n], whole[n] * (0.5 if "lora_B" in n else 1)) for n in whole)


def test_mergekit_is_told_the_base_and_does_not_normalize(base_dir, tmp_path):
    import yaml

    folder = make(base_dir, tmp_path / "a")
    with pytest.raises(UserError, match="--base"):
        export(folder, tmp_path / "x", "mergekit")
    assert not (tmp_path / "x").exists()
    export(folder, tmp_path / "x", "mergekit", base="me/model")
    said = yaml.safe_load((tmp_path / "x/mergekit.yaml").read_text())
    assert said["models"][0]["model"] == f"me/model+{tmp_path / 'x'}" and said["parameters"] == {"normalize": False}


def test_refusals(base_dir, tmp_path):
    with pytest.raises(UserError, match="vllm"):
        export(make(base_dir, tmp_path / "a"), tmp_path / "x", "vlm")
    with pytest.raises(UserError, match="DoRA"):
        export(make(base_dir, tmp_path / "d", use_dora=True), tmp_path / "x", "vllm")
    upper = make(base_dir, tmp_path / "upper")
    manifest = json.loads((upper / "forget.json").read_text())
    (upper / "forget.json").write_text(json.dumps(manifest | {"depends_on": ["sha256:" + "0" * 64]}))
    with pytest.raises(UserError, match="without them; make one of all"):
        export(upper, tmp_path / "x", "vllm")
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        export(tmp_path / "a", tmp_path / "full", "vllm")


@pytest.mark.parametrize("target", TARGETS)
def test_a_published_expert_adapter(tmp_path, target):
    published = Path(__file__).resolve().parents[2] / "adapters/published/domains-npo"
    if not published.is_dir():
        pytest.skip("the catalogue is not there")
    if target == "mergekit":
        with pytest.raises(UserError, match="stack of experts"):
            export(published, tmp_path / "x", target, base="b")
        return
    export(published, tmp_path / "x", target)
    names = set(load_file(str(tmp_path / "x/adapter_model.safetensors")))
    assert all(re.search(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$", n) for n in names)
