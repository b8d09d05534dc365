"""Images in the window: a row is a unit, and one mean over a mixed batch is what the published loss is."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_vision
import torch
from peft import get_peft_model

from peft_unlearn.data.collate import pad
from peft_unlearn.data.images import bundle_of
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.objectives.classification import margins
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.tuners.forget_vector import ForgetVectorConfig

PUBLISHED = {
    "forget": {"margin": {"weight": 3, "joint": True}},
    "retain": {"cross_entropy": {"joint": True}},
    "penalty": {"adapter_norm": {"weight": 1 / 16, "batch": "retain"}},
}


def made(std: float = 0.1) -> Any:
    return get_peft_model(tiny_vision.classifier(), ForgetVectorConfig(shape=[1, 16, 16], init_std=std))


def batches() -> tuple[dict[str, Any], dict[str, Any]]:
    data = bundle_of({"forget": tiny_vision.rows(4, 1), "retain": tiny_vision.rows(12, 2)})
    return pad(data.encode("forget", None), 0), pad(data.encode("retain", None), 0)


def window(model: Any, terms: Any, tmp_path: Any) -> Any:
    return UnlearnConfig(output_dir=str(tmp_path / "out"), terms=terms).window(model, Reference())


def test_the_published_loss_and_its_gradient(tmp_path):
    model, (forget, retain) = made(), batches()
    step = window(model, PUBLISHED, tmp_path).step([{"forget": forget, "retain": retain}])
    (delta,) = (p for p in model.parameters() if p.requires_grad)
    z, z_r = (model(pixel_values=b["pixel_values"]).logits for b in (forget, retain))
    y, y_r = (b["labels"][:, 1] for b in (forget, retain))
    l_f = margins(z, y).clamp_min(-1).sum() / 16
    l_r = torch.nn.functional.cross_entropy(z_r, y_r, reduction="sum") / 16
    loss = l_r + 3 * l_f + delta.norm() / 16
    assert sum(step.values.values()) == pytest.approx(float(loss.detach()), abs=1e-6)
    assert torch.allclose(step.update.tensors[0], torch.autograd.grad(loss, delta)[0], atol=1e-7)


def test_micro_batches_change_nothing(tmp_path):
    model, (forget, retain) = made(), batches()
    w = window(model, PUBLISHED, tmp_path)
    whole = w.step([{"forget": forget, "retain": retain}])
    parts = [
        {n: {k: v[i::3] for k, v in b.items()} for n, b in (("forget", forget), ("retain", retain))} for i in range(3)
    ]
    split = w.step(parts)
    assert torch.allclose(whole.update.tensors[0], split.update.tensors[0], atol=1e-7)
    assert split.values == pytest.approx(whole.values)


def test_saturated_margins_have_no_gradient_and_the_deepest_loss_is_minus_tau(tmp_path):
    model, (forget, _) = made(), batches()
    tau = 0.5
    labels = forget["labels"].clone()
    with torch.no_grad():  # each row's least likely class, which the scaled logits leave far behind
        labels[:, 1] = model(pixel_values=forget["pixel_values"]).logits.argmin(1)
    model.base_model.model.classifier[-1].weight.data.mul_(1e4)
    p = Pass(model, {**forget, "labels": labels})
    terms = {
        "forget": {"margin": {"tau": tau, "weight": 2, "joint": True}},
        "retain": {"cross_entropy": {"joint": True, "weight": 0}},
    }
    w = window(model, terms, tmp_path)
    batch = {"forget": {**forget, "labels": labels}, "retain": {**forget, "labels": labels}}
    value, counts = w.sweep("forget", [batch], w.counts([batch])), w.counts([batch])
    assert float(p.map_logits(margins).max()) < -tau
    assert value[0].tensors[0].abs().max() == 0
    assert value[1] == pytest.approx(-2 * tau * 4 / counts[0]) and counts == [8, 8]


def test_objectives_of_tokens_read_images_as_sequences_with_one_target(tmp_path):
    model, (forget, retain) = made(), batches()
    p = Pass(model, forget, reference=Reference("before", "default"))
    with torch.no_grad():
        want = model(pixel_values=forget["pixel_values"]).logits.log_softmax(1)[torch.arange(4), forget["labels"][:, 1]]
        with model.disable_adapter():
            base = model(pixel_values=forget["pixel_values"]).logits.log_softmax(1)[
                torch.arange(4), forget["labels"][:, 1]
            ]
    assert torch.allclose(p.logp, want) and torch.allclose(p.ref_logp, base) and not torch.allclose(want, base)
    terms = {"forget": {"npo": {"beta": 0.1}, "neg_entropy": {}}, "retain": {"nll": {}, "kl": {}}}
    step = window(model, terms, tmp_path).step([{"forget": forget, "retain": retain}])
    assert step.norms["forget"] > 0 and step.norms["retain"] > 0


def test_the_penalty_is_the_norm_whatever_the_rows_and_flat_at_zero(tmp_path):
    forget, retain = batches()
    for std in (0.1, 0.0):
        model = made(std)
        (delta,) = (p for p in model.parameters() if p.requires_grad)
        w = window(
            model, {"penalty": {"adapter_norm": {"weight": 2, "batch": "retain"}}, "forget": {"margin": {}}}, tmp_path
        )
        v, value = w.sweep(
            "penalty", [{"forget": forget, "retain": retain}], w.counts([{"forget": forget, "retain": retain}])
        )
        assert value == pytest.approx(2 * float(delta.norm().detach()), abs=1e-6)
        want = 2 * delta.detach() / delta.norm().detach() if std else torch.zeros_like(delta)
        assert torch.allclose(v.tensors[0], want, atol=1e-6)


def test_joint_is_true_or_false(tmp_path):
    from peft_unlearn.errors import UserError

    with pytest.raises(UserError, match="joint is true"):
        UnlearnConfig(
            output_dir=str(tmp_path), terms={"forget": {"margin": {"joint": "yes"}}, "retain": {"cross_entropy": {}}}
        )
