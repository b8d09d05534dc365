"""Objectives: literal loops in float64, identities between them, limits, inert positions, twenty steps of each on a tiny model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import fakepass
import pytest
import tiny
import torch
from fakepass import LAYER, OBJECTIVES, FakePass, random_pass, values
from torch import Tensor

from peft_unlearn import registry
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import Errors
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.gradients.parse import parse_method, parse_terms
from peft_unlearn.gradients.terms import count_units
from peft_unlearn.gradients.window import Window
from peft_unlearn.objectives.representation import steering_vector

Row = list[
    tuple[list[float], list[float], int]
]  # per target: probabilities of the model and of its reference, the target


def grad(value: Tensor, at: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(value.sum(), at)
    return g


# --- literal loops ----------------------------------------------------------------------------------------------------


def rows_of(p: FakePass) -> list[Row]:
    def softmax(z: list[float]) -> list[float]:
        top = max(z)
        e = [math.exp(x - top) for x in z]
        return [x / sum(e) for x in e]

    own, ref = p.z.detach().tolist(), p.z_ref.tolist()
    flat = [(softmax(a), softmax(b), int(y)) for a, b, y in zip(own, ref, p.targets, strict=True)]
    out, at = [], 0
    for k in p.mask.sum(1).tolist():
        out.append(flat[at : at + k])
        at += k
    return out


def kl(p: list[float], q: list[float]) -> float:
    return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))


def undial(p: list[float], q: list[float], y: int, beta: float = 10.0) -> float:
    t = [b * math.exp(-beta * (v == y)) for v, b in enumerate(q)]
    return -sum(x / sum(t) * math.log(a) for x, a in zip(t, p, strict=True))


def struck_out(p: list[float], q: list[float], y: int) -> float:
    rest = 1 - p[y]
    return -sum(a / rest * math.log(a) for v, a in enumerate(p) if v != y)


def unilogit(p: list[float], q: list[float], y: int) -> float:
    n = len(p)
    return -sum((1 / n if v == y else a / (1 - p[y]) * (1 - 1 / n)) * math.log(a) for v, a in enumerate(p))


def one_hot_jsd(p: list[float], v: int) -> float:
    e = [float(k == v) for k in range(len(p))]
    parts = [x * math.log(2 * x / (a + b)) for a, b in zip(p, e, strict=True) for x in (a, b) if x]
    return sum(parts) / 2


def margin(p: list[float], q: list[float], y: int) -> float:
    z = [math.log(a) for a in p]  # logits up to a constant, which the margin does not see
    return (max(z) - sum(z) / len(z)) ** 2


def npo_weight(p: float, q: float, beta: float = 4.0) -> float:
    return 2 * p**beta / (p**beta + q**beta + 1e-5)


TOKEN: dict[str, Callable[[list[float], list[float], int], float]] = {
    "nll": lambda p, q, y: -math.log(p[y]),
    "ga": lambda p, q, y: math.log(p[y]),
    "wga": lambda p, q, y: p[y] * math.log(p[y]),
    "tnpo": lambda p, q, y: npo_weight(p[y], q[y]) * math.log(p[y]),
    "wtnpo": lambda p, q, y: p[y] ** 1.5 * npo_weight(p[y], q[y]) * math.log(p[y]),
    "satimp": lambda p, q, y: p[y] ** 5 * (1 - p[y]) * math.log(p[y]),
    "kl": lambda p, q, y: kl(p, q),
    "neg_kl": lambda p, q, y: -kl(p, q),
    "undial": undial,
    "ceu": struck_out,
    "pdu": margin,
    "neg_entropy": lambda p, q, y: sum(a * math.log(a) for a in p),
    "kl_uniform": lambda p, q, y: kl(p, [1 / len(p)] * len(p)),
    "masc": lambda p, q, y: (
        max(0.0, math.log(p[y] / (1 - p[y]) * 3 / 7) + 0.25) / 0.25
    ),  # with fewer than ten others all of them rival it
    "jsd": lambda p, q, y: (
        sum(a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True)) / 2
    ),
    "unilogit": unilogit,
    "inverted_hinge": lambda p, q, y: 1 + p[y] - max(a for v, a in enumerate(p) if v != y),
}


def ratio(row: Row) -> float:
    return sum(math.log(p[y] / q[y]) for p, q, y in row)


def literal(name: str, p: FakePass) -> list[float]:
    rows = rows_of(p)
    if name == "ceu":
        return [TOKEN[name](*t) for row in rows for t in row[1:]]  # the first answer token is left alone
    if name in TOKEN:
        return [TOKEN[name](*t) for row in rows for t in row]
    if name == "cross_entropy":
        return [sum(-math.log(a[y]) for a, _, y in row) / len(row) for row in rows]
    if name == "margin":
        lead = [[math.log(a[y] / max(x for v, x in enumerate(a) if v != y)) for a, _, y in row] for row in rows]
        return [sum(max(x, -1.0) for x in row) / len(row) for row in lead]
    if name == "npo":
        return [20 * math.log(1 + math.exp(0.1 * ratio(row))) for row in rows]
    if name == "simnpo":
        nll = [-sum(math.log(a[y]) for a, _, y in row) / len(row) for row in rows]
        return [-2 / 4.5 * math.log(1 / (1 + math.exp(-4.5 * x))) for x in nll]
    assert p.other is not None
    winners = rows_of(p.other)
    if name in ("dpo", "idk_dpo", "altpo"):
        wins = [ratio(w) - ratio(row) for row, w in zip(rows, winners, strict=True)]
        return [-20 * math.log(1 / (1 + math.exp(-0.1 * x))) for x in wins]
    if name == "jensun":
        words = [[y for _, _, y in w][:-1] or [w[0][2]] for w in winners]
        return [
            one_hot_jsd(a, w[k % len(w)]) for row, w in zip(rows, words, strict=True) for k, (a, _, _) in enumerate(row)
        ]
    if name == "flat":
        mean = [[sum(a[y] for a, _, y in r) / len(r) for r in some] for some in (rows, winners)]
        return [(math.tanh(f) - math.tanh(w)) / 2 for f, w in zip(*mean, strict=True)]
    if name == "idk":
        return [-math.log(a[y]) for row in winners for a, _, y in row]
    assert p.states[0] is not None and p.states[1] is not None
    h, ref = p.states[0].detach(), p.states[1]
    target = 2 * steering_vector(h.shape[-1], 0)
    out = []
    for i, labels in enumerate(p.labels.tolist()):
        at = [t for t, y in enumerate(labels) if y != -100]
        if name == "rr":
            dot = [sum(float(a) * float(b) for a, b in zip(h[i, t], ref[i, t], strict=True)) for t in at]
            cosines = [
                d / math.hypot(*h[i, t].tolist()) / math.hypot(*ref[i, t].tolist())
                for d, t in zip(dot, at, strict=True)
            ]
            out.append(sum(max(0.0, c) for c in cosines) / len(at))
            continue
        longer = lambda t, i=i: 5 * math.hypot(*ref[i, t].tolist()) / 2 * target  # noqa: E731
        aim = {"rmu": lambda t: target, "adaptive_rmu": longer, "representation_retention": lambda t, i=i: ref[i, t]}[
            name
        ]
        sums = [sum((float(a) - float(b)) ** 2 for a, b in zip(h[i, t], aim(t), strict=True)) for t in at]
        out.append(sum(sums) / h.shape[-1] / len(at))
    return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_literal_loop(name):
    p = random_pass()
    got, want = values(name, p), literal(name, p)
    assert got.ndim == 1 and len(got) == len(want) == count_units(
        registry.get("objective", name).unit, p.batch, registry.get("objective", name).resolve(LAYER.get(name, {}))
    )
    assert got.tolist() == pytest.approx(want, rel=2e-6 if name in LAYER else 1e-9, abs=1e-12)


# --- identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("ga", lambda p, q: torch.ones_like(p)),
        ("wga", lambda p, q: p),
        ("tnpo", lambda p, q: 2 * p**4 / (p**4 + q**4 + 1e-5)),
        ("wtnpo", lambda p, q: 2 * p**5.5 / (p**4 + q**4 + 1e-5)),
        ("satimp", lambda p, q: p**5 * (1 - p)),
    ],
)
def test_token_weights_are_held_constant(name, weight):
    """The gradient by the logits is weight * (onehot - softmax): no term through the weight."""
    p = random_pass(3)
    soft = p.z.detach().softmax(1)
    onehot = torch.nn.functional.one_hot(p.targets, p.z.shape[1])
    w = weight(p.logp.detach().exp(), p.ref_logp.exp())
    torch.testing.assert_close(grad(values(name, p), p.z), w[:, None] * (onehot - soft))


def test_weighted_gradient_ascent():
    p = random_pass(1)
    assert torch.equal(values("wga", p, beta=0.0), values("ga", p))
    torch.testing.assert_close(
        grad(values("wga", p, beta=1.0), p.z), grad(p.logp.exp(), p.z)
    )  # that of the mean of p_t
    forgotten = FakePass(torch.tensor([[0.0, 60.0]], requires_grad=True), [0])
    assert float(grad(values("wga", forgotten), forgotten.z).abs().max()) < 1e-20
    assert float(grad(values("ga", forgotten), forgotten.z).abs().max()) == pytest.approx(1.0)


def test_token_npo():
    p = random_pass(2)
    ga = values("ga", p)
    torch.testing.assert_close(values("tnpo", p, beta=1e-9, eps=0.0), ga)  # weight 1
    torch.testing.assert_close(values("tnpo", p, beta=0.0), ga * 2 / (2 + 1e-5))
    same = FakePass(p.z, p.targets, z_ref=p.z.detach())
    torch.testing.assert_close(values("tnpo", same, eps=0.0), ga)
    assert torch.equal(values("wtnpo", p, alpha=0.0), values("tnpo", p))
    lost = FakePass(torch.tensor([[-300.0, 0.0]]), [0], z_ref=torch.tensor([[-300.0, 0.0]]))
    assert float(values("tnpo", lost, eps=0.0)) == pytest.approx(-300.0)  # both powers underflow, their ratio is 1
    assert abs(float(values("tnpo", lost))) < 1e-20  # with the published eps the weight is gone


def test_satimp_without_exponents_is_gradient_ascent():
    p = random_pass(2)
    assert torch.equal(values("satimp", p, beta1=0.0, beta2=0.0), values("ga", p))
    certain = FakePass(torch.tensor([[90.0, 0.0]]), [0])
    assert torch.isfinite(values("satimp", certain, beta2=0.0)).all()


@pytest.mark.parametrize("beta", [1e-4, 0.1, 2.0])
def test_npo_between_gradient_ascent_and_silence(beta):
    p = random_pass(4)
    w = 2 * torch.sigmoid(beta * p.per_sequence((p.logp - p.ref_logp).detach()))  # 2 p^b / (p^b + ref^b) of sequences
    want = grad(p.per_sequence(p.logp) * w, p.z)
    torch.testing.assert_close(grad(values("npo", p, beta=beta), p.z), want)
    same = FakePass(p.z, p.targets, (3, 1, 4, 2), z_ref=p.z.detach())
    torch.testing.assert_close(grad(values("npo", same, beta=beta), p.z), grad(values("ga", same), p.z))
    assert values("npo", same, beta=beta).tolist() == pytest.approx([2 / beta * math.log(2)] * 4)
    if beta == 1e-4:  # beta -> 0: value - (2/beta) ln 2 -> log ratio
        rest = values("npo", p, beta=beta) - 2 / beta * math.log(2)
        torch.testing.assert_close(rest, p.per_sequence(p.logp - p.ref_logp), atol=2e-2, rtol=1e-3)


@pytest.mark.parametrize("name", ["dpo", "idk_dpo", "altpo"])
def test_identical_winner_and_loser_give_no_gradient(name):
    p = random_pass(5)
    retain_model = FakePass(
        p.z, p.targets, (3, 1, 4, 2), z_ref=p.z_ref, alternate=FakePass(p.z, p.targets, (3, 1, 4, 2), z_ref=p.z_ref)
    )
    v = values(name, retain_model)
    assert v.tolist() == pytest.approx([20 * math.log(2)] * 4)
    assert float(grad(v, p.z).abs().max()) < 1e-15
    assert all(grad(values(name, p), p.z).gather(1, p.targets[:, None]) > 0)  # the loser is pushed down
    assert all(grad(values(name, p), p.other.z).gather(1, p.other.targets[:, None]) < 0)  # the winner up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["kl", "neg_kl", "representation_retention"])
def test_exactly_flat_at_the_reference(name, dtype):
    """Exactly: a rule that scales gradients to unit length would blow a rounding error up."""
    p = random_pass(6, vocab=301, dtype=dtype)
    states = p.states[0]
    same = FakePass(
        p.z, p.targets, (3, 1, 4, 2), z_ref=p.z.detach().clone(), hidden=states, ref_hidden=states.detach().clone()
    )
    v = values(name, same)
    at = states if name == "representation_retention" else p.z
    assert float(v.abs().max()) == 0.0 and float(grad(v, at).abs().max()) == 0.0


def test_undial_without_adjustment_is_flat_at_the_reference():
    p = random_pass(6)
    same = FakePass(p.z, p.targets, z_ref=p.z.detach())
    assert float(grad(values("undial", same, beta=0.0), p.z).abs().max()) < 1e-15
    g = grad(values("undial", same), p.z).gather(1, p.targets[:, None])
    assert (g > 0).all()  # descent lowers the true token


@pytest.mark.parametrize("name", ["kl", "undial"])
def test_kl_and_undial_pull_towards_their_targets(name):
    p = random_pass(7)
    q = p.z_ref - (10.0 * torch.nn.functional.one_hot(p.targets, 7) if name == "undial" else 0)
    torch.testing.assert_close(grad(values(name, p), p.z), p.z.detach().softmax(1) - q.softmax(1))


def test_ceu_gradient_is_that_of_the_complement():
    p = random_pass(8)
    got = grad(values("ceu", p, ignore_first=0), p.z)
    torch.testing.assert_close(got, grad(-torch.log1p(-p.logp.exp()), p.z))
    gone = FakePass(torch.tensor([[-80.0, 0.0, 1.0]], requires_grad=True), [0])
    assert float(grad(values("ceu", gone, ignore_first=0), gone.z).abs().max()) < 1e-30  # bounded as p_y -> 0
    for skip, n in ((0, 10), (1, 6), (3, 1), (9, 0)):
        assert len(values("ceu", p, ignore_first=skip)) == n
        assert count_units(registry.get("objective", "ceu").unit, p.batch, {"ignore_first": skip}) == n


def test_entropy():
    v = 7
    flat = torch.full((2, v), 0.3, dtype=torch.float64, requires_grad=True)
    p = FakePass(flat, [1, 2])
    assert values("neg_entropy", p).tolist() == pytest.approx([-math.log(v)] * 2)  # T1, T7: the minimum
    assert float(grad(values("neg_entropy", p), flat).abs().max()) < 1e-15
    assert float(values("kl_uniform", p).abs().max()) < 1e-15
    sure = torch.tensor([[500.0] + [0.0] * (v - 1)], dtype=torch.float64, requires_grad=True)
    p = FakePass(sure, [0])
    assert (
        float(values("neg_entropy", p).abs()) < 1e-12
        and float(grad(values("neg_entropy", p), sure).abs().max()) < 1e-12
    )  # T2
    onehot = torch.tensor([[1.0] + [0.0] * (v - 1)], dtype=torch.float64)
    torch.testing.assert_close(grad(values("kl_uniform", p), sure), onehot - 1 / v)
    for seed in range(5):
        q = random_pass(seed, spread=10.0 ** (seed - 2))
        assert (values("neg_entropy", q) >= -math.log(v) - 1e-12).all() and (values("neg_entropy", q) <= 0).all()


@pytest.mark.parametrize("name", ["neg_entropy", "kl_uniform", "pdu", "kl", "undial", "inverted_hinge"])
def test_logit_gradient_by_finite_differences_and_shift(name):
    """T3: gradcheck; T4: a constant added to a position's logits changes nothing."""
    p = random_pass(9, lengths=(2, 2))

    def at(z: Tensor) -> Tensor:
        return values(name, FakePass(z, p.targets, (2, 2), z_ref=p.z_ref))

    assert torch.autograd.gradcheck(at, (p.z.detach().clone().requires_grad_(),), eps=1e-6, atol=1e-6)
    torch.testing.assert_close(at(p.z + torch.arange(4.0)[:, None] * 3), at(p.z))


