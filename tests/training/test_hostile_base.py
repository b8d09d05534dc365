"""Whose base it is: bf16 and float16 training save what verifies; a base that is not the files' is refused, early where it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_unlearn
from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base, resolve_base
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack.model import remove
from peft_unlearn.training import own_base
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.save import save_adapter
from peft_unlearn.training.trainer import UnlearnTrainer

DATA = {"forget": tiny.rows(6, "f", seed=1), "retain": tiny.rows(6, "r", seed=2)}
TERMS = {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}}


def save_base(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **over: Any) -> Path:
    tiny.llama(seed, **over).to(dtype).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("own") / "base")


def trained(out: Path, model: Any, **over: Any) -> UnlearnTrainer:
    given = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "use_cpu": True,
    }
    config = UnlearnConfig(output_dir=str(out), terms=TERMS, disable_tqdm=True, **{**given, **over})
    t = UnlearnTrainer(model, config, data=DATA, processing_class=tiny.tokenizer())
    t.train()
    return t


def ok(out: Path, base: Path) -> None:
    found = verify(out, base)
    assert found.verdict == "ok", str(found)
    report = remove(out, base)
    assert report.ok and (report.probe_difference or 0.0) < 1e-5, str(report)


# --- training in short dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "expert_lora"])
@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16], ids=["files32", "files16"])
def test_a_recipe_in_bf16_verifies_and_comes_off(tmp_path: Path, files: torch.dtype, kind: str) -> None:
    base, adapter = tmp_path / "base", {"type": "lora", "r": 4}
    if kind == "expert_lora":
        import sys

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tuners"))
        import families

        families.base("olmoe").to(files).save_pretrained(base)
        adapter = {"type": "expert_lora", "r": 2, "experts": {0: [0, 1]}}
        tiny.tokenizer().save_pretrained(base)
        if load_base(base).config.vocab_size < len(tiny.tokenizer()):
            pytest.skip("the tiny family has fewer tokens than the tokenizer")
    else:
        save_base(base, dtype=files)
    for name, rows in DATA.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = {
        "data": {n: str(tmp_path / f"{n}.jsonl") for n in DATA}, "adapter": adapter, "terms": TERMS,
        "train": {"bf16": True, "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 3, "use_cpu": True},
    }  # fmt: skip
    peft_unlearn.train(recipe, tmp_path / "out", base=str(base), progress=lambda _: None)
    ok(tmp_path / "out", base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["plain", "peft", "ours", "cast"])
def test_a_half_precision_base_from_python_verifies(
    base_dir: Path, tmp_path: Path, dtype: torch.dtype, how: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32 if how == "cast" else dtype)
    if how == "cast":
        model = model.to(dtype)  # rounds the rotary buffers too
    if how == "peft":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if how == "ours":
        model = get_forget_model(model, {"r": 3, "target_modules": ["q_proj", "v_proj"]})
    save_adapter(trained(tmp_path / "out", model), base=base_dir)
    ok(tmp_path / "out", base_dir)


def test_autocast_over_a_float32_base_verifies(base_dir: Path, tmp_path: Path) -> None:
    save_adapter(trained(tmp_path / "out", load_base(base_dir), bf16=True), base=base_dir)
    ok(tmp_path / "out", base_dir)


def test_saving_moves_no_random_state_and_no_weight(base_dir: Path, tmp_path: Path) -> None:
    t = trained(tmp_path / "out", load_base(base_dir))
    before, flags = torch.get_rng_state(), {n: p.requires_grad for n, p in t.bare.named_parameters()}
    weights = {n: p.clone() for n, p in t.bare.named_parameters()}
    save_adapter(t, base=base_dir)
    assert torch.equal(before, torch.get_rng_state())
    assert flags == {n: p.requires_grad for n, p in t.bare.named_parameters()}
    assert all(torch.equal(weights[n], p) for n, p in t.bare.named_parameters())


def test_saving_in_float32_makes_no_second_copy_of_the_base(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trained(tmp_path / "out", load_base(base_dir))
    with monkeypatch.context() as m:
        m.setattr(own_base, "load_base", lambda *_, **__: pytest.fail("the files were loaded once more"))
        save_adapter(t, base=base_dir)
    ok(tmp_path / "out", base_dir)


# --- not the base that is named ---------------------------------------------------------------------------------------


def refused(base: Path, out: Path, model: Any, match: str, **over: Any) -> None:
    t = trained(out, model, **over)
    with pytest.raises(UserError, match=match):
        save_adapter(t, base=base)
    assert not out.exists()


def test_hostile_another_base_is_named(base_dir: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=5)
    refused(
        other,
        tmp_path / "out",
        load_base(base_dir),
        "is not the one in .*: with its adapters off, 16 of its 21 tensors",
    )
    wider = save_base(tmp_path / "wider", intermediate_size=96)
    refused(wider, tmp_path / "out", load_base(base_dir), "other settings: intermediate_size is 64, was 96")


def _edited(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-4


def _rounded(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).float()


def _hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out + 1)


def _replaced(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def _rope(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 7.0}


EDITS = {
    "edited": (_edited, "1 of its 21 tensors have other values, first model.layers.0.mlp.up_proj.weight"),
    "rounded": (_rounded, "of its 21 tensors have other values"), "hooked": (_hooked, "its logits differ by up to"),
    "replaced": (_replaced, "its logits differ by up to"), "settings": (_rope, "other settings: rope_parameters.rope_theta is 7"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", EDITS)
def test_hostile_a_base_changed_in_memory(base_dir: Path, tmp_path: Path, how: str, dtype: torch.dtype) -> None:
    if (how, dtype) == ("rounded", torch.bfloat16):
        pytest.skip("that is what loading in bfloat16 gives")
    model = load_base(base_dir, dtype)
    change, match = EDITS[how]
    change(model)
    if how == "edited":
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1  # so that bfloat16 sees it
    refused(base_dir, tmp_path / "out", model, match)


class IntLinear(nn.Module):
    """Somebody's own int8 layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.register_buffer("qweight", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scale).T


