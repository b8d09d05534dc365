"""Every objective against a literal loop over tokens in float64, written from the paper's formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from peft_unlearn import registry
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.forward import Pass, Reference

NAMES = ("ga", "nll", "kl", "npo", "simnpo")


def make_batch(n: int = 5, extra: int = 0) -> dict[str, Tensor]:
    tok = tiny.tokenizer()
    rows = [encode(*to_text(r), tok)[0] for r in tiny.rows(n, "f")]
    b = pad(rows, tok.pad_token_id)
    if extra:
        b = {k: torch.nn.functional.pad(v, (0, extra), value=-100 if k == "labels" else 0) for k, v in b.items()}
    return b


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.lora(tiny.llama())


def values(name: str, model: Any, batch: dict[str, Tensor], **hyper: Any) -> Tensor:
    method = registry.get("objective", name)
    return method.fn(Pass(model, batch, reference=Reference()), **method.resolve(hyper))


def token_distributions(model: Any, batch: dict[str, Tensor]) -> list[list[tuple[list[float], int]]]:
    """Per row, per target: (log-probabilities over the vocabulary in float64, target)."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    out = []
    for i in range(len(batch["labels"])):
        row = []
        for t in range(batch["labels"].shape[1] - 1):
            target = int(batch["labels"][i, t + 1])
            if target == -100:
                continue
            z = logits[i, t].tolist()
            top = max(z)
            log_sum = top + math.log(sum(math.exp(x - top) for x in z))
            row.append(([x - log_sum for x in z], target))
        out.append(row)
    return out


def literal(name: str, now: Any, ref: Any, beta: float = 0.0, delta: float = 0.0) -> list[float]:
    out: list[float] = []
    for row, row_ref in zip(now, ref, strict=True):
        logp = [lp[y] for lp, y in row]
        ref_logp = [lp[y] for lp, y in row_ref]
        if name == "ga":
            out += logp
        elif name == "nll":
            out += [-x for x in logp]
        elif name == "kl":
            for (lp, _), (lq, _) in zip(row, row_ref, strict=True):
                out.append(sum(math.exp(q) * (q - p) for p, q in zip(lp, lq, strict=True)))
        elif name == "npo":
            ratio = sum(logp) - sum(ref_logp)
            out.append(2 / beta * math.log(1 + math.exp(beta * ratio)))
        elif name == "simnpo":
            nll = -sum(logp) / len(logp)
            out.append(-2 / beta * math.log(1 / (1 + math.exp(-(beta * nll - beta * delta)))))
    return out


