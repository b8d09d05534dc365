"""Several adapters computed as one pair: the same numbers as PEFT's loop, whatever is done to the adapters meanwhile."""

import copy
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear
from tinyfolder import adapted, logits, write

from peft_unlearn.evaluation.score import on_one_model
from peft_unlearn.folder.base import load_base
from peft_unlearn.stack.fused import FusedLinear, fuse, unfuse
from peft_unlearn.stack.model import ForgetModel


@pytest.fixture
def three(base_dir: Path, tmp_path: Path) -> ForgetModel:
    for seed in (1, 2, 3):
        write(tmp_path / f"n{seed}", base_dir, seed=seed)
    return ForgetModel.from_pretrained(base_dir, [tmp_path / f"n{i}" for i in (1, 2, 3)], scales=[1, -0.7, 0.3])


def looped(model: ForgetModel) -> torch.Tensor:
    unfuse(model.model)
    try:
        return logits(model.model)
    finally:
        fuse(model.model)


def close(model: ForgetModel) -> bool:
    a, b = logits(model.model), looped(model)
    return float((a - b).abs().max()) <= 1e-6 * float(b.abs().max())


def pairs(model: ForgetModel) -> list[torch.Tensor]:
    layers = [m for m in model.model.modules() if isinstance(m, FusedLinear)]
    assert len(layers) == 4
    return [m._pair.a for m in layers if m._pair is not None and m._pair.a is not None]


def test_same_as_the_loop_and_really_fused(three: ForgetModel) -> None:
    assert close(three)
    logits(three.model)
    assert [a.shape[0] for a in pairs(three)] == [12] * 4
    ran = []
    for m in three.model.modules():
        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(lambda m, *_: ran.append(m))
    logits(three.model)
    factors = {m for n, m in three.model.named_modules() if "lora_" in n}
    assert ran and not factors & set(ran)


def test_the_scale_and_the_disabled_base(base_dir: Path, three: ForgetModel) -> None:
    before = logits(three.model)
    three.scale("n2", 2.5)
    assert close(three) and not torch.equal(before, logits(three.model))
    three.scale("n2", -0.7)
    assert torch.equal(before, logits(three.model))
    with three.disabled() as model:
        assert torch.equal(logits(model), logits(load_base(base_dir)))
    assert torch.equal(before, logits(three.model))
    for name in ("n1", "n2", "n3"):
        three.scale(name, 0)
    assert torch.equal(logits(three.model), logits(load_base(base_dir)))


def test_an_adapter_at_zero_is_as_if_absent(base_dir: Path, three: ForgetModel) -> None:
    three.scale("n2", 0)
    paths = {n: three.adapters[n].path for n in ("n1", "n3")}
    without = ForgetModel.from_pretrained(base_dir, paths, scales=[1, 0.3])
    assert torch.equal(logits(three.model), logits(without.model))


def test_swapping_one_by_one(base_dir: Path, three: ForgetModel) -> None:
    three.scale("n1", 1)
    before = logits(three.model)
    subjects = on_one_model(three.model, {"base": None, "one": "n1", "two": ["n1", "n3"]})
    with subjects["one"]() as model:
        assert torch.equal(logits(model), logits(adapted(base_dir, 1)))
    with subjects["two"]() as model:
        two = logits(model)
    with subjects["base"]() as model:
        assert torch.equal(logits(model), logits(load_base(base_dir)))
    assert torch.equal(before, logits(three.model))
    three.remove("n2")
    assert torch.equal(two, logits(three.model))


def test_new_weights_new_pair(three: ForgetModel) -> None:
    logits(three.model)
    layer = three.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        layer.lora_B["n1"].weight.add_(0.1)
    assert close(three)
    layer.lora_A["n2"].weight.data = torch.randn_like(layer.lora_A["n2"].weight)
    assert close(three)
    logits(three.model)
    layer.lora_A["n3"] = copy.deepcopy(layer.lora_A["n3"])
    with torch.no_grad():
        layer.lora_A["n3"].weight.mul_(3)
    assert close(three)


def test_moving_to_another_dtype(three: ForgetModel) -> None:
    before = logits(three.model)
    three.model.to(torch.float64)
    assert logits(three.model).dtype == torch.float64 and {a.dtype for a in pairs(three)} == {torch.float64}
    assert torch.allclose(logits(three.model).float(), before, atol=1e-5)
    assert torch.allclose(logits(three.model), looped(three), atol=1e-12)
    three.model.to(torch.float32)
    assert torch.equal(before, logits(three.model))


def test_while_one_trains_the_loop_runs(three: ForgetModel) -> None:
    from tinyfolder import IDS

    logits(three.model)
    for n, p in three.model.named_parameters():
        p.requires_grad_(".n2." in n)
    three.model(input_ids=IDS).logits.sum().backward()
    grads = {n for n, p in three.model.named_parameters() if p.grad is not None}
    assert grads == {n for n, p in three.model.named_parameters() if ".n2." in n}


def test_gradients_of_the_input_pass(three: ForgetModel) -> None:
    layer = three.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, layer.in_features, requires_grad=True)
    (fused,) = torch.autograd.grad(layer(x).square().sum(), x)
    unfuse(three.model)
    assert type(layer) is Linear
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.allclose(fused, plain, atol=1e-5)


def test_built_under_inference_mode_used_outside(three: ForgetModel) -> None:
    layer = three.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.inference_mode():
        layer(torch.randn(2, layer.in_features))
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_a_copy_has_a_life_of_its_own(three: ForgetModel) -> None:
    before = logits(three.model)
    other = copy.deepcopy(three.model)
    with torch.no_grad():
        for n, p in other.named_parameters():
            if "lora_B" in n:
                p.zero_()
    assert torch.equal(before, logits(three.model)) and not torch.equal(before, logits(other))


def test_dropout_and_variants_keep_their_own_forward(base_dir: Path, tmp_path: Path) -> None:
    from stacks import lora

    lora(tmp_path / "dora", base_dir, 5, use_dora=True)
    lora(tmp_path / "drop", base_dir, 6, lora_dropout=0.5)
    stack = ForgetModel.from_pretrained(base_dir, [tmp_path / "dora", tmp_path / "drop"])
    assert close(stack)
    lora(tmp_path / "two", base_dir, 7)
    stack = ForgetModel.from_pretrained(base_dir, [tmp_path / "two", tmp_path / "drop"])
    assert close(stack)
    still = logits(stack.model)
    stack.model.train()
    assert not torch.equal(logits(stack.model), logits(stack.model))
    stack.model.eval()
    assert torch.equal(still, logits(stack.model))