def test_rmu_is_zero_where_the_state_is_the_target():
    u = steering_vector(5, seed=3)
    assert float(u.norm()) == pytest.approx(1.0) and (u >= 0).all()
    p = random_pass()
    h = (4.0 * u).expand(4, 5, 5).clone()
    h[p.labels == -100] = 1e3  # positions that are no targets do not count
    still = FakePass(p.z, p.targets, (3, 1, 4, 2), hidden=h.requires_grad_())
    v = values("rmu", still, coeff=4.0, seed=3)
    assert float(v.detach().abs().max()) == 0.0 and float(grad(v, h).abs().max()) == 0.0
    assert (values("rmu", still, coeff=4.0, seed=4) > 0).all()
    assert torch.equal(steering_vector(5, 3), u)


def test_inverted_hinge_moves_two_tokens_and_is_bounded():
    z = torch.tensor([[1.0, 0.5, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    g = grad(values("inverted_hinge", FakePass(z, [0])), z)[0]
    assert g[0] > 0 > g[1] and abs(g[2]) < 0.1 * g[0]
    for seed in range(5):
        v = values("inverted_hinge", random_pass(seed, spread=10.0 ** (seed - 2)))
        assert ((v >= 0) & (v <= 2)).all()


# --- control tricks ---------------------------------------------------------------------------------------------------

FAMILY = ["ga", "wga", "tnpo", "wtnpo", "satimp"]


@pytest.mark.parametrize("name", FAMILY)
def test_cap(name):
    """A token below the cap keeps the value there and has no gradient; the others are untouched."""
    p = random_pass(10)
    cap = float(p.logp.detach().exp().median())
    low = p.logp.detach() <= math.log(cap)
    assert 0 < int(low.sum()) < len(low)
    plain, capped = values(name, p), values(name, p, cap=cap)
    g, gc = grad(plain, p.z), grad(capped, p.z)
    assert torch.equal(capped[~low], plain[~low]) and torch.equal(gc[~low], g[~low])
    assert float(gc[low].abs().max()) == 0.0
    torch.testing.assert_close(capped[low], plain[low] / p.logp[low] * math.log(cap))
    assert torch.equal(values(name, p, cap=1e-30), plain)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("select", [0.2, 0.5, 0.8, 1.0])
def test_select(name, select):
    """Per row the fraction with the smallest NLL, rounded up; the count is theirs."""
    lengths = (3, 1, 5, 10)
    p = random_pass(11, lengths=lengths)
    method = registry.get("objective", name)
    logp, plain = p.logp.detach(), values(name, p)
    want, at = [], 0
    for k in lengths:
        best = sorted(range(at, at + k), key=lambda i: -float(logp[i]))[: math.ceil(k * select - 1e-9)]
        want += [plain[i] for i in sorted(best)]
        at += k
    got = values(name, p, select=select)
    assert torch.equal(got, torch.stack(want))
    assert count_units(method.unit, p.batch, {"select": select}) == len(got)


@pytest.mark.parametrize("name", FAMILY)
def test_temperature_softens_only_what_is_pushed(name):
    p = random_pass(12)
    w = values(name, p).detach() / p.logp.detach()  # weights look at the model's own likelihoods
    tempered = (p.z / 3).log_softmax(1).gather(1, p.targets[:, None]).squeeze(1)
    got = values(name, p, temperature=3.0)
    torch.testing.assert_close(got, w * tempered)
    torch.testing.assert_close(grad(got, p.z), grad(w * tempered, p.z))
    everything = values(name, p, temperature=3.0, cap=0.01, select=0.5)
    assert len(everything) == 2 + 1 + 2 + 1 and torch.isfinite(everything).all()


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e2, 1e4])
def test_finite_at_any_logits(name, spread):
    p = random_pass(13, dtype=torch.float32, spread=spread)
    v = values(name, p)
    assert v.dtype == torch.float32 and torch.isfinite(v).all()
    at = p.states[0] if name in LAYER else p.other.z if name == "idk" else p.z
    assert torch.isfinite(grad(v, at)).all()


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in LAYER])
def test_finite_after_500_steps(name):
    """Descent on the logits themselves; ga and neg_kl have no minimum, yet stay finite here too."""
    p = random_pass(14, dtype=torch.float32)
    params = [p.z, p.other.z]
    for _ in range(500):
        for x, g in zip(params, torch.autograd.grad(values(name, p).mean(), params, allow_unused=True), strict=True):
            if g is not None:
                x.data.sub_(g)
    assert torch.isfinite(values(name, p)).all() and all(torch.isfinite(x).all() for x in params)