class Packed(torch.Tensor):
    """A tensor subclass, as torchao's are."""


def _int_module(layer: Any) -> None:
    layer.mlp.up_proj = IntLinear(layer.mlp.up_proj)


def _int_parameter(layer: Any) -> None:
    weight = layer.mlp.up_proj.weight
    layer.mlp.up_proj.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)


def _float8(layer: Any) -> None:
    weight = layer.mlp.up_proj.weight
    layer.mlp.up_proj.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)


def _subclass(layer: Any) -> None:
    weight = layer.mlp.up_proj.weight.detach()
    layer.mlp.up_proj.weight = nn.Parameter(weight.as_subclass(Packed), requires_grad=False)


def _library(layer: Any) -> None:
    kind = type("Linear8bitLt", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    layer.mlp.up_proj.__class__ = kind


@pytest.mark.parametrize("how", [_int_module, _int_parameter, _float8, _subclass, _library])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "peft"])
def test_hostile_a_base_quantized_by_hand_is_refused_before_training(
    base_dir: Path, tmp_path: Path, how: Any, wrapped: bool
) -> None:
    model: Any = load_base(base_dir)
    how(model.model.layers[1])
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"the base is quantized, .*model.layers.1.mlp.up_proj"):
        trained(tmp_path / "out", model)


def test_hostile_a_base_quantized_by_hand_during_training(base_dir: Path, tmp_path: Path) -> None:
    t = trained(tmp_path / "out", get_forget_model(load_base(base_dir), {"r": 2, "target_modules": ["q_proj"]}))
    _int_module(t.bare.get_base_model().model.layers[1])
    with pytest.raises(UserError, match=r"its module model.layers.1.mlp.up_proj .IntLinear. is quantized"):
        save_adapter(t, base=base_dir)


def test_hostile_an_adapter_among_the_bases_files(base_dir: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    stray = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    stray.save_pretrained(base)
    for load in (load_base, resolve_base):
        with pytest.raises(UserError, match=r"adapter_config\.json lies among the model's files"):
            load(base)
    with pytest.raises(UserError, match="transformers itself has put an adapter on the base"):
        trained(tmp_path / "out", AutoModelForCausalLM.from_pretrained(base))


def test_hostile_another_tokenizer_than_the_bases(base_dir: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    raw = json.loads((base / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (base / "tokenizer.json").write_text(json.dumps(raw))
    refused(base, tmp_path / "out", load_base(base), "another tokenizer than the one of its base")
