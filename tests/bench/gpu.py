"""What steps and judging cost on an accelerator: ``python tests/bench/gpu.py --out gpu.json``, under 8 minutes, no network.

Random weights of the true shapes (Llama-3.2-1B, Llama-3.1-8B; OLMoE's and Qwen3-30B-A3B's layers, a few of them), bfloat16, LoRA of rank
16 on all linear layers in float32. Every alternative is warmed up by one step and timed for some, each between two synchronizations;
medians. What does not fit the memory or the time is a row that says so. A share of the peak counts 4 FLOPs a weight and token (frozen
weights need no gradient) and is taken against the card's data sheet and against a large matrix product measured here.

``full_logits_*`` are the losses as open-unlearning computes them (logits of every position, both graphs alive until one backward), on the
same LoRA. ``--tiny`` runs everything at toy shapes, on a CPU too; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DENSE: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "OLMoE layers": {
        "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304,
    },
    "Qwen3-30B-A3B layers": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320,
}  # fmt: skip
DATASHEET = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12}  # bfloat16, dense
TERMS: dict[str, Any] = {"forget": {"ga": {}}, "retain": {"nll": {}}}
NPO: dict[str, Any] = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {}}}


class Bench:
    """What is measured, on which device, until when."""

    def __init__(self, small: bool, minutes: float, rows: int, tokens: int, steps: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.small, self.rows, self.tokens, self.steps = small, rows, tokens, steps
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.until = time.monotonic() + 60 * minutes
        self.found: list[dict[str, Any]] = []

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def model(self, shape: dict[str, Any], kind: str = "llama") -> Any:
        shape = {k: TINY.get(k, v) if self.small else v for k, v in shape.items() if k != "model_type"}
        config = AutoConfig.for_model(kind, **shape, max_position_embeddings=4096, pad_token_id=0)
        torch.manual_seed(0)
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def batch(self, vocab: int, seed: int) -> dict[str, torch.Tensor]:
        """Random tokens; the first half of every row is a prompt without targets."""
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocab, (self.rows, self.tokens), generator=g)
        labels = ids.clone()
        labels[:, : self.tokens // 2] = -100
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {k: v.to(self.device) for k, v in found.items()}

    def timed(self, where: str, what: str, step: Callable[[], Any], tokens: int, weights: int = 0) -> None:
        """Add a row: median seconds of `step`, `tokens` of them a step; with `weights` the rate of 4 FLOPs a weight and token."""
        row: dict[str, Any] = {"shape": where, "what": what}
        self.found.append(row)
        if time.monotonic() > self.until:
            row["left_out"] = "the time was over"
            return
        cuda = self.device.type == "cuda"
        try:
            step()
            self.synchronize()
            held = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            while len(seconds) < self.steps and (not seconds or time.monotonic() < self.until):
                began = time.perf_counter()
                step()
                self.synchronize()
                seconds.append(time.perf_counter() - began)
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
            torch.cuda.empty_cache()
            return
        row |= {"seconds": statistics.median(seconds), "steps": len(seconds)}
        row["tokens_per_second"] = tokens / row["seconds"]
        row["peak_gb_above"] = (torch.cuda.max_memory_allocated() - held) / 1e9 if cuda else None
        row["flops"] = 4 * weights * tokens / row["seconds"] if weights else None


def matmul_rate(b: Bench) -> float:
    """FLOPs a second of one large product in the benchmark's dtype."""
    n = 256 if b.small else 8192
    x = torch.ones((n, n), dtype=b.dtype, device=b.device)
    _ = x @ x
    b.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        _ = x @ x
    b.synchronize()
    return 10 * 2 * n**3 / (time.perf_counter() - began)


def optimized(model: Any, gradients: Callable[[], None]) -> Callable[[], None]:
    """A step: gradients into ``.grad``, clipped, AdamW."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0)

    def step() -> None:
        gradients()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(
    b: Bench, model: Any, window: list[dict[str, Any]], terms: dict[str, Any], **config: Any
) -> Callable[[], None]:
    """The step of `UnlearnTrainer`: the window's, written to ``.grad``."""
    made = UnlearnConfig("unused", terms=terms, use_cpu=b.device.type == "cpu", report_to="none", **config).window(
        model, Reference("before", "default")
    )

    def gradients() -> None:
        for p, t in zip(made.space.params, made.step(window).update.tensors, strict=True):
            p.grad = t.to(p.dtype)

    return optimized(model, gradients)


def full_logits(model: Any, forget: Any, retain: Any, npo: bool) -> Callable[[], None]:
    """GradDiff or NPO with the logits of every position, both losses in one backward."""

    def nll(batch: Any) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return each.sum(1)

    def gradients() -> None:
        loss = -nll(forget).mean() / forget["labels"].shape[1]
        if npo:
            with torch.no_grad(), model.disable_adapter():
                before = nll(forget)
            loss = -2 / 0.1 * torch.nn.functional.logsigmoid(0.1 * (nll(forget) - before)).mean()
        (loss + nll(retain).mean() / retain["labels"].shape[1]).backward()

    return optimized(model, gradients)


