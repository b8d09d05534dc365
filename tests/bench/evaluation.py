"""What evaluation costs: teacher-forced metrics against one bare forward, and the whole TOFU suite in CPU seconds.

    python tests/bench/evaluation.py ../shared/data/tofu [--rounds 3]

Everything is measured inside one process, rounds of the two sides taken in turns, CPU seconds of one thread; the ratio is that
of the minima, and every round's is printed. The bare forward reads every (prompt, answer) of the suite once: batches of like
length, no gradient, the head on target positions only and in chunks, nothing computed from the logits. The other side adds
tokenizing, every teacher-forced metric, and their bootstrap intervals; mia_reference and mia_gradnorm (a second model, a
backward) are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import pad
from peft_unlearn.evaluation import suites
from peft_unlearn.evaluation.numbers import numbers_of, whole_of
from peft_unlearn.evaluation.plan import make_plan, measure
from peft_unlearn.evaluation.score import score
from peft_unlearn.evaluation.shapes import Plan, Suite
from peft_unlearn.evaluation.teacher import batches, evaluating, pad_id_of
from peft_unlearn.folder.base import load_base, load_tokenizer
from peft_unlearn.forward import Pass
from peft_unlearn.registry import get

EXCLUDED = {"mia_reference", "mia_gradnorm"}


def teacher_forced(suite: Suite) -> Suite:
    """The suite without what generates, and without what takes another model or a backward."""

    def stays(metric: str) -> bool:
        return metric not in EXCLUDED and "generation" not in get("metric", metric).needs

    sets = {k: replace(s, metrics=tuple(m for m in s.metrics if stays(m))) for k, s in suite.sets.items()}
    keys = {f"{k}/{m}" for k, s in sets.items() for m in s.metrics}
    return replace(suite, sets=sets, whole={k: parts for k, parts in suite.whole.items() if set(parts) <= keys})


def bare(model: Any, plan: Plan, budget: int) -> float:
    """CPU seconds of one forward over every pair of the plan."""
    pad_id, start = pad_id_of(plan.tokenizer), time.process_time()
    with torch.no_grad(), evaluating(model):
        for batch in batches([len(row["input_ids"]) for row in plan.encoded], budget):
            p = Pass(model, pad([plan.encoded[i] for i in batch], pad_id))
            p.map_logits(lambda z, y: z[:, 0])
    return time.process_time() - start


def metrics(
    model: Any, suite: Suite, data: Any, tokenizer: Any, reference: Any, n: int | None = None
) -> tuple[float, int]:
    """CPU seconds of the metrics, from rows to numbers, and how many numbers there are."""
    start = time.process_time()
    plan = make_plan(suite, data, tokenizer, n)
    m = measure(model, plan)
    found = numbers_of(plan, m, reference, base=m)
    found.update(whole_of(suite, found, found, found))
    return time.process_time() - start, sum(n.value is not None for n in found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with TOFU's files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--n", type=int, help="at most so many rows of each set; the suite's seconds are then not of the goal"
    )
    parser.add_argument("--token-budget", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = embedded.base_path("people")
    model, tokenizer = load_base(path), load_tokenizer(path)
    data = ForgetRetain.load(given.data)
    whole = suites.load("tofu")
    suite = teacher_forced(whole)
    plan = make_plan(suite, data, tokenizer, given.n)
    retain_model = measure(load_base(embedded.retain_model_path("people")), plan)
    bare(model, plan, given.token_budget)  # warms the allocator and the head's check
    floor, full, count = [], [], 0
    for _ in range(given.rounds):
        floor.append(bare(model, plan, given.token_budget))
        seconds, count = metrics(model, suite, data, tokenizer, retain_model, given.n)
        full.append(seconds)
    start = time.process_time()
    report = score({"base": lambda: nullcontext(model)}, whole, data, tokenizer, n=given.n)
    seconds = time.process_time() - start
    out = {
        "pairs": len(plan.pairs),
        "tokens": sum(len(row["input_ids"]) for row in plan.encoded),
        "numbers": count,
        "bare_forward_cpu_s": [round(x, 2) for x in floor],
        "teacher_forced_cpu_s": [round(x, 2) for x in full],
        "ratio": round(min(full) / min(floor), 3),
        "ratio_per_round": [round(a / b, 3) for a, b in zip(full, floor, strict=True)],
        "suite_cpu_s": round(seconds, 1),
        "suite_rows": {k: report.details["base"][f"{k}/rouge_l_recall"]["n"] for k in suite.sets if k != "holdout"},
    }
    print(json.dumps(out, indent=2))
    print(f"ratio {out['ratio']} (goal 1.2), suite {out['suite_cpu_s']} CPU s (goal 60)", file=sys.stderr)


if __name__ == "__main__":
    main()
