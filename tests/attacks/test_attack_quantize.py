"""Quantizers against a plain loop in float64, and as an attack on live models."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_unlearn.attacks import quantize as q
from peft_unlearn.attacks.case import Case
from peft_unlearn.errors import UserError
from peft_unlearn.registry import get

# QLoRA's published table
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip

WEIGHTS = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 17), st.integers(0, 10_000), st.floats(-6, 6))


def matrix(rows: int, columns: int, seed: int, power: float) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    w[seed % rows] *= float(seed % 3)  # a zero row now and then
    return w


def nearest(x: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: (abs(level - x), abs(level)))


def brute(groups: list[np.ndarray], levels: list[float]) -> list[np.ndarray]:
    """Each group by itself: largest absolute value to 1, every weight to its nearest level."""
    out = []
    for g in groups:
        top = max(abs(float(x)) for x in g)
        out.append(np.array([0.0 if top == 0 else nearest(float(x) / top, levels) * top for x in g]))
    return out


def pieces(w: torch.Tensor, group: int | None) -> list[np.ndarray]:
    a = w.double().numpy()
    return [row[i : i + (group or len(row))] for row in a for i in range(0, len(row), group or len(row))]


def flat_pieces(w: torch.Tensor, group: int) -> list[np.ndarray]:
    a = w.double().numpy().ravel()
    return [a[i : i + group] for i in range(0, len(a), group)]


def agree(found: torch.Tensor, wanted: list[np.ndarray], w: torch.Tensor, step: float, group: list[np.ndarray]) -> None:
    """Equal, but where a weight stands half-way between two levels: there either will do."""
    a, b, x = found.double().numpy().ravel(), np.concatenate(wanted), w.double().numpy().ravel()
    top = np.concatenate([np.full(len(g), np.abs(g).max()) for g in group])
    same = np.isclose(a, b, rtol=1e-6, atol=0)
    tie = np.isclose(np.abs(a - x), np.abs(b - x), rtol=1e-6, atol=0)
    assert (same | tie).all()
    assert (np.abs(a - x) <= step / 2 * top * (1 + 1e-6)).all()


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_int8_is_the_nearest_of_255_levels_per_row(about):
    rows, columns, _, seed, power = about
    w = matrix(rows, columns, seed, power)
    group = pieces(w, None)
    agree(q.int8(w), brute(group, [k / 127 for k in range(-127, 128)]), w, 1 / 127, group)
    assert torch.equal(q.int8(q.int8(w)), q.int8(w))


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_int4_is_the_nearest_of_15_levels_per_group(about):
    rows, columns, size, seed, power = about
    w = matrix(rows, columns, seed, power)
    group = pieces(w, size)
    agree(q.int4(w, size), brute(group, [k / 7 for k in range(-7, 8)]), w, 1 / 7, group)
    assert torch.equal(q.int4(q.int4(w, size), size), q.int4(w, size))


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_nf4_is_the_nearest_of_16_levels_per_block(about):
    rows, columns, size, seed, power = about
    w = matrix(rows, columns, seed, power)
    group = flat_pieces(w, size)
    widest = max(b - a for a, b in pairwise(NF4))
    agree(q.nf4(w, size), brute(group, q.nf4_levels().tolist()), w, widest, group)
    assert torch.equal(q.nf4(q.nf4(w, size), size), q.nf4(w, size))


def test_nf4_levels_are_the_published_ones():
    assert q.nf4_levels().tolist() == pytest.approx(NF4, abs=1e-6)
    assert q.nf4_levels()[7] == 0.0


def test_a_last_shorter_group_has_its_own_scale():
    w = torch.tensor([[100.0, 3.0, 0.07, 0.01]])
    assert torch.allclose(q.int4(w, 3)[0, 3], torch.tensor(0.01))  # alone in its group, so exact
    assert q.int4(w, 4)[0, 3] == 0.0  # with 100 beside it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fn", [q.int8, q.int4, q.nf4, q.bf16])
def test_dtype_and_shape_stay_and_zero_stays_zero(fn, dtype):
    w = torch.randn(3, 130).to(dtype)
    w[1] = 0
    out = fn(w)
    assert out.dtype == dtype and out.shape == w.shape and not out[1].any()
    assert torch.equal(fn(out), out)


@pytest.mark.parametrize("fn", [q.int8, q.int4, q.nf4, q.bf16])
def test_nan_is_not_made_into_a_number(fn):
    w = torch.ones(2, 64)
    w[0, 3] = math.nan
    assert fn(w)[0, 3].isnan() and not fn(w)[1].isnan().any()


def test_bitsandbytes_gives_the_same_nf4():
    pytest.importorskip("bitsandbytes")
    for shape in ((64, 128), (10, 100)):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.05
        assert torch.allclose(q._by_bitsandbytes(w, "nf4", 64), q.nf4(w, 64), atol=1e-7)
        h = w.half().float()
        theirs, ours = q._by_bitsandbytes(h, "int8", 64), q.int8(h)
        # a weight half-way between two levels may go to either: as near, if not the same
        assert torch.allclose((theirs - h).abs(), (ours - h).abs(), atol=1e-5)
        assert ((theirs - ours).abs() > 1e-6).float().mean() < 0.01


def test_bitsandbytes_says_what_it_lacks():
    with pytest.raises(UserError, match="has no int4"):
        q._require_bitsandbytes("int4", 64)
    with pytest.raises(UserError, match="blocks of 64"):
        q._require_bitsandbytes("nf4", 48)


# --- as an attack ---------------------------------------------------------------------------------------------------


def run(case: Case, **settings):
    method = get("attack", "quantize")
    return method.fn(case, **method.resolve(settings))


def test_every_linear_layer_is_rounded_and_nothing_else(case, model):
    seen = {}
    score = case.score
    case.score = lambda m, *a: (seen.update({n: p.clone() for n, p in m.named_parameters()}), score(m, *a))[1]
    before = {n: p.clone() for n, p in model.named_parameters()}
    outcome = run(case, format="int4", group=16)
    for name, w in before.items():
        linear = name.split(".")[-2].endswith("_proj")
        assert torch.equal(seen[name], q.int4(w, 16) if linear else w), name
        assert torch.equal(dict(model.named_parameters())[name], w)
    assert outcome.about["layers"] == 14 and outcome.about["adapter"] == "none"
    changed = sum(float((seen[n] - w).double().square().sum()) for n, w in before.items())
    whole = sum(float(w.double().square().sum()) for n, w in before.items() if "_proj" in n)
    assert outcome.about["relative_error"] == pytest.approx((changed / whole) ** 0.5, rel=1e-9)


def test_a_model_of_nan_stays_nan(case, model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    outcome = run(case, format="int8")
    assert all(np.isnan(v).all() for v in outcome.after.values())
