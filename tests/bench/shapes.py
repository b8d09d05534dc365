"""The shapes, batches and runs that the benchmarks share. Nothing here asserts a time."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.forward import Pass
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.train import quiet
from peft_unlearn.training.trainer import UnlearnTrainer

torch.set_num_threads(1)

SHAPES = {"S1": 4096, "S2": 128256}  # vocabulary; 4 layers, hidden 256, untied
ROWS, SEQ, MASKED = 8, 128, 64


def base(shape: str) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPES[shape], hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip


def adapted(model: Any, layers: list[int] | None = None) -> Any:
    torch.manual_seed(1)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model,
        LoraConfig(r=16, lora_alpha=32, target_modules=names, layers_to_transform=layers, task_type="CAUSAL_LM"),
    )


def rows(shape: str, seed: int, n: int = ROWS) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        ids = torch.randint(3, SHAPES[shape], (SEQ,), generator=g).tolist()
        out.append({"input_ids": ids, "labels": [-100] * MASKED + ids[MASKED:]})
    return out


class Tokens(ForgetRetain):
    """A bundle of random tokens instead of text."""

    shape = "S1"

    def encode(self, name: str, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        return rows(self.shape, {"forget": 1, "retain": 2}[name])


class Clock(TrainerCallback):
    """CPU seconds of every step, data loading left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def ours(
    terms: dict[str, Any], layers: list[int] | None = None, **config: Any
) -> Callable[[Any, str, int], list[float]]:
    """CPU seconds per step of `UnlearnTrainer`."""

    def run(model: Any, shape: str, steps: int) -> list[float]:
        with tempfile.TemporaryDirectory() as tmp:
            args = UnlearnConfig(
                f"{tmp}/out", terms=terms, per_device_train_batch_size=ROWS, max_steps=steps, use_cpu=True,
                save_strategy="no", logging_steps=1000, disable_tqdm=True, learning_rate=1e-4, **config,
            )  # fmt: skip
            data = Tokens([{"text": "forget"}], [{"text": "retain"}])
            data.shape = shape
            clock = Clock()
            trainer = UnlearnTrainer(
                adapted(model, layers), args, data=data, processing_class=tiny.tokenizer(), callbacks=[clock]
            )
            quiet(trainer)
            trainer.train()
        return clock.seconds

    return run


def hf_nll(model: Any, shape: str, steps: int) -> list[float]:
    """L: transformers' Trainer, plain LoRA NLL on the same tokens in one batch."""
    data = [{k: torch.tensor(v) for k, v in r.items()} for r in rows(shape, 1) + rows(shape, 2)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as tmp:
        args = TrainingArguments(
            f"{tmp}/out", per_device_train_batch_size=2 * ROWS, max_steps=steps, use_cpu=True, save_strategy="no",
            logging_steps=1000, disable_tqdm=True, learning_rate=1e-4, report_to="none", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model=adapted(model), args=args, train_dataset=data, callbacks=[clock])
        trainer.pop_callback(_printer())
        trainer.train()
    return clock.seconds


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def bare_gd(model: Any, shape: str, steps: int) -> list[float]:
    """The same GradDiff loss in a loop written by hand."""
    from peft_unlearn.data.collate import pad

    model = adapted(model).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0)
    batches = [(-1.0, pad(rows(shape, 1), 0)), (1.0, pad(rows(shape, 2), 0))]
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        for sign, batch in batches:
            (sign * -Pass(model, batch).logp.mean()).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return seconds


GD = {"forget": {"ga": {}}, "retain": {"nll": {}}}
NPO = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {}}}
RUNS: dict[str, Callable[[Any, str, int], list[float]]] = {
    "hf_lora_nll": hf_nll,
    "graddiff": ours(GD),
    "bare_graddiff": bare_gd,
    "npo_live": ours(NPO),
    "npo_precomputed": ours(NPO, reference="precomputed"),
}


# Methods over rule sum on the same batch. ngdiff refits its learning rate every ten steps: it is timed over ten.
METHODS: dict[str, Callable[[Any, str, int], list[float]]] = {
    "graddiff": RUNS["graddiff"],
    "ngdiff": ours(GD, rule="ngdiff", step_size={"gen": {"every": 10}}),
    "gru": ours(GD, rule="gru"),
    "sam": ours(GD, smoothing="sam"),
    "rs3": ours(GD, smoothing={"rs": {"n": 3}}),
    "rmu": ours({"forget": {"rmu": {"layer": 1}}, "retain": {"representation_retention": {"layer": 1}}}, layers=[0, 1]),
}


def peak_above_model(name: str, shape: str) -> int:
    """Peak bytes of torch's CPU allocator above the loaded base over two steps; call it in a fresh process."""
    model = base(shape)
    return peak(lambda: (RUNS | METHODS)[name](model, shape, 2))


def peak(run: Callable[[], Any]) -> int:
    """Peak bytes of torch's CPU allocator above what is there, while `run` runs."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most
