"""What the attacks cost on the embedded people, by part: CPU seconds of one thread, all three subjects.

    python tests/bench/attacks.py ADAPTER [--limit 90]

The limit is for relearn + int8 + int4 + jailbreak templates + strip together; 1 is returned when they take longer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from peft_unlearn.attacks.requests import wanted
from peft_unlearn.attacks.run import run_attacks
from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.evaluation.score import on_one_model
from peft_unlearn.folder.base import load_base
from peft_unlearn.stack.model import ForgetModel

TOGETHER = [
    ("relearn", {}),
    ("quantize", {"format": "int8"}),
    ("quantize", {"format": "int4"}),
    ("jailbreak", {}),
    ("strip", {}),
]
BESIDE = [("benign", {}), ("quantize", {"format": "nf4"}), ("quantize", {"format": "bf16"})]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--limit", type=float, default=90.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.process_time()
    data = ForgetRetain.load("embedded:people?seed=0")
    stack = ForgetModel.from_pretrained(None, {"adapter": given.adapter})
    path = embedded.retain_model_path("people")

    @contextmanager
    def retain_model() -> Any:
        yield load_base(path)

    subjects = {**on_one_model(stack.model, {"base": None, "adapter": "adapter"}), "retain_only": retain_model}
    print(f"{'loading':<16} {time.process_time() - start:6.1f} s")
    total = time.process_time() - start
    for part, counted in [*((p, True) for p in TOGETHER), *((p, False) for p in BESIDE)]:
        start = time.process_time()
        one = wanted([part])
        run_attacks(
            subjects, one, data, stack.tokenizer
        )  # alone: baselines and the retain model's loading count each time
        spent = time.process_time() - start
        total += spent if counted else 0.0
        print(f"{one[0].label:<16} {spent:6.1f} s{'' if counted else '   (beside the limit)'}", flush=True)
    start = time.process_time()
    run_attacks(subjects, wanted(TOGETHER), data, stack.tokenizer)
    print(
        f"{'in one command':<16} {time.process_time() - start:6.1f} s   (limit {given.limit:g}; summed above {total:.1f})"
    )
    return 0 if time.process_time() - start <= given.limit else 1


if __name__ == "__main__":
    sys.exit(main())
