"""A forget vector from recipe to folder: trained, judged, stacked, calibrated, verified, taken off; the base bitwise as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_vision
import torch

from peft_unlearn.data import embedded
from peft_unlearn.data.images import bundle_of
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.evaluate import evaluate
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.train import train
from peft_unlearn.training.trainer import UnlearnTrainer

RECIPES = Path(__file__).parents[2] / "adapters" / "recipes"


def short(**over: Any) -> dict[str, Any]:
    recipe = load_recipe(RECIPES / "digits-forget-vector.yaml")
    return {**recipe, "train": {**recipe["train"], "max_steps": 12, **over}}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Any:
    return train(short(), tmp_path_factory.mktemp("run") / "vector", progress=lambda _: None)


def test_the_folder_says_what_it_is(adapter):
    assert adapter.config["peft_type"] == "PEFT_UNLEARN_FORGET_VECTOR" and adapter.config["shape"] == [1, 16, 16]
    assert (adapter.path / "adapter_model.safetensors").stat().st_size < 1300
    assert [p.split(":")[0] for p in adapter.manifest.probes.prompts] == ["image"] * 4
    assert adapter.manifest.data["forget"] | {"sha256": ""} == {
        "n": 137, "ref": "embedded:digits?forget=3&seed=0", "format": "image", "sha256": "",
    }  # fmt: skip
    card = (adapter.path / "README.md").read_text()
    assert "Inference-time suppression" in card and "AutoModelForImageClassification" in card
    assert "pipeline_tag: image-classification" in card
    assert adapter.manifest.method["terms"]["forget"]["margin"]["joint"] is True


def test_judged_beside_the_retain_model(adapter):
    report = evaluate([adapter.path])
    base, ours, reference = (report.subjects[s] for s in ("base", "adapter", "retain_only"))
    assert base["forget/accuracy"] == 1 and reference["forget/accuracy"] == 0 == reference["forget_test/accuracy"]
    assert reference["forget/mia_efficacy"] == 1 and base["forget/mia_efficacy"] < 0.2
    assert ours["forget/accuracy"] < 0.5 and ours["retain/accuracy"] > 0.9  # a dozen steps
    assert ours["forget/unlearning_accuracy"] == pytest.approx(1 - ours["forget/accuracy"])
    stored = json.loads((adapter.path / "eval.json").read_text())
    assert stored["suite"] == "classes" and stored["subjects"]["adapter"] == ours


def test_stacked_scaled_verified_and_taken_off(adapter):
    x = tiny_vision.images(5)
    base = load_base(embedded.base_path("digits-resnet"))
    with torch.no_grad():
        want = base(pixel_values=x).logits
    stack = ForgetModel.from_pretrained(None, {"a": adapter.path, "b": adapter.path})
    with torch.no_grad():
        both = stack.model(pixel_values=x).logits
        with stack.disabled():
            assert torch.equal(stack.model(pixel_values=x).logits, want)
        stack.scale("a", 2.0)
        stack.scale("b", 0.0)
        assert torch.allclose(stack.model(pixel_values=x).logits, both, atol=1e-5)
    assert stack.remove("b").ok and stack.remove().ok
    with torch.no_grad():
        assert torch.equal(stack.model(pixel_values=x).logits, want)
    assert verify(adapter.path).exit_code == 0


def test_training_leaves_the_base_bitwise_batch_statistics_included(tmp_path):
    model = tiny_vision.classifier("resnet")
    model.save_pretrained(tmp_path / "base")
    before = digest_checkpoint(tmp_path / "base")
    data = bundle_of({"forget": tiny_vision.rows(8, 1), "retain": tiny_vision.rows(8, 2) + tiny_vision.rows(8, 3)})
    config = UnlearnConfig(
        output_dir=str(tmp_path / "out"), terms={"forget": {"margin": {}}, "retain": {"cross_entropy": {}}}, max_steps=3,
        learning_rate=0.1, optim="sgd", per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = UnlearnTrainer(model, config, data=data, processing_class=None, peft_config=_vector())
    trainer.train()
    trainer.bare.unload().save_pretrained(tmp_path / "after")
    assert digest_checkpoint(tmp_path / "after") == before


def _vector() -> Any:
    from peft_unlearn.tuners.forget_vector import ForgetVectorConfig

    return ForgetVectorConfig()  # the shape comes from the data


def test_a_penalty_alone_takes_the_vector_to_zero(tmp_path):
    from peft_unlearn.tuners.forget_vector import ForgetVectorConfig

    data = bundle_of({"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(4, 2)})
    config = UnlearnConfig(
        output_dir=str(tmp_path / "out"), max_steps=20, learning_rate=0.1, optim="sgd", per_device_train_batch_size=4, max_grad_norm=0,
        terms={
            "forget": {"margin": {"weight": 0}}, "retain": {"cross_entropy": {"weight": 0}},
            "penalty": {"adapter_norm": {"batch": "retain"}},
        },
    )  # fmt: skip
    model = tiny_vision.classifier()
    start = ForgetVectorConfig(shape=[1, 16, 16], init_std=0.1)
    trainer = UnlearnTrainer(model, config, data=data, processing_class=None, peft_config=start)
    (delta,) = (p for p in trainer.bare.parameters() if p.requires_grad)
    norm = float(delta.norm().detach())
    trainer.train()
    assert norm > 1 and float(delta.norm().detach()) < 0.11  # 20 steps of length 0.1 each


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_lora_on_a_classifier(kind, tmp_path):
    targets = {"target_modules": ["convolution"]} if kind == "resnet" else {}
    data = bundle_of({"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(4, 2)})
    config = UnlearnConfig(
        output_dir=str(tmp_path / "out"), terms={"forget": {"npo": {}}, "retain": {"nll": {}}}, max_steps=2
    )
    trainer = UnlearnTrainer(
        tiny_vision.classifier(kind),
        config,
        data=data,
        processing_class=None,
        peft_config={"type": "lora", "r": 2, **targets},
    )
    trainer.train()
    moved = [n for n, p in trainer.bare.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert moved and not any("classifier" in n for n in moved)


def test_what_is_refused(tmp_path):
    from tiny import llama, tokenizer

    images = bundle_of({"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(4, 2)})

    def trainer(model, data, terms, **over):
        tok = over.pop("tokenizer", None)
        config = UnlearnConfig(output_dir=str(tmp_path / "out"), terms=terms, max_steps=1, **over)
        return UnlearnTrainer(model, config, data=data, processing_class=tok, peft_config=over.pop("adapter", None))

    plain = {"forget": {"margin": {}}, "retain": {"cross_entropy": {}}}
    with pytest.raises(UserError, match=r"these are images, and the base .* reads text"):
        trainer(llama(), images, plain, tokenizer=tokenizer())
    vit = tiny_vision.classifier("vit")
    with pytest.raises(UserError, match="reads hidden of tokens"):
        trainer(vit, images, {"forget": {"rmu": {"layer": 0}}, "retain": {"cross_entropy": {}}})
    with pytest.raises(UserError, match="precomputed is for tokens"):
        trainer(
            tiny_vision.classifier("vit"),
            images,
            {"forget": {"npo": {}}, "retain": {"nll": {}}},
            reference="precomputed",
        )
    with pytest.raises(UserError, match="class 3, and the base tells classes 0 to 2"):
        few = bundle_of({"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(4, 3)})
        trainer(tiny_vision.classifier("vit", labels=3), few, plain)
    with pytest.raises(UserError, match=r"images are \(1, 8, 8\)"):
        small = bundle_of({"forget": tiny_vision.rows(4, 1, size=8), "retain": tiny_vision.rows(4, 3, size=8)})
        trainer(tiny_vision.classifier("vit"), small, plain)
    with pytest.raises(UserError, match="these rows are texts"):
        trainer(
            tiny_vision.classifier("vit"),
            {"forget": [{"text": "a"}], "retain": [{"text": "b"}]},
            plain,
            tokenizer=tokenizer(),
        )
