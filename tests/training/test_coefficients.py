"""Sums of forget vectors, with given weights and with learned ones."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vision
import torch

from peft_unlearn.data.images import bundle_of
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.subjects import suite_of
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.merging.compose import compose
from peft_unlearn.merging.vectors import vector_of
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.training.coefficients import learn_sum
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.save import save_adapter
from peft_unlearn.training.trainer import UnlearnTrainer

TERMS = {"forget": {"margin": {"weight": 3, "joint": True}}, "retain": {"cross_entropy": {"joint": True}},
         "penalty": {"adapter_norm": {"weight": 0.01, "batch": "retain"}}}  # fmt: skip


def data(forget: int) -> Any:
    rows = {k: tiny_vision.rows(8, k) for k in range(4)}
    return bundle_of({"forget": rows[forget], "retain": [r for k, some in rows.items() if k != forget for r in some]})


def knowing() -> Any:
    """A classifier that has learned the four patterns."""
    model = tiny_vision.classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    some = [r for k in range(4) for r in tiny_vision.rows(8, k)]
    x, y = torch.stack([torch.from_numpy(r["pixel_values"]) for r in some]), torch.tensor([r["label"] for r in some])
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=x).logits, y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Any:
    """(base folder, {class: folder of its vector})"""
    root = tmp_path_factory.mktemp("vectors")
    knowing().save_pretrained(root / "base")
    out = {}
    for k in (0, 1):
        from peft_unlearn.folder.base import load_base

        config = UnlearnConfig(
            output_dir=str(root / str(k)), terms=TERMS, max_steps=15, learning_rate=0.5, optim="sgd", max_grad_norm=0,
            per_device_train_batch_size=4, per_anchor={"retain": 3}, save_strategy="no",
        )  # fmt: skip
        trainer = UnlearnTrainer(
            load_base(root / "base"), config, data=data(k), processing_class=None, peft_config={"type": "forget_vector"}
        )
        trainer.train()
        out[k] = save_adapter(trainer, base=root / "base").path
    return root / "base", out


def test_a_sum_is_entry_by_entry_and_one_alone_is_itself(vectors, tmp_path):
    base, made = vectors
    (_, a), (_, b) = (vector_of(read_adapter(f)) for f in made.values())
    found = compose([(made[0], 2.0), (made[1], -0.5)], tmp_path / "sum", base=base)
    assert torch.equal(vector_of(found.folder)[1], 2.0 * a - 0.5 * b)
    assert found.entries == 256 and found.probed and "256 entries" in str(found)
    assert found.folder.manifest.method["peft_type"] == "PEFT_UNLEARN_FORGET_VECTOR"
    alone = compose([(made[0], 1.0)], tmp_path / "alone", base=base)
    assert torch.equal(vector_of(alone.folder)[1], a)
    x = tiny_vision.images(4)
    with torch.no_grad():
        one, other = (
            ForgetModel.from_pretrained(base, f).model(pixel_values=x).logits for f in (made[0], alone.folder.path)
        )
        assert torch.equal(one, other)
        both = ForgetModel.from_pretrained(base, {"a": made[0], "b": made[1]}, scales={"a": 2.0, "b": -0.5}).model
        summed = ForgetModel.from_pretrained(base, found.folder.path).model
        assert torch.allclose(both(pixel_values=x).logits, summed(pixel_values=x).logits, atol=1e-5)


def test_learned_weights_answer_a_request_that_no_vector_was_made_for(vectors, tmp_path):
    base, made = vectors
    rows = {k: tiny_vision.rows(8, k) for k in range(4)}
    pair = bundle_of({"forget": rows[0] + rows[1], "retain": rows[2] + rows[3]})
    before = {f: (f / "adapter_model.safetensors").read_bytes() for f in made.values()}
    found = learn_sum(list(made.values()), pair, tmp_path / "pair", base=base, steps=25, learning_rate=0.1, rows=8)
    weights = [p["weight"] for p in found.terms]
    assert all(w > 0.2 for w in weights)
    total = sum(w * vector_of(read_adapter(f))[1] for w, f in zip(weights, made.values(), strict=True))
    assert torch.allclose(vector_of(found.folder)[1], total, atol=1e-6)
    assert found.folder.manifest.data["forget"]["sha256"] == pair.sha256["forget"]
    assert found.folder.recipe["compose"]["learned"]["steps"] == 25
    assert all((f / "adapter_model.safetensors").read_bytes() == b for f, b in before.items())

    def right(adapters: Any, some: Any) -> float:
        model = ForgetModel.from_pretrained(base, adapters).model
        x = torch.stack([torch.from_numpy(r["pixel_values"]) for r in some])
        with torch.no_grad():
            return float(
                (model(pixel_values=x).logits.argmax(1) == torch.tensor([r["label"] for r in some])).float().mean()
            )

    assert right(found.folder.path, pair.forget) < right(made[0], pair.forget)


def test_what_is_refused(vectors, tmp_path):
    base, made = vectors
    with pytest.raises(UserError, match="from 1 to 10"):
        learn_sum([made[0]] * 11, data(0), tmp_path / "x", base=base)
    with pytest.raises(UserError, match="no rank"):
        compose([(made[0], 1.0)], tmp_path / "x", base=base, rank=2)
    with pytest.raises(UserError, match="the sum is zero"):
        compose([(made[0], 1.0), (made[0], -1.0)], tmp_path / "x", base=base)
    with pytest.raises(UserError, match="rows are texts"):
        learn_sum([made[0]], {"forget": [{"text": "a"}], "retain": [{"text": "b"}]}, tmp_path / "x", base=base)
    assert not (tmp_path / "x").exists()


def test_a_sum_is_judged_by_the_suite_of_images(vectors, tmp_path):
    base, made = vectors
    rows = {k: tiny_vision.rows(4, k) for k in range(4)}
    pair = bundle_of({"forget": rows[0] + rows[1], "retain": rows[2] + rows[3]})
    found = learn_sum(list(made.values()), pair, tmp_path / "pair", base=base, steps=1, rows=4)
    assert found.folder.recipe.get("eval") is None and suite_of(found.folder) == "classes"
