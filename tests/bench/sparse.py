"""What a sparse adapter costs beside a LoRA of as many trainable numbers, and how much its stock form is padded; ratios of one run.

    python tests/bench/sparse.py [--rounds 5] [--out FILE]

Two bases with random weights: the shape of the embedded people (hidden 128, 4 blocks) and a wider one (hidden 512, 4 blocks). Masks of
0.5, 2 and 10 % of all linear weights: random ones, and ones that lie as WAGLE's do (93 % in block 0, there in a part of the rows and
columns; made up, so that no attribution has to run). A step is one forward and backward over 8 sequences of 64 tokens, clipping and
SGD; CPU seconds (`process_time`), one thread, alternatives in turns, medians. Memory: bytes that autograd keeps of tensors of a
weight's shape other than the base's own. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_unlearn.tuners.selection import Selection
from peft_unlearn.tuners.sparse import SparseConfig
from peft_unlearn.tuners.sparse.export import entries_of, linear_in, stock_form

SHAPES = {"people": (128, 352, 4, 1500), "wide": (512, 1408, 4, 4000)}
RATIOS = (0.005, 0.02, 0.1)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(shape: str) -> Any:
    torch.manual_seed(0)
    hidden, inner, layers, words = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def mask(model: Any, ratio: float, kind: str) -> Selection:
    g = torch.Generator().manual_seed(1)
    weights = {n: p for n, p in model.named_parameters() if any(f".{m}." in n for m in MODULES)}
    budget = int(ratio * sum(p.numel() for p in weights.values()))
    scores = {}
    for n, p in weights.items():
        score = torch.rand(p.shape, generator=g)
        if kind == "wagle":  # outer products of heavy-tailed factors, block 0 far above the others
            rows, columns = (torch.randn(k, generator=g).abs() ** 3 for k in p.shape)
            score = score * rows[:, None] * columns[None] * (30.0 if ".layers.0." in n else 1.0)
        scores[n] = score
    flat = torch.cat([s.flatten() for s in scores.values()])
    least = flat.topk(budget).values[-1]
    indices = {n: (s.flatten() >= least).nonzero().squeeze(1) for n, s in scores.items()}
    return Selection(indices, {n: tuple(p.shape) for n, p in weights.items()}, {"method": kind})


def step(model: Any, optimizer: Any, batch: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def seconds(models: dict[str, Any], words: int, rounds: int) -> dict[str, float]:
    batch = torch.randint(words, (8, 64), generator=torch.Generator().manual_seed(2))
    made = {n: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for n, m in models.items()}
    spent: dict[str, list[float]] = {n: [] for n in models}
    for turn in range(rounds + 1):
        for n in list(models) if turn % 2 else list(models)[::-1]:
            start = time.process_time()
            step(models[n], made[n], batch)
            if turn:
                spent[n].append(time.process_time() - start)
    return {n: statistics.median(s) for n, s in spent.items()}


def copies(model: Any, words: int) -> int:
    """Bytes that autograd keeps of tensors with an adapted weight's shape, the base's own weights left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if "base_layer" in n and p.dim() == 2}
    shapes |= {s[::-1] for s in shapes}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.layout == torch.strided and tuple(t.shape) in shapes and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=torch.randint(words, (1, 37))).logits.sum()
    del loss
    return sum(kept.values())


def case(shape: str, ratio: float, kind: str, rounds: int) -> dict[str, Any]:
    plain, words = base(shape), SHAPES[shape][3]
    selection = mask(plain, ratio, kind)
    form = stock_form(
        entries_of(get_peft_model(base(shape), SparseConfig(selection=selection))),
        linear_in(plain),
    )
    assert not isinstance(form, str)
    units = sum(sum(s) for s in selection.shapes.values())
    r = max(1, round(selection.count / units))
    models = {
        "sparse": get_peft_model(base(shape), SparseConfig(selection=selection)),
        "lora": get_peft_model(base(shape), LoraConfig(r=r, target_modules=MODULES)),
        "shira": get_peft_model(base(shape), ShiraConfig(r=r, target_modules=MODULES)),
    }
    spent = seconds(models, words, rounds)
    one = max(-(-len(i) // sum(selection.shapes[n])) for n, i in selection.indices.items()) * units / selection.count
    row = {
        "shape": shape, "ratio": ratio, "mask": kind, "entries": selection.count, "lora rank": r,
        **{f"{n} ms": round(1e3 * s, 1) for n, s in spent.items()},
        "sparse / lora": round(spent["sparse"] / spent["lora"], 3),
        "kept copies, bytes": {n: copies(m, words) for n, m in models.items()},
        "padding": round(form.padding, 2), "parts": len(form.parts), "padding of one SHiRA": round(one, 1),
    }  # fmt: skip
    del models
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [case(s, r, k, given.rounds) for s in SHAPES for r in RATIOS for k in ("random", "wagle")]
    for row in rows:
        print(json.dumps(row))
    if given.out:
        given.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
