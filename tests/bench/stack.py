"""What a stack of eight adapters costs, against one adapter of the same total rank on the same base, in one run.

    OMP_NUM_THREADS=1 python tests/bench/stack.py [--hidden 1024] [--layers 4] [--adapters 8] [--rank 8] [--rounds 15] [--experts]

The three variants take turns within every round; ratios are medians over the rounds of ratios within a round, and those of
the fastest rounds, which a busy machine disturbs least. Time is the processor's own, not the wall's. "loop" is PEFT's own
forward. Both a batch (as in training and evaluation) and single tokens (as in generation) are measured.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_unlearn.stack.attach import activate
from peft_unlearn.stack.fused import fuse, unfuse


def model(hidden: int, layers: int, ranks: list[int]):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden * 5 // 2, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, max_position_embeddings=1024,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    out = None
    for i, r in enumerate(ranks):
        lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
        if out is None:
            out = get_peft_model(base, lora, adapter_name="n0")
        else:
            out.add_adapter(f"n{i}", lora)
    with torch.no_grad():
        for n, p in out.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.02)
    activate(out, [f"n{i}" for i in range(len(ranks))])
    return out.eval()


def experts(hidden: int, layers: int, ranks: list[int]):
    """The same for adapters on one and the same expert of every layer, which are never fused."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from peft_unlearn.tuners.expert_lora import ExpertLoraConfig

    torch.manual_seed(0)
    base = OlmoeForCausalLM(OlmoeConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden // 2, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, num_experts=8, num_experts_per_tok=2, max_position_embeddings=1024,
    )).eval()  # fmt: skip
    out = None
    for i, r in enumerate(ranks):
        config = ExpertLoraConfig(
            experts={k: [0, 1] for k in range(layers)}, r=r, lora_alpha=2 * r, init_weights=False, task_type="CAUSAL_LM"
        )
        if out is None:
            out = get_peft_model(base, config, adapter_name="n0")
        else:
            out.add_adapter(f"n{i}", config)
    activate(out, [f"n{i}" for i in range(len(ranks))])
    return out.eval()


@torch.no_grad()
def seconds(m, ids, times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        m(input_ids=ids, use_cache=False)
    return (time.process_time() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", action="store_true", help="adapters on experts instead")
    for name, default in (("hidden", 1024), ("layers", 4), ("adapters", 8), ("rank", 8), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    make = experts if a.experts else model
    many = make(a.hidden, a.layers, [a.rank] * a.adapters)
    one = make(a.hidden, a.layers, [a.rank * a.adapters])
    found = {}
    for what, shape, times in (("batch 4 x 64", (4, 64), 1), ("one token", (1, 1), 5)):
        ids = torch.randint(0, 512, shape)
        rows = {"one adapter": [], "fused": [], "loop": []}
        with torch.no_grad():
            loop = many(input_ids=ids).logits
            fuse(many)
            gap = float((many(input_ids=ids).logits - loop).abs().max() / loop.abs().max())
            unfuse(many)
        for round_ in range(a.rounds + 1):
            t = {"one adapter": seconds(one, ids, times)}
            fuse(many)
            many(input_ids=ids)  # builds the pairs
            t["fused"] = seconds(many, ids, times)
            unfuse(many)
            t["loop"] = seconds(many, ids, times)
            if round_:  # the first warms up
                for k, v in t.items():
                    rows[k].append(v)
        ratios = {k: [x / y for x, y in zip(rows[k], rows["one adapter"], strict=True)] for k in ("fused", "loop")}
        found[what] = {
            "ms": {k: round(1000 * statistics.median(v), 3) for k, v in rows.items()},
            "ratio to one adapter of the same total rank": {
                k: round(statistics.median(v), 3) for k, v in ratios.items()
            },
            "ratio of the fastest rounds": {
                k: round(min(rows[k]) / min(rows["one adapter"]), 3) for k in ("fused", "loop")
            },
            "quartiles": {k: [round(q, 3) for q in statistics.quantiles(v, n=4)[::2]] for k, v in ratios.items()},
            "largest relative difference of fused and loop logits": gap,
        }
    print(json.dumps({"settings": vars(a), "threads": torch.get_num_threads(), **found}, indent=2))


if __name__ == "__main__":
    main()
