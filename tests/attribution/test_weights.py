"""Which weights may move: scores against float64 oracles, exact counts, and a model that is left as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from families import base as moe_base
from peft import LoraConfig, get_peft_model
from torch import Tensor

from peft_unlearn import registry
from peft_unlearn.attribution import radix
from peft_unlearn.attribution.streamed import eligible, gradients, scored
from peft_unlearn.attribution.weights import select
from peft_unlearn.data.collate import encode
from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import base_tensors
from peft_unlearn.gradients.terms import Term

METHODS = [m.name for m in registry.methods("selection")]


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    tok = tiny.tokenizer()
    rows = {"forget": tiny.rows(5, "f", 1), "retain": tiny.rows(7, "r", 2)}
    return {n: [encode(f"{r['question']}\n", r["answer"], tok)[0] for r in some] for n, some in rows.items()}


@pytest.fixture
def model() -> Any:
    return tiny.llama()


def bare(name: str, **inputs: Any) -> Tensor:
    """A method's own function."""
    fn = registry.get("selection", name).fn
    return fn(**inputs)


def flat(found: Any) -> dict[str, set[int]]:
    return {n: set(i.tolist()) for n, i in found.indices.items()}


# --- the threshold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 50, 333, 998, 1000])
def test_radix_select_is_topk_with_ties_to_the_earlier(k: int) -> None:
    g = torch.Generator().manual_seed(k)
    parts = {
        "a": torch.randn(300, generator=g),
        "b": torch.randn(40, 10, generator=g),
        "c": torch.randn(300, generator=g),
    }
    parts["b"][3] = parts["a"][7]  # ten ties, and one before them
    parts["c"][::2] = 0.0
    parts["c"][1::4] = -0.0
    whole = torch.cat([p.reshape(-1) for p in parts.values()])
    order = sorted(range(1000), key=lambda i: (-float(whole[i]), i))[:k]
    found = dict(radix.largest({n: (lambda p=p: p) for n, p in parts.items()}, k))
    taken = torch.cat([f.reshape(-1) for f in found.values()]).nonzero().squeeze(1).tolist()
    assert taken == sorted(order)
    assert whole[taken].sort().values.equal(whole.topk(k).values.sort().values)


def test_scores_that_never_win_and_those_beyond_all_numbers() -> None:
    scores = torch.tensor([-torch.inf, 2.0, torch.inf, -1.0, -torch.inf, 3e-45])
    for k, want in ((1, [2]), (3, [1, 2, 5]), (4, [1, 2, 3, 5]), (6, [1, 2, 3, 5])):
        ((_, taken),) = radix.largest({"x": lambda: scores}, k)
        assert taken.nonzero().squeeze(1).tolist() == want


# --- gradients --------------------------------------------------------------------------------------------------------


_ORACLES: dict[Any, dict[str, Tensor]] = {}


def oracle(model: Any, rows: list[dict[str, Any]], entropy: bool = False) -> dict[str, Tensor]:
    """float64 gradients of the mean NLL (or negative entropy) over the targets of all rows, one row at a time; of tiny.llama()."""
    key = (len(rows), entropy)
    if key not in _ORACLES:
        _ORACLES[key] = by_rows(rows, entropy)
    return _ORACLES[key]


