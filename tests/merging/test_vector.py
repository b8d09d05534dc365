"""Forget vectors written into position embeddings, family by family; refused where no weight could hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_vision
import torch

from peft_unlearn.data.images import bundle_of
from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.merging.merge import merge
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.save import save_adapter
from peft_unlearn.training.trainer import UnlearnTrainer


def made(kind: str, root: Path) -> tuple[Path, Path]:
    """(base, vector trained for two steps)"""
    size = tiny_vision.size_of(kind)
    tiny_vision.classifier(kind).save_pretrained(root / "base")
    how = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (root / "base" / "preprocessor_config.json").write_text(json.dumps(how))
    config = UnlearnConfig(
        output_dir=str(root / "run"), terms={"forget": {"margin": {}}, "retain": {"cross_entropy": {}}}, max_steps=2, learning_rate=0.5,
        optim="sgd", max_grad_norm=0, per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    data = bundle_of({"forget": tiny_vision.rows(4, 0, size=size), "retain": tiny_vision.rows(4, 1, size=size)})
    trainer = UnlearnTrainer(
        load_base(root / "base"),
        config,
        data=data,
        processing_class=None,
        peft_config={"type": "forget_vector", "init_std": 1.0},
    )
    trainer.train()
    return root / "base", save_adapter(trainer, base=root / "base").path


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=x).logits


@pytest.mark.parametrize("kind", tiny_vision.MERGEABLE)
def test_the_merged_classifier_is_the_base_with_its_vector(kind: str, tmp_path: Path) -> None:
    base, vector = made(kind, tmp_path)
    report = merge([vector, vector], base, tmp_path / "merged", scale=[1.0, -0.25])
    x = tiny_vision.images(3, tiny_vision.size_of(kind))
    stack = ForgetModel.from_pretrained(base, {"a": vector, "b": vector}, {"a": 1.0, "b": -0.25})
    want, plain = logits(stack.model, x), logits(load_base(base), x)
    assert (want - plain).abs().max() > 1e-3
    assert torch.allclose(logits(load_base(tmp_path / "merged"), x), want, atol=1e-5)
    assert [r.name.rpartition(".")[2] for r in report.layers] == ["position_embeddings[0]"]
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    again = merge([vector, vector], base, tmp_path / "again", scale=[1.0, -0.25], in_memory=True)
    assert again.digest == report.digest


def test_a_network_without_position_embeddings_is_left_alone(tmp_path: Path) -> None:
    base, vector = made("resnet", tmp_path)
    with pytest.raises(UserError, match="cannot be merged into this model: it has no position embeddings"):
        merge([vector], base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
