"""The two benches that damage: every file that is read (`bench/fuzz.py`), and every command that writes (`bench/kills.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))


@pytest.mark.parametrize("n", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damaged_file_is_a_traceback_or_a_hang(n: int, tmp_path: Path) -> None:
    import fuzz

    found = fuzz.fuzz(n, seed=n, progress=lambda _: None, keep=tmp_path)
    assert not found, "\n".join(f"{p.kind}, number {p.number} of seed {n}: {p.what}\n{p.trace}" for p in found)


def test_the_mutator_damages_and_what_it_finds_is_told() -> None:
    import random

    import fuzz

    kind = fuzz.Kind("made", Path("x"), [{"a": [1, {"b": "c"}]}, b"a: [1]"], lambda: None)
    made = {kind.made(random.Random(i)) for i in range(200)}
    assert len(made) > 100 and kind.made(random.Random(7)) == kind.made(random.Random(7))


@pytest.mark.parametrize("error", [KeyError("x"), "hang"], ids=str)
def test_a_traceback_and_a_hang_are_found(error: object, tmp_path: Path) -> None:
    import fuzz

    def read() -> None:
        if isinstance(error, Exception):
            raise error
        while True:
            pass

    problem = fuzz.one(fuzz.Kind("made", tmp_path / "x", [], read), b"", 3, seconds=0.2)
    assert problem is not None and problem.number == 3 and ("KeyError" in problem.what or "over 0.2 s" in problem.what)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_whatever_moment_a_command_is_killed_at_the_next_run_ends_it_with_the_same_bytes() -> None:
    import kills

    every = kills.run(22, progress=lambda _: None)
    assert not [(j.name, j.wrong) for j in every if j.wrong] and all(j.kills for j in every)
