"""What a training step costs on a real model beside GradDiff as one writes it: two forwards of transformers, the sum, one backward.

    python tests/bench/real_step.py --model MODELS/gemma270

CPU seconds of a step (the median, the first left out; one thread, float32) and peak bytes above the loaded model, each alternative in a
fresh process, on the same random tokens. Exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import shapes
import torch
from shapes import GD, Clock, adapted, tiny

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import pad
from peft_unlearn.folder.base import load_base
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.train import quiet
from peft_unlearn.training.trainer import UnlearnTrainer

GOALS = {"seconds": 1.0, "bytes": 0.5}


def rows(name: str, a: dict[str, Any], vocab: int) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed({"forget": 1, "retain": 2}[name])
    ids = torch.randint(10, vocab, (a["rows"], a["tokens"]), generator=g).tolist()
    return [{"input_ids": row, "labels": [-100] * (a["tokens"] - a["targets"]) + row[-a["targets"] :]} for row in ids]


def naive(model: Any, a: dict[str, Any], steps: int) -> list[float]:
    vocab = model.get_input_embeddings().num_embeddings
    model = adapted(model).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    forget, retain = (pad(rows(name, a, vocab), 0) for name in ("forget", "retain"))
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        (model(**retain).loss - model(**forget).loss).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds


def ours(model: Any, a: dict[str, Any], steps: int) -> list[float]:
    vocab = model.get_input_embeddings().num_embeddings

    class Tokens(ForgetRetain):
        def encode(self, name: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            return rows(name, a, vocab)

    with tempfile.TemporaryDirectory() as tmp:
        config = UnlearnConfig(
            f"{tmp}/out", terms=GD, per_device_train_batch_size=a["rows"], max_steps=steps, use_cpu=True, save_strategy="no",
            logging_steps=1000, disable_tqdm=True, learning_rate=1e-4,
        )  # fmt: skip
        clock = Clock()
        data = Tokens([{"text": "forget"}], [{"text": "retain"}])
        trainer = UnlearnTrainer(
            adapted(model), config, data=data, processing_class=tiny.tokenizer(), callbacks=[clock]
        )
        quiet(trainer)
        trainer.train()
    return clock.seconds


RUNS = {"naive": naive, "ours": ours}


def seconds_of(name: str, a: dict[str, Any]) -> float:
    return statistics.median(RUNS[name](load_base(a["model"]), a, a["steps"] + 1)[1:])


def bytes_of(name: str, a: dict[str, Any]) -> int:
    model = load_base(a["model"])
    return shapes.peak(lambda: RUNS[name](model, a, 2))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name, value in (("rows", 4), ("tokens", 64), ("targets", 16), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = vars(parser.parse_args())
    missed, found = 0, {}
    for what, measure in (("seconds", seconds_of), ("bytes", bytes_of)):
        for name in RUNS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[f"{name} {what}"] = pool.apply(measure, (name, a))
        ratio = found[f"{what} ratio"] = found[f"ours {what}"] / found[f"naive {what}"]
        missed += ratio > GOALS[what]
        print(f"{what}: ours / naive {ratio:.2f}, goal <= {GOALS[what]:g}", flush=True)
    print(json.dumps({**found, **{k: v for k, v in a.items() if k != "model"}, "model": Path(a["model"]).name}))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
