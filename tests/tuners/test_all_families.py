"""Families of transformers, one tiny model each: an adapter is trained, saved, verified, merged and taken off with proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import CONFIG_MAPPING
from zoo import tiny_model

import peft_unlearn
from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.save import save_adapter
from peft_unlearn.training.trainer import UnlearnTrainer

pytestmark = pytest.mark.slow

TEXT = [
    "bamba", "bloom", "cohere2", "deepseek_v3", "deepseek_v4", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text",
    "gemma4_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "jetmoe", "laguna",
    "lfm2", "llama", "llama4_text", "mamba", "mistral", "mixtral", "olmo2", "olmoe", "opt", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_5_text", "qwen3_moe", "recurrent_gemma", "rwkv", "stablelm", "starcoder2", "xlstm",
]  # fmt: skip
SEEING = [
    "gemma3", "gemma4", "internvl", "llama4", "llava", "mistral3", "paligemma", "qwen2_5_vl", "qwen3_vl",
]  # fmt: skip

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {  # where all-linear is refused: experts would be adapted with it, or PEFT cannot load what was trained
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "laguna": _ATTENTION, "mamba": ["in_proj", "x_proj"], "mixtral": _ATTENTION, "olmoe": _ATTENTION, "qwen3_moe": _ATTENTION,
}  # fmt: skip
UNTRAINED = {"deepseek_v4": ["compressor"]}  # rows shorter than what it compresses
DATA = {"forget": tiny.rows(2, "f", seed=1), "retain": tiny.rows(2, "r", seed=2)}
TOKENIZER = tiny.tokenizer()


def trained(kind: str, folder: Path, targets: Any = None, sees: bool = False) -> UnlearnTrainer:
    """A base in ``folder/base``, and one step of an adapter on it as it loads from there."""
    if kind not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    model = tiny_model(kind, sees)
    model.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    loaded = type(model).from_pretrained(folder / "base").eval() if sees else load_base(folder / "base")
    config = UnlearnConfig(
        str(folder / "out"), terms={"forget": {"npo": {}}, "retain": {"nll": {}}}, per_device_train_batch_size=2, max_steps=2,
        learning_rate=1e-2, save_strategy="no", use_cpu=True, disable_tqdm=True, allow_untrained=UNTRAINED.get(kind, []),
    )  # fmt: skip
    adapter = {"r": 4, **({} if targets is None else {"target_modules": targets})}
    trainer = UnlearnTrainer(get_forget_model(loaded, adapter), config, data=DATA, processing_class=TOKENIZER)
    trainer.train()
    return trainer


def whole_way(kind: str, folder: Path, sees: bool = False) -> None:
    base, out = folder / "base", folder / "out"
    save_adapter(trained(kind, folder, TARGETS.get(kind), sees), out, base=base)
    checked = peft_unlearn.verify(out, base)
    assert checked.verdict == "ok", str(checked)
    merged = peft_unlearn.merge(out, base, out=folder / "merged", dtype="float32", check=True)
    assert merged.layers
    removed = peft_unlearn.remove(out, base)
    assert removed.verdict == "removed", str(removed)


@pytest.mark.parametrize("kind", TEXT)
def test_families_of_text(kind, tmp_path):
    whole_way(kind, tmp_path)


@pytest.mark.parametrize("kind", SEEING)
def test_families_that_see(kind, tmp_path):
    """All linear layers are those of the text part; the tower stays as it is."""
    whole_way(kind, tmp_path, sees=True)


def test_families_that_plain_peft_loads_otherwise_are_not_written(tmp_path):
    trainer = trained("laguna", tmp_path)
    with pytest.raises(UserError, match="nothing was written: plain PEFT would not load this adapter"):
        save_adapter(trainer, tmp_path / "out", base=tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out.work"]


def test_families_with_a_bidirectional_prompt_are_refused(tmp_path):
    model = tiny_model("paligemma", sees=True, text_config={})
    with pytest.raises(UserError, match="is not causal"):
        get_forget_model(model)
