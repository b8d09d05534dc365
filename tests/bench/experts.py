"""What one adapted expert costs beside stock ``target_parameters`` on the same layer; ratios inside one run, beside the goals.

    python tests/bench/experts.py [--rounds 2] [--steps 3] [--out FILE]

Shape S3: OLMoE of 4 layers, hidden 256, 64 experts of 256, top-8, vocabulary 4096, random float32 weights; adapters of rank 16
in layer 1. A step is GradDiff as two passes one after the other (8 + 8 sequences of 128 tokens, the first 64 without target),
clipping and AdamW. CPU seconds (`process_time`), one thread, every alternative warmed up by one step, the order reversed every
other round, medians. Memory: peak of torch's CPU allocator above the loaded base in a fresh process. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

from peft_unlearn.data.collate import pad
from peft_unlearn.forward import Pass
from peft_unlearn.tuners.expert_lora import ExpertLoraConfig

LAYER, EXPERTS, RANK = 1, 64, 16
IMPLEMENTATIONS = ("grouped_mm", "eager")
# (what, implementation, numerator, denominator, goal)
TIME_GOALS = [
    ("one expert / stock, that layer", "eager", "one_expert", "stock", 0.27),
    ("one expert / stock, that layer", "grouped_mm", "one_expert", "stock", 0.85),
    ("one expert / frozen forward", "eager", "one_expert", "frozen", 1.75),
    ("one expert / frozen forward", "grouped_mm", "one_expert", "frozen", 1.75),
]
MEMORY_GOAL = 0.70


def base(implementation: str) -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    config._experts_implementation = implementation
    return OlmoeForCausalLM(config)


def expert(n: int) -> Callable[[Any], Any]:
    ids = list(range(n))
    return lambda model: get_peft_model(
        model, ExpertLoraConfig(experts={LAYER: ids}, r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    )


def stock(model: Any) -> Any:
    names = [f"model.layers.{LAYER}.mlp.experts.{p}_proj" for p in ("gate_up", "down")]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=names, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


RUNS: dict[str, Callable[[Any], Any] | None] = {
    "frozen": None,
    "one_expert": expert(1),
    "all_experts": expert(EXPERTS),
    "stock": stock,
}


def seconds(name: str, model: Any, steps: int) -> list[float]:
    """CPU seconds of every step; for "frozen" of the two forward passes alone."""
    adapt = RUNS[name]
    model = (model if adapt is None else adapt(model)).train()
    params = [p for p in model.parameters() if p.requires_grad] if adapt else []
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0) if adapt else None
    batches = [(-1.0, pad(shapes.rows("S1", 1), 0)), (1.0, pad(shapes.rows("S1", 2), 0))]
    out = []
    for _ in range(steps):
        start = time.process_time()
        for sign, batch in batches:
            with torch.set_grad_enabled(optimizer is not None):
                loss = sign * -Pass(model, batch).logp.mean()
            if optimizer is not None:
                loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        out.append(time.process_time() - start)
    return out


def times(implementation: str, rounds: int, steps: int) -> dict[str, float]:
    """Median CPU seconds of a step of every alternative."""
    found: dict[str, list[float]] = {n: [] for n in RUNS}
    for r in range(rounds):
        for name in list(RUNS) if r % 2 == 0 else list(reversed(RUNS)):
            found[name] += seconds(name, base(implementation), steps + 1)[1:]
            gc.collect()
            print(f"  {implementation} round {r + 1} {name}: {found[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return {n: statistics.median(s) for n, s in found.items()}


def peak(name: str, implementation: str) -> int:
    """Peak bytes above the loaded base over two steps; call it in a fresh process."""
    model = base(implementation)
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        seconds(name, model, 2)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


def trainable(name: str) -> int:
    adapt = RUNS[name]
    assert adapt is not None
    return sum(p.numel() for p in adapt(base("grouped_mm")).parameters() if p.requires_grad)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", default=None, help="also write the figures here (JSON)")
    a = parser.parse_args()
    found: dict[str, Any] = {"trainable": {n: trainable(n) for n in ("one_expert", "stock")}}
    found |= {"cpu_seconds": {}, "peak_bytes": {}}
    lines, missed = [], 0

    def check(what: str, implementation: str, value: float, goal: float, form: str = ".2f") -> None:
        nonlocal missed
        missed += value > goal
        verdict = "ok" if value <= goal else "MISSED"
        lines.append(f"{what:<34} {implementation:<10}  {value:{form}}  goal <= {goal:g}  {verdict}")

    counts = found["trainable"]
    check("trainable, one expert / stock", "", counts["one_expert"] / counts["stock"], 1 / EXPERTS, ".6f")
    for implementation in IMPLEMENTATIONS:
        found["cpu_seconds"][implementation] = times(implementation, a.rounds, a.steps)
        peaks = {}
        for name in RUNS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak, (name, implementation))
        found["peak_bytes"][implementation] = peaks
        check("peak memory, one expert / stock", implementation, peaks["one_expert"] / peaks["stock"], MEMORY_GOAL)
    for what, implementation, up, down, goal in TIME_GOALS:
        t = found["cpu_seconds"][implementation]
        check(what, implementation, t[up] / t[down], goal)
    for implementation in IMPLEMENTATIONS:
        t, m = found["cpu_seconds"][implementation], found["peak_bytes"][implementation]
        parts = [f"{n} {t[n] * 1e3:.0f} ms {m[n] / 2**20:.0f} MiB" for n in RUNS]
        lines.append(f"{implementation}: {'; '.join(parts)}")
    print("\n".join(lines))
    if a.out:
        Path(a.out).write_text(json.dumps(found, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
