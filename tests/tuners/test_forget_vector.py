"""The forget vector as a PEFT type: exact in every state, small on disk, gone without a trace."""

from __future__ import annotations

import pytest
import tiny_vision
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_unlearn.tuners.forget_vector import ForgetVectorConfig
from peft_unlearn.tuners.forget_vector.layer import ForgetVectorLayer


def with_vector(kind: str, value: float | None = 0.3, seed: int = 0):
    """(PeftModel, its layer, the vector); value: standard deviation of the vector, None leaves it at zero."""
    size = tiny_vision.size_of(kind)
    model = get_peft_model(tiny_vision.classifier(kind), ForgetVectorConfig(shape=[1, size, size]))
    layer = next(m for m in model.modules() if isinstance(m, ForgetVectorLayer))
    delta = torch.randn(1, size, size, generator=torch.Generator().manual_seed(seed)) * (value or 0)
    layer.vectors["default"].data.copy_(delta)
    return model.eval(), layer, delta


@torch.no_grad()
def logits(model, x):
    return model(pixel_values=x).logits


@pytest.mark.parametrize("kind", tiny_vision.FAMILIES)
def test_the_vector_is_added_to_the_images(kind):
    base, x = tiny_vision.classifier(kind), tiny_vision.images(3, tiny_vision.size_of(kind))
    model, _, delta = with_vector(kind)
    assert torch.equal(logits(model, x), logits(base, x + delta))
    with model.disable_adapter():
        assert torch.equal(logits(model, x), logits(base, x))
    zero, _, _ = with_vector(kind, None)
    assert torch.equal(logits(zero, x), logits(base, x))


def test_it_trains_the_vector_alone_and_leaves_the_weights_bitwise():
    model, layer, _ = with_vector("resnet", None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train(False)
    model(pixel_values=tiny_vision.images(4)).logits[:, 0].sum().backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 1 and all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert changed == trained and layer.vectors["default"].abs().max() > 0


def test_save_load_stack_scale_and_take_off(tmp_path):
    x, base = tiny_vision.images(3), tiny_vision.classifier()
    model, _, delta = with_vector("resnet")
    model.save_pretrained(tmp_path / "v")
    assert (tmp_path / "v" / "adapter_model.safetensors").stat().st_size < 1300
    plain = tiny_vision.classifier()
    again = PeftModel.from_pretrained(plain, tmp_path / "v")
    assert torch.equal(logits(again, x), logits(model, x))
    assert not any(p.requires_grad for p in again.parameters())
    again.load_adapter(tmp_path / "v", "second")
    assert torch.equal(logits(again, x), logits(model, x))  # there, and not active
    again.base_model.set_adapter(["default", "second"])
    assert torch.allclose(logits(again, x), logits(base, x + 2 * delta), atol=1e-6)
    layer = next(m for m in again.modules() if isinstance(m, ForgetVectorLayer))
    layer.scaling.update(default=-0.5, second=0.25)
    assert torch.allclose(logits(again, x), logits(base, x - 0.25 * delta), atol=1e-6)
    again.delete_adapter("second")
    assert torch.allclose(logits(again, x), logits(base, x - 0.5 * delta), atol=1e-6)
    left = again.unload()
    assert torch.equal(logits(left, x), logits(base, x))
    assert not any(isinstance(m, ForgetVectorLayer) for m in left.modules())


@pytest.mark.parametrize("kind", tiny_vision.FAMILIES)
def test_merging_is_exact_or_refused(kind):
    x = tiny_vision.images(3, tiny_vision.size_of(kind))
    model, _, _ = with_vector(kind)
    want, before = logits(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    if kind not in tiny_vision.MERGEABLE:
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_adapter()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        return
    model.merge_adapter()
    assert torch.allclose(logits(model, x), want, atol=1e-6)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, x), want, atol=1e-6)
    assert not any(isinstance(m, ForgetVectorLayer) for m in merged.modules())


def test_what_is_refused():
    def make(shape, kind="resnet"):
        return get_peft_model(tiny_vision.classifier(kind), ForgetVectorConfig(shape=shape))

    with pytest.raises(ValueError, match="no image_size"):
        make(None)
    assert make(None, "vit").peft_config["default"].shape == [1, 16, 16]  # its configuration says
    with pytest.raises(ValueError, match="3 channels and the model reads 1"):
        make([3, 16, 16])
    with pytest.raises(ValueError, match=r"\[channels, height, width\]"):
        ForgetVectorConfig(shape=[16, 16])
    with pytest.raises(ValueError, match="init_std"):
        ForgetVectorConfig(init_std=-1)
    with pytest.raises(ValueError, match="prepare them"):
        logits(make([1, 8, 8]), tiny_vision.images(2))
    with pytest.raises(ValueError, match="adapter_names"):
        make([1, 16, 16])(pixel_values=tiny_vision.images(2), adapter_names=["default", "__base__"])
    lora = get_peft_model(tiny_vision.classifier(), LoraConfig(target_modules=["convolution"]))
    with pytest.raises(ValueError, match="another type"):
        get_peft_model(lora.base_model.model, ForgetVectorConfig(shape=[1, 16, 16]))
    from tiny import llama

    with pytest.raises(ValueError, match="no convolution"):
        get_peft_model(llama(), ForgetVectorConfig(shape=[1, 16, 16]))
