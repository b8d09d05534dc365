"""What is exported says the same to plain PEFT as the adapter, in a form from which nothing can be read wrongly."""

from __future__ import annotations

import json
import math
import re
import struct
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
    with pytest.raises(UserError, match=r"lm_head.*vLLM takes no adapter"):
        export(make(base_dir, tmp_path / "h", target_modules=["q_proj", "lm_head"]), tmp_path / "x", "vllm")
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
    if target in ("mergekit", "gguf"):
        with pytest.raises(UserError, match="stack of experts"):
            export(published, tmp_path / "x", target, base="b")
        return
    export(published, tmp_path / "x", target)
    names = set(load_file(str(tmp_path / "x/adapter_model.safetensors")))
    assert all(re.search(r"\.experts(\.base_layer)?\.lora_[AB]\.weight$", n) for n in names)


def read_gguf(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """A reader of its own, by the format's specification."""
    raw, at = path.read_bytes(), 24
    magic, version, n_tensors, n_facts = struct.unpack("<4sIQQ", raw[:24])
    assert (magic, version) == (b"GGUF", 3)

    def take(form: str) -> tuple:
        nonlocal at
        at += (n := struct.calcsize(form))
        return struct.unpack(form, raw[at - n : at])

    def text() -> str:
        return take(f"<{take('<Q')[0]}s")[0].decode()

    facts: dict[str, object] = {}
    for _ in range(n_facts):
        key, (kind,) = text(), take("<I")
        facts[key] = text() if kind == 8 else take({4: "<I", 6: "<f"}[kind])[0]
    infos = []
    for _ in range(n_tensors):
        name, (dims,) = text(), take("<I")
        infos.append((name, take(f"<{dims}Q"), *take("<IQ")))
    start, out = -(-at // 32) * 32, {}
    for name, sizes, kind, offset in infos:
        assert kind == 0 and offset % 32 == 0
        data = torch.frombuffer(
            bytearray(raw[start + offset : start + offset + 4 * math.prod(sizes)]), dtype=torch.float32
        )
        out[name] = data.reshape(*sizes[::-1])
    assert len(raw) == start + max(o + -(-4 * math.prod(s) // 32) * 32 for _, s, _, o in infos)
    return facts, out


def test_gguf_holds_the_delta_in_the_order_of_llama_cpp(base_dir, tmp_path):
    folder = make(
        base_dir,
        tmp_path / "a",
        scale=0.5,
        target_modules=["q_proj", "k_proj", "o_proj", "down_proj"],
        rank_pattern={"k_proj": 2},
    )
    export(folder, tmp_path / "x", "gguf", base=str(base_dir))
    export(folder, tmp_path / "y", "vllm")
    facts, found = read_gguf(tmp_path / "x/adapter.gguf")
    assert (
        facts["general.type"] == "adapter"
        and facts["adapter.lora.alpha"] == 4.0
        and facts["general.architecture"] == "llama"
    )
    peft = load_file(str(tmp_path / "y/adapter_model.safetensors"))
    config = json.loads((base_dir / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}
    assert len(found) == len(peft)
    for key in (k for k in peft if "lora_A" in k):
        layer, module = re.search(r"layers\.(\d+)\.\w+\.(\w+)\.", key).groups()
        whole = peft[key.replace("lora_A", "lora_B")] @ peft[key]
        here = f"blk.{layer}.{names[module]}.weight.lora_"
        order = list(range(len(whole)))
        if module in heads:  # row i of a head's first half and row i of its second stand side by side
            width = len(whole) // heads[module]
            order = [
                h * width + half * (width // 2) + i
                for h in range(heads[module])
                for i in range(width // 2)
                for half in (0, 1)
            ]
        torch.testing.assert_close(found[f"{here}b"] @ found[f"{here}a"], whole[order])


def test_gguf_refuses_what_llama_cpp_holds_otherwise(base_dir, tmp_path):
    folder = make(base_dir, tmp_path / "a")
    with pytest.raises(UserError, match=r"not found here|--base"):
        export(folder, tmp_path / "x", "gguf")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "gpt_neox"}')
    with pytest.raises(UserError, match=r"'gpt_neox' are not known.*convert_lora_to_gguf"):
        export(folder, tmp_path / "x", "gguf", base=str(tmp_path / "other"))
    with pytest.raises(UserError, match="lm_head"):
        export(make(base_dir, tmp_path / "h", target_modules=["lm_head"]), tmp_path / "x", "gguf", base=str(base_dir))
    assert not (tmp_path / "x").exists()