def by_rows(rows: list[dict[str, Any]], entropy: bool) -> dict[str, Tensor]:
    copy = tiny.llama().double()
    total, n = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        at = (labels[1:] != -100).nonzero().squeeze(1)
        logp = copy(input_ids=ids).logits[0, at].log_softmax(1)
        total = total + ((logp.exp() * logp).sum() if entropy else -logp.gather(1, labels[at + 1][:, None]).sum())
        n += len(at)
    (total / n).backward()
    return {n: p.grad for n, p in copy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", ["nll", "neg_entropy"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_streamed_gradients_are_those_of_one_backward(model: Any, data: Any, objective: str, size: int) -> None:
    params = eligible(model)
    method = registry.get("objective", objective)
    with scored(model, params):
        found = gradients(
            model, params, data["forget"], Term("g", "forget", method, 1.0, method.resolve({})), size=size
        )
    want = oracle(model, data["forget"], objective == "neg_entropy")
    assert set(found) == {n for n in want if n.endswith("_proj.weight")} and len(found) == 14
    for name, g in found.items():
        assert (g.double() - want[name]).abs().max() < 1e-5 * want[name].abs().max()


def test_accumulators_of_fewer_bits_elsewhere(model: Any, data: Any) -> None:
    exact = select(model, data, method="snip", ratio=0.05)
    coarse = select(model, data, method="snip", ratio=0.05, accumulators=torch.bfloat16, device="cpu", size=2)
    shared = sum(len(a & b) for a, b in zip(flat(exact).values(), flat(coarse).values(), strict=True))
    assert exact.count == coarse.count and shared > 0.95 * exact.count


def test_a_loss_against_the_base_is_differentiated_at_the_base(model: Any, data: Any) -> None:
    """NPO's gradient there is that of each answer's likelihood: of one answer, that of ga, times its length."""
    one = {"forget": data["forget"][:1]}
    assert flat(select(model, one, method="gradient", ratio=0.05, forget="npo")) == flat(
        select(model, one, method="gradient", ratio=0.05)
    )
    with pytest.raises(UserError, match="compares whole distributions"):
        select(model, data, method="gradient", ratio=0.05, forget="neg_kl")


def test_one_gradient_lives_at_a_time(model: Any, data: Any) -> None:
    params, nll = eligible(model), registry.get("objective", "nll")
    live = []

    def look(p: Any) -> None:  # before ours, which takes the gradient away
        live.append(sum(q.grad is not None for q in model.parameters()))

    handles = [p.register_post_accumulate_grad_hook(look) for p in params.values()]
    with scored(model, params):
        gradients(model, params, data["forget"], Term("g", "forget", nll), size=2)
    for handle in handles:
        handle.remove()
    assert live == [1] * 14 * 3


# --- scores -----------------------------------------------------------------------------------------------------------


def scores64(method: str, model: Any, data: Any, **hyper: Any) -> dict[str, Tensor]:
    """What each method gives, in float64, from plain gradients and the formulas of the papers."""
    f, r, e = oracle(model, data["forget"]), oracle(model, data["retain"]), oracle(model, data["forget"], entropy=True)
    w = {n: p.detach().double() for n, p in eligible(model).items()}
    whole = {k: torch.cat([x[n].reshape(-1) for n in w]) for k, x in (("r", r), ("w", w))}
    gamma = hyper.get("gamma") or float(whole["r"].square().mean().sqrt() / whole["w"].square().mean().sqrt())
    formulas = {
        "wagle": lambda n: ((w[n] - r[n] / gamma) * f[n]).abs(),
        "snip": lambda n: (w[n] * f[n]).abs(),
        "gradient": lambda n: f[n].abs(),
        "magnitude": lambda n: w[n].abs(),
        "emso": lambda n: e[n] * -f[n],
        "contrast_retain": lambda n: e[n].abs() / (r[n].abs() + whole["r"].abs().mean()),
    }
    return {n: formulas[method](n) for n in w}


CASES = [("wagle", {}), ("wagle", {"gamma": 1e-6}), ("wagle", {"gamma": 1.0})] + [
    (m, {}) for m in ("snip", "gradient", "magnitude", "emso", "contrast_retain")
]


@pytest.mark.parametrize(("method", "hyper"), CASES)
@pytest.mark.parametrize("budget", ["global", "module"])
def test_the_chosen_entries_are_the_best_by_the_formula(
    model: Any, data: Any, method: str, hyper: dict[str, Any], budget: Any
) -> None:
    found = select(model, data, method=method, ratio=0.03, hyper=hyper, budget=budget)
    want = scores64(method, model, data, **hyper)
    groups = [list(want)] if budget == "global" else [[n] for n in want]
    for names in groups:
        score = torch.cat([want[n].reshape(-1) for n in names])
        taken = torch.cat(
            [torch.zeros(want[n].numel(), dtype=torch.bool).index_fill(0, found.indices[n], True) for n in names]
        )
        assert int(taken.sum()) == int(0.03 * len(score))
        assert score[taken].min() >= score[~taken].max() * (1 - 1e-3)


@pytest.mark.parametrize("ratio", [0.001, 0.0123, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("method", ["wagle", "random", "wanda"])
def test_exactly_the_share_that_was_asked_for(model: Any, data: Any, ratio: float, method: str) -> None:
    n = sum(p.numel() for p in eligible(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = select(model, data, method=method, ratio=ratio)
    assert found.count == int(ratio * n + 1e-9)
    assert all(bool((i[1:] > i[:-1]).all()) for i in found.indices.values())


def test_wagle_between_its_ends() -> None:
    g = torch.Generator().manual_seed(0)
    w, f, r = (torch.randn(6, 5, generator=g) for _ in range(3))
    f[2] = 0
    about = {"weight_rms": 1.0, "retain_grad_rms": 1.0}
    snip = bare("snip", weight=w, forget_grad=f)
    assert torch.allclose(bare("wagle", weight=w, forget_grad=f, retain_grad=r, gamma=1e9, **about), snip)
    assert torch.equal(bare("wagle", weight=w, forget_grad=f, retain_grad=0 * r, gamma=1e-3, **about), snip)
    assert torch.equal(
        bare("wagle", weight=w, forget_grad=f, retain_grad=0 * r, weight_rms=1.0, retain_grad_rms=0.0), snip
    )
    score = bare("wagle", weight=w, forget_grad=f, retain_grad=r, gamma=1e-6, **about)
    assert torch.allclose(score, (r * f).abs() * 1e6, rtol=1e-3) and not score[2].any()
    assert torch.equal(score, bare("wagle", weight=w, forget_grad=-f, retain_grad=r, gamma=1e-6, **about))


def test_the_sign_of_the_forget_loss_is_nothing_to_wagle(model: Any, data: Any) -> None:
    assert flat(select(model, data, method="wagle", ratio=0.02)) == flat(
        select(model, data, method="wagle", ratio=0.02, forget="ga")
    )


def test_emso_takes_what_both_losses_pull_one_way(model: Any, data: Any) -> None:
    e, f = oracle(model, data["forget"], entropy=True), oracle(model, data["forget"])
    with pytest.warns(UserWarning, match="a LoRA of rank"):
        found = select(model, data, method="emso", ratio=1.0)
    agree = sum(int(((e[n] * -f[n]) > 0).sum()) for n in found.shapes)
    assert abs(found.count - agree) <= 2 < found.count, "entries that disagree are never chosen, whatever the ratio"
    for contrast, ratio in (("product", 0.05), ("agreeing", 0.05)):
        for n, i in select(model, data, method="emso", ratio=ratio, hyper={"contrast": contrast}).indices.items():
            assert bool((e[n].reshape(-1)[i] * f[n].reshape(-1)[i] < 0).all())
    a, b = torch.tensor([3.0, -1.0, 2.0]), torch.tensor([1.0, -4.0, -1.0])
    assert bare("emso", entropy_grad=a, ascent_grad=b).tolist() == [3.0, 4.0, -torch.inf]
    assert bare("emso", entropy_grad=a, ascent_grad=b, contrast="agreeing").tolist() == [3.0, 1.0, -torch.inf]
    assert bare("emso", entropy_grad=a, ascent_grad=b, contrast="difference").tolist() == [2.0, -3.0, 1.0]


def test_wanda_sees_every_token_once_and_no_padding(model: Any, data: Any) -> None:
    seen: dict[str, list[Tensor]] = {}
    name = "model.layers.1.self_attn.q_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a: seen.setdefault(name, []).append(a[0][0]))
    for row in data["forget"]:
        model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    w = model.get_submodule(name).weight.detach()
    want = (w.abs() * torch.cat(seen[name]).norm(dim=0)).reshape(-1)
    found = select(model, data, method="wanda", ratio=0.1, target_modules=[name])
    assert set(found.indices[f"{name}.weight"].tolist()) == set(want.topk(found.count).indices.tolist())


def test_random_is_its_seed_whatever_else_is_chosen_from(model: Any, data: Any) -> None:
    one, again, other = (flat(select(model, {}, method="random", ratio=0.01, seed=s)) for s in (1, 1, 2))
    assert one == again != other
    q = select(model, {}, method="random", ratio=0.01, seed=1, budget="module", target_modules=["q_proj"])
    all_ = select(model, {}, method="random", ratio=0.01, seed=1, budget="module")
    assert all(torch.equal(i, all_.indices[n]) for n, i in q.indices.items())


# --- shapes of weights ------------------------------------------------------------------------------------------------


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=128)).eval()


def test_sure_takes_whole_rows_of_outputs(model: Any, data: Any) -> None:
    found = select(model, data, method="sure", ratio=0.1)
    f = oracle(model, data["forget"])
    norms = {n: f[n].norm(dim=1) for n in found.shapes}
    rows = {
        n: i.reshape(-1, s[1]) // s[1] for (n, i), s in zip(found.indices.items(), found.shapes.values(), strict=True)
    }
    assert all(bool((r == r[:, :1]).all()) for r in rows.values())
    taken = {n: r[:, 0].tolist() for n, r in rows.items()}
    assert sum(map(len, taken.values())) == int(0.1 * sum(map(len, norms.values())))
    worst = min(float(norms[n][i].min()) for n, i in taken.items() if i)
    assert (
        worst >= max(float(v[[k for k in range(len(v)) if k not in taken[n]]].max()) for n, v in norms.items()) * 0.999
    )


def test_conv1d_keeps_its_outputs_in_columns(data: Any) -> None:
    found = select(gpt2(), data, method="sure", ratio=0.1, target_modules=["c_fc"])
    (shape,), (i,) = found.shapes.values(), found.indices.values()
    assert shape == (32, 128) and len(i) == 12 * 32
    assert bool((i.reshape(32, 12) % 128 == i[:12] % 128).all())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_one_tensor(family: str, data: Any) -> None:
    moe = moe_base(family)
    short = {n: [{k: [min(t, 60) for t in v] for k, v in r.items()} for r in rows] for n, rows in data.items()}
    found = select(moe, short, method="wagle", ratio=0.01, target_modules=["experts.down_proj", "o_proj"])
    fused = [n for n, s in found.shapes.items() if len(s) == 3]
    assert fused and len(fused) < len(found.shapes) and all(n.endswith("experts.down_proj") for n in fused)
    assert all(found.shapes[n] == tuple(p.shape) for n, p in base_tensors(moe).items() if n in found.shapes)
    rows = select(moe, short, method="sure", ratio=0.1, target_modules=["experts.down_proj"])
    shape, i = rows.shapes[fused[0]], rows.indices[fused[0]]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[i] = True
    along = mask.all(1) if family == "gpt_oss" else mask.all(2)  # its weights lie as (experts, in, out)
    assert int(along.sum()) * shape[1 if family == "gpt_oss" else 2] == len(i) > 0
    with pytest.raises(UserError, match="single experts cannot be seen"):
        select(moe, short, method="wanda", ratio=0.1, target_modules=["experts.down_proj"])


def test_names_are_the_bases_own_under_an_adapter(model: Any, data: Any) -> None:
    plain = select(model, data, method="snip", ratio=0.02)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    assert flat(select(adapted, data, method="snip", ratio=0.02)) == flat(plain)


# --- the model afterwards ---------------------------------------------------------------------------------------------


def state(model: Any) -> dict[str, Any]:
    return {
        "weights": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": [(p.requires_grad, p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "rng": torch.get_rng_state(),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    grads = all(x[0] == y[0] and x[1] is y[1] for x, y in zip(a["flags"], b["flags"], strict=True))
    weights = all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
    return (
        grads and weights and a["modes"] == b["modes"] and a["hooks"] == b["hooks"] and torch.equal(a["rng"], b["rng"])
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(model: Any, data: Any, method: str) -> None:
    model.train()
    model.model.layers[0].eval()
    for k, p in enumerate(model.parameters()):
        p.requires_grad_(k % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = state(model)
    ratio = 0.2 if method == "sure" else 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        select(model, data, method=method, ratio=ratio)
    assert same(before, state(model))


def test_also_when_interrupted(model: Any, data: Any) -> None:
    model.train()
    before = state(model)

    def stop(what: str, done: int, total: int) -> None:
        if "retain" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select(model, data, method="wagle", ratio=0.01, progress=stop, size=2)
    assert same(before, state(model))


# --- bad input --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ratio": 0}, r"ratio 0 must lie in \(0, 1\]"),
    ({"ratio": 1.5}, "ratio 1.5 must lie"),
    ({"ratio": float("nan")}, "ratio nan must lie"),
    ({"ratio": 1e-9}, "less than one"),
    ({"ratio": 1e-4, "budget": "module"}, "of the .* entries .* of model.layers.0.* is less than one"),
    ({"method": "wagel"}, "there is no selection 'wagel'.*wagle"),
    ({"hyper": {"gama": 1}}, "no hyper-parameter 'gama'.*gamma"),
    ({"hyper": {"gamma": -1}}, "outside"),
    ({"budget": "layer"}, "not one of global, module"),
    ({"target_modules": ["q_proj", "w_proj"]}, "called 'w_proj'"),
    ({"target_modules": ["norm"]}, "no linear module or 3-D expert weight is called 'norm'"),
    ({"forget": "rmu"}, "rmu"),
    ({"data": {"forget": []}}, "reads the forget and the retain set"),
]


@pytest.mark.parametrize(("wrong", "says"), REFUSED)
def test_what_cannot_be_chosen_is_refused(model: Any, data: Any, wrong: dict[str, Any], says: str) -> None:
    asked = {"data": data, "method": "wagle", "ratio": 0.01, **wrong}
    before = state(model)
    with pytest.raises(UserError, match=says):
        select(model, asked.pop("data"), **asked)
    assert same(before, state(model))


def test_tied_output_embeddings_are_not_moved_alone(data: Any) -> None:
    with pytest.raises(UserError, match="tied to the input embeddings"):
        select(
            tiny.llama(tie_word_embeddings=True), data, method="snip", ratio=0.01, target_modules=["lm_head", "q_proj"]
        )


def test_a_base_that_holds_nan_gives_no_selection(model: Any, data: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        select(model, data, method="snip", ratio=0.01)
    with pytest.raises(UserError, match="not numbers"):
        select(model, data, method="magnitude", ratio=0.01)


# --- structures, and an adapter's own weights -------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["row", "column", "module"])
def test_structures_stand_or_fall_by_their_sum(model: Any, data: Any, unit: Any) -> None:
    want = {
        n: w.sum(1) if unit == "row" else w.sum(0) if unit == "column" else w.mean()
        for n, w in scores64("snip", model, data).items()
    }
    found = select(model, data, method="snip", ratio=0.3, unit=unit)
    flat_scores = torch.cat([w.reshape(-1) for w in want.values()])
    k = int(0.3 * len(flat_scores))
    edge = flat_scores.topk(k).values[-1]
    for n, w in want.items():
        mask = torch.zeros(found.shapes[n], dtype=torch.bool)
        mask.view(-1)[found.indices[n]] = True
        along = {"row": mask.all(1), "column": mask.all(0), "module": mask.all()}[unit]
        assert int(mask.sum()) == int(along.sum()) * mask.numel() // along.numel(), "whole ones only"
        assert along.equal(w >= edge * (1 - 1e-5))
    if unit == "module":
        assert found.about["scores"] == {n: pytest.approx(float(w), rel=1e-4) for n, w in want.items()}


def test_the_square_of_each_batch_is_the_fisher_information(model: Any, data: Any) -> None:
    params, nll = eligible(model, ["down_proj"]), registry.get("objective", "nll")
    rows = sorted(data["forget"], key=lambda r: len(r["input_ids"]))
    with scored(model, params):
        found = gradients(model, params, rows, Term("g", "forget", nll), size=2, squared=True)
    parts = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    tokens = [sum(sum(t != -100 for t in r["labels"][1:]) for r in part) for part in parts]
    for name, f in found.items():
        want = sum(by_rows(p, False)[name].square() * n for p, n in zip(parts, tokens, strict=True)) / sum(tokens)
        assert (f.double() - want).abs().max() < 1e-5 * want.max()


def test_a_fresh_lora_ranks_nothing(model: Any, data: Any) -> None:
    """The score of every factor is a product with a zero; the way out is said, three times."""
    fresh = tiny.lora(model, moved=False)
    with pytest.raises(
        UserError, match=r"this LoRA is fresh.*unit row.*train some steps first.*init_lora_weights: fila"
    ):
        select(fresh, data, method="snip", ratio=0.1, space="adapter")
    assert select(fresh, data, method="random", ratio=0.1, space="adapter").density == pytest.approx(0.1, rel=2e-3)
    with pytest.raises(UserError, match="no adapter that is trainable"):
        select(tiny.llama().requires_grad_(False), data, method="snip", ratio=0.1, space="adapter")


def test_entries_of_an_adapter_that_was_trained(model: Any, data: Any) -> None:
    lora = tiny.lora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = select(lora, data, method="snip", ratio=0.2, space="adapter")
    assert set(found.shapes) == {n for n, p in lora.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n, i in found.indices.items() if len(i)} == {"lora_A", "lora_B"}
