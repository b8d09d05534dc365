"""The cast of a sum, and what is said of it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_unlearn.merging.rounding import Adder, Overflow, Sums, blocks, cast_block, generator, round_to

HALVES = [torch.bfloat16, torch.float16]


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of `dtype` right below and above x (equal if it is one), found by search over all of them."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)]
    return float(every[every <= x].max()), float(every[every >= x].min())


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=15, deadline=None)
@given(x=st.floats(-1e4, 1e4, width=32), seed=st.integers(0, 99))
def test_stochastic_is_a_neighbour_and_right_in_the_mean(dtype: torch.dtype, x: float, seed: int) -> None:
    low, high = neighbours(x, dtype)
    n = 20_000
    out = round_to(torch.full((n,), x), dtype, generator(seed, "t"))
    assert out.dtype == dtype
    found = out.double()
    assert set(found.tolist()) <= {low, high}
    # The mean of n draws of two values `high - low` apart: five standard errors (and the noise's own grid of 2^-13).
    allowed = (high - low) * (5 * 0.5 / math.sqrt(n) + 2.0**-12)
    assert abs(float(found.mean()) - x) <= allowed


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_leaves_what_fits_alone(dtype: torch.dtype) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)]
    assert torch.equal(round_to(every, dtype, generator(0, "t")).float(), every)


def test_draws_depend_on_the_tensors_name_and_the_seed_alone() -> None:
    a, b, c = (torch.randn(9, generator=generator(s, n)) for s, n in ((0, "a"), (0, "b"), (1, "a")))
    assert (
        torch.equal(a, torch.randn(9, generator=generator(0, "a"))) and not torch.equal(a, b) and not torch.equal(a, c)
    )


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_measured_facts_of_nearest_and_stochastic(size: float) -> None:
    """|D| / |W| = 1e-3 keeps a cosine of .64 and 1e-2 one of .99; stochastic: a lower cosine, and the whole gain."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(512, 512, generator=g).bfloat16()
    left, right = torch.randn(512, 16, generator=g), torch.randn(16, 512, generator=g)
    left *= size * w.float().norm() / (left @ right).norm()
    found = {}
    for name, rng in (("nearest", None), ("stochastic", generator(0, "w"))):
        out = torch.empty_like(w)
        found[name] = Adder(torch.bfloat16)(w, left, right, out, rng)
        d = (left @ right).double()
        kept = out.double() - w.double()
        assert found[name].cosine == pytest.approx(float((kept * d).sum() / (kept.norm() * d.norm())), abs=1e-5)
        assert found[name].gain == pytest.approx(float((kept * d).sum() / d.norm() ** 2), rel=1e-5)
        assert found[name].changed == int((kept != 0).sum()) and found[name].n == kept.numel()
    near, random = found["nearest"], found["stochastic"]
    assert near.cosine == pytest.approx({1e-4: 0.21, 1e-3: 0.64, 1e-2: 0.99}[size], abs=0.02)
    noise = math.sqrt(random.kept) / math.sqrt(random.wanted * random.n)  # standard error of the gain
    assert random.cosine < near.cosine + 0.01 and random.gain == pytest.approx(1, abs=5 * noise)


def test_overflow_is_noticed() -> None:
    big, one = torch.full((2, 2), 6e4), torch.ones(2, 1)
    with pytest.raises(Overflow):
        Adder(torch.float16)(big.half(), one * 1e4, one.T, torch.empty(2, 2, dtype=torch.float16))
    with pytest.raises(Overflow):
        cast_block(big * 10, torch.empty(2, 2, dtype=torch.float16))
    out = torch.empty(2, 2, dtype=torch.bfloat16)
    cast_block(big, out)
    assert torch.equal(out, big.bfloat16())
    with pytest.raises(Overflow):  # rounded up over the edge, too
        for seed in range(50):
            Adder(torch.float16)(torch.full((2, 2), 65504.0), one * 15, one.T, out.half(), generator(seed, "x"))


def test_blocks_cover_and_sums_add() -> None:
    for rows, columns in ((0, 5), (1, 10**7), (70_000, 7), (3, 3)):
        parts = list(blocks(rows, columns))
        assert [i for p in parts for i in range(p.start, p.stop)] == list(range(rows))
    a, b = Sums(1, 4, 9, 16, 2, 3), Sums()
    b.add(a)
    b.add(a)
    assert b == Sums(2, 8, 18, 32, 4, 6) and b.cosine == pytest.approx(2 / 12) and b.gain == pytest.approx(1 / 9)
    assert Sums().cosine is None and Sums(wanted=1.0).cosine == 0.0