# --- on a model -------------------------------------------------------------------------------------------------------


def batch_of(tag: str, n: int, extra: int = 0, seed: int = 0) -> dict[str, Any]:
    tok = tiny.tokenizer()
    rows = [encode(*to_text(r), tok)[0] for r in tiny.rows(n, tag, seed=seed)]
    b = pad(rows, 0)
    return {k: torch.nn.functional.pad(v, (0, extra), value=-100 if k == "labels" else 0) for k, v in b.items()}


def with_winners(tag: str, n: int, extra: int = 0) -> dict[str, Any]:
    return {**batch_of(tag, n, extra), "alternate": batch_of(tag, n, extra, seed=77)}


def on_model(name: str, model: Any, batch: dict[str, Any], **hyper: Any) -> Tensor:
    layers = [LAYER[name]["layer"]] if name in LAYER else []
    return values(name, Pass(model, batch, reference=Reference(), layers=layers), **hyper)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.lora(tiny.llama())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_model_in_chunks_equals_its_logits_at_once(name, model, monkeypatch):
    """Value and gradient of the chunked head against plain autograd through all logits, in chunks of 16 rows."""
    batch = with_winners("f", 5)
    monkeypatch.setattr("peft_unlearn.head._CHUNK_FLOATS", 1)

    def fake(b: dict[str, Any]) -> FakePass:
        mask = b["labels"][:, 1:] != -100
        out = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], output_hidden_states=True)
        with torch.no_grad(), model.disable_adapter():
            ref = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], output_hidden_states=True)
        p = FakePass(out.logits[:, :-1][mask], b["labels"][:, 1:][mask], z_ref=ref.logits[:, :-1][mask])
        p.mask, p.labels, p.batch = mask, b["labels"], b
        p.states = (block_1(b, False), block_1(b, True))
        return p

    def block_1(b: dict[str, Any], reference: bool) -> Tensor:
        seen: list[Tensor] = []
        layer = model.get_base_model().model.layers[1]
        handle = layer.register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
        try:
            with torch.no_grad() if reference else torch.enable_grad():
                if reference:
                    with model.disable_adapter():
                        model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
                else:
                    model(input_ids=b["input_ids"], attention_mask=b["attention_mask"])
        finally:
            handle.remove()
        return seen[0]

    whole = fake(batch)
    whole.other = fake(batch["alternate"])
    params = [x for x in model.parameters() if x.requires_grad]
    want, got = values(name, whole), on_model(name, model, batch)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    pairs = [torch.autograd.grad(v.mean(), params, allow_unused=True) for v in (got, want)]
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None) or float((a if b is None else b).abs().max()) == 0
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-6 + 2e-5 * float(b.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_positions_are_inert(name, model):
    batch = with_winners("f", 5)
    for b in (batch, batch["alternate"]):  # the last target of each row becomes a position without one
        last = b["attention_mask"].sum(1) - 1
        b["labels"][torch.arange(5), last] = -100
    want = on_model(name, model, batch)
    more = with_winners("f", 5, extra=3)
    for b, like in ((more, batch), (more["alternate"], batch["alternate"])):
        b["labels"][:, : like["labels"].shape[1]] = like["labels"]
        b["labels"][:, like["labels"].shape[1] :] = -100
        free = b["attention_mask"] == 0  # padding, and the last token, which no target follows
        free[torch.arange(5), b["attention_mask"].sum(1) - 1] = True
        b["input_ids"][free] = torch.randint(3, 300, (int(free.sum()),))
    torch.testing.assert_close(on_model(name, model, more), want, atol=5e-6, rtol=5e-6)
    method = registry.get("objective", name)
    assert len(want) == count_units(method.unit, batch, method.resolve(LAYER.get(name, {})))


@pytest.fixture(scope="module")
def learned() -> Any:
    """A tiny model that knows four forget and four retain answers by heart."""
    model = tiny.llama(seed=4)
    both = [batch_of("f", 4), batch_of("keep", 4, seed=9)]
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(130):
        opt.zero_grad()
        sum(-Pass(model, b).logp.mean() for b in both).backward()
        opt.step()
    assert min(float(Pass(model, b).logp.detach().exp().mean()) for b in both) > 0.9
    return model


# Weight beside a retain term of weight 5, since the scales of these losses differ by orders of magnitude.
WEIGHT = {
    **dict.fromkeys(
        ["npo", "undial", "ceu", "kl_uniform", "neg_kl", "dpo", "idk_dpo", "altpo", "idk", "rmu", "margin"], 0.1
    ),
    **dict.fromkeys(["ga", "wga", "tnpo", "wtnpo", "simnpo", "inverted_hinge"], 1.0),
    **dict.fromkeys(["unilogit", "adaptive_rmu"], 0.2),
    "masc": 0.03,
    "rr": 1.0,
    **dict.fromkeys(["jensun", "flat"], 10.0),
    "neg_entropy": 0.3,
    "satimp": 100.0,  # a token of probability .99 weighs .01
    "pdu": 0.01,
}


@pytest.mark.parametrize(
    "name", [n for n in OBJECTIVES if n not in ("nll", "cross_entropy", "kl", "jsd", "representation_retention")]
)
def test_twenty_steps_forget(learned, name):
    """p of the forget answers falls; that of the retain answers falls by less than 5 %."""
    hyper = {"layer": 0} if name in LAYER else {}
    hyper |= {"coeff": 20.0} if name == "rmu" else {}
    model = tiny.lora(copy.deepcopy(learned), moved=name == "neg_kl")
    forget, retain = {**batch_of("f", 4), "alternate": batch_of("f", 4, seed=77)}, batch_of("keep", 4, seed=9)

    def p(b: dict[str, Any]) -> float:
        with torch.no_grad():
            return float(Pass(model, b).logp.exp().mean())

    errors = Errors()
    terms = {"forget": {name: {**hyper, "weight": WEIGHT[name]}}, "retain": {"nll": {"weight": 5.0}}}
    rule, _ = parse_method("rule", "sum", errors)
    window = Window(model, parse_terms(terms, errors), rule, reference=Reference())
    errors.raise_if_any("test")
    before_f, before_r = p(forget), p(retain)
    opt = torch.optim.Adam(window.space.params, lr=2e-3)
    for _ in range(20):
        step = window.step([{"forget": forget, "retain": retain}])
        for x, t in zip(window.space.params, step.update.tensors, strict=True):
            x.grad = t
        opt.step()
    assert p(forget) < before_f - 0.02
    assert p(retain) > 0.95 * before_r


def test_the_fake_is_the_real_thing():
    """Its sums per row, lengths and mask are the real class's own."""
    p = random_pass()
    assert fakepass.FakePass.per_sequence is Pass.per_sequence and fakepass.FakePass.scatter is Pass.scatter
    assert p.lengths.tolist() == [3.0, 1.0, 4.0, 2.0]