def dense(b: Bench, name: str) -> None:
    base = b.model(DENSE[name])
    weights = sum(p.numel() for p in base.parameters())
    if not base.config.tie_word_embeddings:
        weights -= base.get_input_embeddings().weight.numel()  # looked up, not multiplied with
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LLAMA, task_type="CAUSAL_LM"))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    forget, retain = (b.batch(base.config.vocab_size, s) for s in (1, 2))
    window, tokens = [{"forget": forget, "retain": retain}], 2 * b.rows * b.tokens
    both = {k: torch.cat([forget[k], retain[k]]) for k in forget}
    b.timed(name, "hf_lora", optimized(model, lambda: model(**both).loss.backward()), tokens, weights)
    b.timed(name, "full_logits_graddiff", full_logits(model, forget, retain, False), tokens, weights)
    b.timed(name, "full_logits_npo", full_logits(model, forget, retain, True), tokens)
    b.timed(name, "graddiff", ours(b, model, window, TERMS), tokens, weights)
    b.timed(name, "npo_live", ours(b, model, window, NPO), tokens)
    with torch.no_grad():
        p = Pass(model, forget, reference=Reference("before", "default"))
        kept = torch.zeros(b.rows, b.tokens - 1, device=b.device)
        kept[p.mask] = p.ref_logp
    b.timed(
        name, "npo_cached", ours(b, model, [{"forget": {**forget, "ref_logp": kept}, "retain": retain}], NPO), tokens
    )
    half = base.config.num_hidden_layers // 2
    rmu = {"forget": {"rmu": {"layer": half}}, "retain": {"representation_retention": {"layer": half}}}
    b.timed(name, "rmu", ours(b, model, window, rmu), tokens)
    b.timed(name, "sam", ours(b, model, window, TERMS, smoothing="sam"), tokens)
    if b.device.type == "cuda":
        b.found.append({"shape": name, "what": "graddiff", "host_syncs": host_syncs(ours(b, model, window, TERMS))})

    @torch.no_grad()
    def read() -> None:
        _ = Pass(model, forget).logp

    b.timed(name, "judging: answers read", read, b.rows * b.tokens)
    words, new = tiny.tokenizer(), 4 if b.small else 64
    prompts = [r["question"] for r in tiny.rows(2 if b.small else 64, "f")]
    made = sum(len(words(t)["input_ids"]) for t in greedy(model, words, prompts, max_new_tokens=new))
    b.timed(name, "judging: answers decoded", lambda: greedy(model, words, prompts, max_new_tokens=new), max(1, made))


def host_syncs(step: Callable[[], None]) -> int:
    """How often a step makes the host wait for the device."""
    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in told)


def mixture(b: Bench, name: str) -> None:
    """LoRA inside two experts of one layer, beside LoRA on all attention and beside reading alone."""
    for what, spec in (
        ("expert adapter", {"type": "expert_lora", "r": 16, "experts": {1: [0, 1]}}),
        ("attention LoRA", {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    ):
        base = b.model(MIXTURES[name], MIXTURES[name]["model_type"])
        model = get_forget_model(base, spec)
        window = [{n: b.batch(base.config.vocab_size, s) for n, s in (("forget", 1), ("retain", 2))}]
        b.timed(name, what, ours(b, model, window, TERMS), 2 * b.rows * b.tokens)
        if what == "attention LoRA":

            @torch.no_grad()
            def read() -> None:
                _ = Pass(model, window[0]["forget"]).logp  # noqa: B023  called at once

            b.timed(name, "reading alone", read, b.rows * b.tokens)


def table(found: dict[str, Any]) -> str:
    lines = [f"{found['device']}, {found['dtype']}, {found['rows']} + {found['rows']} rows of {found['tokens']} tokens"]
    for r in found["figures"]:
        head = f"{r['shape']:<21} {r['what']:<24} "
        if "left_out" in r:
            lines.append(f"{head}{r['left_out']}")
        elif "host_syncs" in r:
            lines.append(f"{head}{r['host_syncs']} waits of the host in a step")
        else:
            memory = "" if r["peak_gb_above"] is None else f"  +{r['peak_gb_above']:.2f} GB"
            share = "" if r.get("of_peak") is None else f"  {r['of_peak']:.1%} of the peak"
            matmul = "" if r.get("of_matmul") is None else f"  {r['of_matmul']:.1%} of a product's rate"
            lines.append(
                f"{head}{1e3 * r['seconds']:10.1f} ms {r['tokens_per_second']:12,.0f} tokens/s{memory}{share}{matmul}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU too: does it run?")
    parser.add_argument("--minutes", type=float, default=7.0, help="no alternative begins after so many")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default=None, help="one shape")
    parser.add_argument("--out", default=None, help="also write the figures here (JSON)")
    a = parser.parse_args(argv)
    if not a.tiny and not torch.cuda.is_available():
        parser.error("there is no accelerator here; --tiny runs the same at toy shapes")
    b = Bench(a.tiny, a.minutes, 2 if a.tiny else a.rows, 16 if a.tiny else a.tokens, 1 if a.tiny else a.steps)
    rate = matmul_rate(b)
    for name in (*DENSE, *MIXTURES):
        if a.only in (None, name):
            (dense if name in DENSE else mixture)(b, name)
            if b.device.type == "cuda":
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if b.device.type == "cuda" else "CPU, toy shapes: these figures mean nothing"
    sheet = next((f for k, f in DATASHEET.items() if b.device.type == "cuda" and k in device), None)
    for row in b.found:
        if row.get("flops"):
            row["of_matmul"], row["of_peak"] = row["flops"] / rate, row["flops"] / sheet if sheet else None
    found = {
        "device": device, "dtype": str(b.dtype).removeprefix("torch."), "rows": b.rows, "tokens": b.tokens, "matmul_flops": rate,
        "torch": torch.__version__, "figures": b.found,
    }  # fmt: skip
    print(table(found))
    if a.out:
        Path(a.out).write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main()
