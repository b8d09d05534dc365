"""``make bench``: what a step costs, as ratios inside one run, beside the goals. Exit code 1 when a goal is missed.

CPU seconds (`process_time`), one thread; every alternative is built, warmed up by one step and timed for some steps, in an
order that is reversed every other round; medians. Memory: a fresh process per alternative (see `shapes.peak_above_model`).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch
from shapes import METHODS, RUNS, SHAPES, adapted, base, peak_above_model, rows

from peft_unlearn.data.collate import pad
from peft_unlearn.forward import Pass

# (what, shape, numerator, denominator, goal)
TIME_GOALS = [
    ("GradDiff step / L", "S1", "graddiff", "hf_lora_nll", 0.90),
    ("GradDiff step / L", "S2", "graddiff", "hf_lora_nll", 0.45),
    ("NPO cached reference / GradDiff", "S1", "npo_precomputed", "graddiff", 1.05),
    ("NPO cached reference / GradDiff", "S2", "npo_precomputed", "graddiff", 1.05),
    ("NPO live reference / GradDiff", "S1", "npo_live", "graddiff", 1.30),
    ("NPO live reference / GradDiff", "S2", "npo_live", "graddiff", 1.30),
    ("our Trainer / bare loop", "S1", "graddiff", "bare_graddiff", 1.05),
    ("our Trainer / bare loop", "S2", "graddiff", "bare_graddiff", 1.05),
]
# (method, goal for its step time over GradDiff's)
METHOD_GOALS = [("ngdiff", 1.10), ("gru", 1.10), ("sam", 1.6), ("rs3", 2.1), ("rmu", 0.60)]
VECTORS = 4  # adapter-sized vectors of memory beyond rule sum's, at most
MEMORY_GOALS = [("S1", 0.42), ("S2", 0.06)]


def gate(shape: str) -> float:
    """Relative error of the production head's gradient against full logits, non-uniform weights."""
    model = adapted(base(shape))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.02)
    params = [p for p in model.parameters() if p.requires_grad]
    batch = pad(rows(shape, 1, 4), 0)
    p = Pass(model, batch)
    w = torch.rand(len(p.targets), generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((w * p.logp).sum(), params)
    z = model(input_ids=batch["input_ids"]).logits[:, :-1][p.mask]
    full = z.log_softmax(1).gather(1, p.targets[:, None]).squeeze(1)
    want = torch.autograd.grad((w * full).sum(), params)
    error = sum(((a - b) ** 2).sum() for a, b in zip(got, want, strict=True)) / sum((b**2).sum() for b in want)
    return float(torch.as_tensor(error).sqrt())


def times(shape: str, rounds: int, steps: int) -> dict[str, float]:
    """Median CPU seconds of a step of every alternative."""
    model = base(shape)
    seconds: dict[str, list[float]] = {n: [] for n in RUNS}
    for r in range(rounds):
        for name in list(RUNS) if r % 2 == 0 else list(reversed(RUNS)):
            seconds[name] += RUNS[name](model, shape, steps + 1)[1:]
            model = base(shape)
            gc.collect()
            print(f"  {shape} round {r + 1} {name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return {n: statistics.median(s) for n, s in seconds.items()}


def method_times(rounds: int) -> dict[str, float]:
    """Mean CPU seconds of a step over ten steps of every method on S1 (a mean, since one step in ten refits a learning rate)."""
    seconds: dict[str, list[float]] = {n: [] for n in METHODS}
    for r in range(rounds):
        for name in list(METHODS) if r % 2 == 0 else list(reversed(METHODS)):
            # Step 0 warms up and refits; steps 1 to 10 hold exactly one refit.
            seconds[name] += METHODS[name](base("S1"), "S1", 11)[1:]
            gc.collect()
            print(f"  S1 round {r + 1} {name}: {statistics.mean(seconds[name]):.3f} s", file=sys.stderr, flush=True)
    return {n: statistics.mean(s) for n, s in seconds.items()}


def memory(shape: str, name: str) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_above_model, (name, shape))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=sorted(SHAPES), default=None)
    parser.add_argument("--out", default=None, help="also write the figures here (JSON)")
    a = parser.parse_args()
    found: dict[str, Any] = {"gate": {}, "cpu_seconds": {}, "peak_bytes": {}}
    lines, missed = [], 0

    def check(what: str, shape: str, value: float, goal: float, form: str = ".2f") -> None:
        nonlocal missed
        missed += value > goal
        lines.append(f"{what:<36} {shape}  {value:{form}}  goal <= {goal:g}  {'ok' if value <= goal else 'MISSED'}")

    for shape in [a.only] if a.only else SHAPES:
        found["gate"][shape] = gate(shape)
        check("gate: head gradient, relative error", shape, found["gate"][shape], 2e-6, ".1e")
        t = found["cpu_seconds"][shape] = times(shape, a.rounds, a.steps)
        for what, where, up, down, goal in TIME_GOALS:
            if where == shape:
                check(what, shape, t[up] / t[down], goal)
        peaks = {n: memory(shape, n) for n in ("hf_lora_nll", "graddiff", "npo_precomputed")}
        found["peak_bytes"][shape] = peaks
        goal = dict(MEMORY_GOALS)[shape]
        check("peak GradDiff / L", shape, peaks["graddiff"] / peaks["hf_lora_nll"], goal, ".3f")
    if a.only != "S2":
        t = found["method_cpu_seconds"] = method_times(a.rounds)
        for name, goal in METHOD_GOALS:
            check(f"{name} step / GradDiff", "S1", t[name] / t["graddiff"], goal)
        adapter = 4 * sum(p.numel() for p in adapted(base("S1")).parameters() if p.requires_grad)
        peaks = found["method_peak_bytes"] = {n: memory("S1", n) for n in METHODS}
        for name in ("ngdiff", "gru", "sam", "rs3"):
            more = (peaks[name] - peaks["graddiff"]) / adapter
            check(f"{name} memory beyond sum, adapters", "S1", more, VECTORS)
    if not a.only:
        apart = (found["peak_bytes"]["S2"]["graddiff"] - found["peak_bytes"]["S1"]["graddiff"]) / 2**20
        check("peak(S2) - peak(S1), MiB", "  ", apart, 70, ".0f")
    print("\n".join(lines))
    if a.out:
        Path(a.out).write_text(json.dumps(found, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    assert shapes.ROWS == 8
    sys.exit(main())