@pytest.mark.parametrize(
    ("name", "hyper"),
    [("ga", {}), ("nll", {}), ("kl", {}), ("npo", {"beta": 0.1}), ("npo", {"beta": 0.7}), ("simnpo", {"beta": 2.5}),
     ("simnpo", {"beta": 0.3, "delta": 1.5})],
)  # fmt: skip
def test_against_a_literal_loop(model, name, hyper):
    batch = make_batch()
    now = token_distributions(model, batch)
    with model.disable_adapter():
        ref = token_distributions(model, batch)
    want = literal(name, now, ref, **hyper)
    got = values(name, model, batch, **hyper)
    assert got.dtype == torch.float32 and len(got) == len(want)
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_finite_differences(model, name):
    batch = make_batch(3)
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(3)
    direction = [torch.randn_like(p) * 0.02 for p in params]
    g = torch.autograd.grad(values(name, model, batch).sum(), params)
    slope = float(sum((a * d).sum() for a, d in zip(g, direction, strict=True)))

    def at(c: float) -> float:
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p.add_(d, alpha=c)
            out = float(values(name, model, batch).double().sum())
            for p, d in zip(params, direction, strict=True):
                p.sub_(d, alpha=c)
        return out

    eps = 0.05
    assert slope == pytest.approx((at(eps) - at(-eps)) / (2 * eps), rel=5e-3, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_masked_positions_are_inert(model, name):
    batch = make_batch()
    want = values(name, model, batch)
    changed = {k: v.clone() for k, v in make_batch(extra=4).items()}  # more padding
    padded = changed["attention_mask"] == 0
    changed["input_ids"][padded] = torch.randint(3, 300, (int(padded.sum()),))
    torch.testing.assert_close(values(name, model, changed), want, atol=2e-6, rtol=2e-6)
    one = {k: v[2:3] for k, v in batch.items()}  # a row's value does not depend on its neighbors
    method = registry.get("objective", name)
    if method.unit == "sequence":
        torch.testing.assert_close(values(name, model, one), want[2:3], atol=2e-6, rtol=2e-6)
    # A row without targets contributes no unit at all
    labels = batch["labels"].clone()
    labels[1] = -100
    left = values(name, model, {**batch, "labels": labels})
    keep = torch.ones(5, dtype=torch.bool)
    keep[1] = False
    if method.unit == "sequence":
        torch.testing.assert_close(left, want[keep])
    else:
        lengths = (batch["labels"][:, 1:] != -100).sum(1)
        torch.testing.assert_close(
            left, torch.cat([c for c, k in zip(want.split(lengths.tolist()), keep, strict=True) if k])
        )


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo_at_its_start(beta):
    """Model = reference: the value is (2/beta) ln 2 and the gradient is GA's on the sequence log-likelihood."""
    model, batch = tiny.lora(tiny.llama(), moved=False), make_batch()
    params = [p for p in model.parameters() if p.requires_grad]
    npo = values("npo", model, batch, beta=beta)
    torch.testing.assert_close(npo, torch.full_like(npo, 2 / beta * math.log(2)))
    g = torch.autograd.grad(npo.sum(), params)
    p = Pass(model, batch, reference=Reference())
    ga = torch.autograd.grad(p.per_sequence(values("ga", model, batch)).sum(), params)
    for a, b in zip(g, ga, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_npo_weakens_where_forgotten_and_never_overflows(model):
    batch = make_batch(2)
    fake = Pass(model, {**batch, "ref_logp": torch.zeros(2, batch["labels"].shape[1] - 1)})
    far = fake.scatter(fake.logp.detach()) * 0
    # reference far above the model: forgotten, value ~ 0; far below: linear growth, finite
    method = registry.get("objective", "npo")
    low = method.fn(Pass(model, {**batch, "ref_logp": far + 1e4}), beta=0.1)
    high = method.fn(Pass(model, {**batch, "ref_logp": far - 1e4}), beta=0.1)
    assert torch.isfinite(low).all() and (low >= 0).all() and float(low.max()) < 1e-6
    assert torch.isfinite(high).all() and float(high.min()) > 1e4


@pytest.mark.parametrize(("logp", "want"), [([0.0, 0.0], 2 / 4.5 * math.log(2)), ([-1.0, -2.0], None)])
def test_simnpo_anchor(logp, want):
    """NLL/T = 0, delta 0, beta 4.5: (2/4.5) ln 2 = 0.30807."""

    class One:
        def __init__(self) -> None:
            self.logp = torch.tensor(logp)
            self.lengths = torch.tensor([2.0])

        def per_sequence(self, x: Tensor) -> Tensor:
            return x.sum()[None]

    got = float(registry.get("objective", "simnpo").fn(One(), beta=4.5))
    assert got == pytest.approx(want if want is not None else 2 / 4.5 * math.log(1 + math.exp(-4.5 * 1.5)), rel=1e-5)
    if want is not None:
        assert got == pytest.approx(0.30807, abs=5e-6)


def test_kl_is_zero_with_zero_gradient_at_the_reference():
    model, batch = tiny.lora(tiny.llama(), moved=False), make_batch()
    v = values("kl", model, batch)
    assert float(v.abs().max()) < 1e-6
    g = torch.autograd.grad(v.sum(), [p for p in model.parameters() if p.requires_grad])
    assert max(float(x.abs().max()) for x in g) < 1e-5
    assert (values("kl", tiny.lora(tiny.llama()), batch) >= -1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_is_documented(name):
    m = registry.get("objective", name)
    assert m.summary and m.source.url.startswith("https://") and m.unit and m.needs
