"""One-shot factors against the same by full gradients of the weights, and recipes that use them."""

from __future__ import annotations

import pytest
import tiny
import torch

from peft_unlearn import registry
from peft_unlearn.attribution import oneshot as job
from peft_unlearn.attribution.moments import factors
from peft_unlearn.attribution.streamed import eligible, gradients, scored
from peft_unlearn.errors import UserError
from peft_unlearn.gradients.terms import Term
from peft_unlearn.training.recipe import prepare

TERM = Term("forget", "forget", registry.get("objective", "ga"), 1.0, registry.get("objective", "ga").resolve({}))


def shot(model) -> job.Shot:
    from peft_unlearn.data.collate import encode
    from peft_unlearn.data.formats import to_text

    tok = tiny.tokenizer()
    sets = {n: [encode(*to_text(r, tok), tok)[0] for r in tiny.rows(5, n)] for n in ("forget", "retain", "holdout")}
    return job.Shot(model, sets, [TERM], tok.pad_token_id, 2)


def full(s: job.Shot) -> dict[str, torch.Tensor]:
    """The forget gradient by the weights of the base themselves."""
    weights = eligible(s.model, ["down_proj", "q_proj"])
    with scored(s.model, weights):
        return gradients(s.model, weights, s.rows["forget"], TERM, pad_id=s.pad_id)


@pytest.mark.parametrize("rows", ["gradient", "elicited"])
def test_b_is_the_gradient_on_the_rows_of_a(rows):
    """dW = B A = -s^2 G A^T A: what the row space of A leaves of the forget gradient; without a projection A is orthonormal."""
    model = tiny.lora(tiny.llama(), moved=False, target_modules=["down_proj", "q_proj"]).eval()
    s = shot(model)
    registry.get("oneshot", "repselect").fn(s, rows=rows, strength=0, learning_rate=0.05)
    moved = {k: b.detach().clone() for k, _, b in factors(model)}
    job.fill(s.side("B"), 0.0)
    for name, g in full(s).items():
        ((key, a, _),) = [p for p in factors(model) if name.removesuffix(".weight") in p[0][0]]
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(moved[key], -2 * g @ a.detach().T, atol=1e-5, rtol=1e-3)  # 2: alpha / r
        if rows == "gradient":  # the sketch holds more of the gradient than four random rows would
            kept = (g @ a.detach().T).norm() / g.norm()
            assert kept > 0.6, name


def test_the_projection_takes_the_retain_activations_out():
    """What is left of A's effect on retain inputs against that without projection, at rows of equal length."""
    left = []
    for strength in (0.0, 100.0):
        model = tiny.lora(tiny.llama(), moved=False, target_modules=["down_proj", "q_proj"]).eval()
        s = shot(model)
        registry.get("oneshot", "repselect").fn(s, rows="gradient", strength=strength, learning_rate=0.05)
        energy = 0.0
        for key, a, _ in factors(model):
            value, v = s.moments("retain")[key].spectrum()
            energy += float(((a.detach() @ v.T).square() * value).sum())
        left.append(energy)
    assert left[1] < 0.05 * left[0]


def test_lunar_is_the_ridge_optimum():
    """B A against the normal equations over all tokens: c r for forget inputs, nothing for retain inputs."""
    model = tiny.lora(tiny.llama(), moved=False, target_modules=["down_proj"], layers_to_transform=[1]).eval()
    s = shot(model)
    seen: dict[str, list[torch.Tensor]] = {"forget": [], "retain": []}
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
    for name, inputs in seen.items():
        handle = layer.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0][0].detach().double())
        )
        for row in s.rows[name]:
            with torch.no_grad():
                model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False)
        handle.remove()
    registry.get("oneshot", "lunar_ridge").fn(s, towards="holdout", ridge=0.1)
    f, r = (torch.cat(x) for x in seen.values())
    c = sum(x.T @ x / (x.square().sum() / x.shape[1]) for x in (f, r)) / 2
    ((_, a, b),) = factors(model)
    want = torch.linalg.solve(c + 0.1 * torch.eye(len(c), dtype=torch.float64), f.mean(0))
    torch.testing.assert_close(a.detach()[0].double(), want, atol=1e-4, rtol=1e-3)
    assert not a[1:].any() and not b[:, 1:].any() and b[:, 0].any()


def test_experts_are_filled_too():
    import families as f

    model = f.adapted(f.base("olmoe", vocab_size=320, max_position_embeddings=128), experts={1: [0, 2]}).eval()
    s = shot(model)
    registry.get("oneshot", "repselect").fn(s, rows="gradient", strength=1.0, learning_rate=0.05)
    assert any(bool(b.any()) for k, _, b in factors(model) if k[1] == "gate_up")
    with pytest.raises(UserError, match="works on linear layers"):
        registry.get("oneshot", "lunar_ridge").fn(s, towards="holdout", ridge=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"max_steps": 3}}, "trains nothing, so train"),
        ({"oneshot": {"repselekt": {}}}, "repselect"),
        ({"oneshot": {"repselect": {"kl": 0}}}, "kl is a budget"),
        ({"oneshot": {"repselect": {"strength": -1}}}, "strength"),
        ({"adapter": {"type": "sparse"}}, "adapter.type is sparse"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, change, words):
    recipe = {
        "base": "embedded:people",
        "data": "embedded:people",
        "oneshot": "repselect",
        "adapter": {"type": "lora"},
        **change,
    }
    with pytest.raises(UserError, match=words):
        prepare(recipe, tmp_path / "out")


@pytest.mark.slow
def test_from_a_recipe_to_a_folder(tmp_path):
    """The budget is kept on a few rows, the folder says what was done, and no optimizer is mentioned."""
    import json

    import peft_unlearn
    from peft_unlearn.data.bundle import ForgetRetain

    data = tmp_path / "data"
    data.mkdir()
    for name in ("forget", "retain"):
        rows = ForgetRetain.load("embedded:people").rows(name)
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in (rows or [])[:4]))
    recipe = {
        "base": "embedded:people", "data": str(data), "adapter": {"type": "lora", "r": 4, "target_modules": ["down_proj"]},
        "oneshot": {"repselect": {"kl": 0.02, "rows": "gradient"}},
    }  # fmt: skip
    folder = peft_unlearn.train(recipe, tmp_path / "out", progress=lambda _: None)
    assert folder is not None
    method = folder.manifest.method
    assert 0 < method["oneshot"]["repselect"]["kl_found"] <= 0.02 and method["terms"]["forget"]["ga"]["weight"] == 1
    assert "optimizer" not in method and method["steps"] == 0 and "repselect" in (folder.path / "README.md").read_text()
    assert folder.recipe["oneshot"] == recipe["oneshot"]
