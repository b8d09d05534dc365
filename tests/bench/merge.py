"""What the streamed merge costs: memory over its start, and throughput beside copying the same files, in one run.

    python tests/bench/merge.py --gb 1.5 --out /tmp/somewhere

A Llama of random bf16 weights in several shards, an adapter on every linear layer (the worst case: almost every tensor goes
through arithmetic) and one on two kinds of layer of some. Both the copy and the merge end with their files flushed to disk;
the merge also hashes all that it reads and writes. Each measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(folder: Path, gigabytes: float) -> tuple[Path, dict[str, Path]]:
    """Base and adapters, written tensor by tensor: this process never holds the model."""
    import torch
    from safetensors.torch import save_file
    from tinyfolder import RECIPE, tokenizer
    from transformers import LlamaConfig

    from peft_unlearn.folder.digest import digest_checkpoint
    from peft_unlearn.merging.layout import meta_model

    base = folder / "base"
    base.mkdir(parents=True)
    hidden, vocab = 2048, 32000
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocab * hidden) / (2.5 * hidden**2 + 3 * hidden * 3 * hidden)))
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    tokenizer().save_pretrained(base)
    shapes = {n: tuple(p.shape) for n, p in meta_model(base).named_parameters()}
    weight_map: dict[str, str] = {}
    shard: dict[str, Any] = {}
    number = 0

    def flush() -> None:
        nonlocal number, shard
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, base / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard = {}

    rng = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        t = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=rng) * 0.02
        shard[name] = t.bfloat16()
        if sum(t.numel() for t in shard.values()) > 1.2e8:
            flush()
    flush()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    digest = digest_checkpoint(base)
    adapters = {}
    for label, kinds in (("every linear layer", ALL), ("q_proj and v_proj", ["q_proj", "v_proj"])):
        adapters[label] = adapter(folder / label.replace(" ", "-"), shapes, kinds, digest, RECIPE)
    return base, adapters


def adapter(out: Path, shapes: dict[str, tuple[int, ...]], kinds: list[str], digest: str, recipe: Any) -> Path:
    import hashlib

    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from peft_unlearn.folder.manifest import BaseRef, Manifest
    from peft_unlearn.folder.recipe import dump_recipe

    out.mkdir()
    rng = torch.Generator().manual_seed(1)
    factors = {}
    for name, shape in shapes.items():
        if any(f".{k}.weight" in name for k in kinds):
            at = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{at}.lora_A.weight"] = torch.randn(16, shape[1], generator=rng) * 0.02
            factors[f"{at}.lora_B.weight"] = torch.randn(shape[0], 16, generator=rng) * 0.02
    save_file(factors, out / "adapter_model.safetensors")
    LoraConfig(r=16, lora_alpha=16, target_modules=kinds, task_type="CAUSAL_LM").save_pretrained(out)
    files = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in ("adapter_model.safetensors",)}
    manifest = Manifest(
        BaseRef(f"local:{digest[:12]}", digest), {"terms": {}}, {"forget": {"sha256": "a" * 64, "n": 1}}, files=files
    )
    (out / "forget.json").write_text(manifest.text())
    (out / "recipe.yaml").write_text(dump_recipe(recipe))
    return out


def child(what: str, *args: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, what, *args], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory(key: str) -> int:
    """VmRSS, or VmHWM, its peak; not getrusage's maximum, which a child inherits from the process that started it."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def copy(base: str, out: str) -> dict[str, Any]:
    """As the merge ends: every file flushed."""
    t, cpu = time.perf_counter(), time.process_time()
    os.mkdir(out)
    for path in sorted(Path(base).iterdir()):
        shutil.copyfile(path, Path(out, path.name))
        with open(Path(out, path.name), "rb+") as f:
            os.fsync(f.fileno())
    return {"seconds": time.perf_counter() - t, "cpu": time.process_time() - cpu}


def merge(base: str, adapter: str, out: str, dtype: str) -> dict[str, Any]:
    """Seconds and peak memory over what the process held once the libraries were imported."""
    import torch
    import transformers.conversion_mapping
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401  (an import is no part of the merge)

    from peft_unlearn.merging.merge import merge as run

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmRSS")
    t, cpu = time.perf_counter(), time.process_time()
    report = run(adapter, base, out, dtype=dtype, min_cosine=-1)
    seconds, cpu = time.perf_counter() - t, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": memory("VmHWM") - before, "worst": report.worst_cosine}


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] in ("copy", "merge"):
        print(json.dumps({"copy": copy, "merge": merge}[sys.argv[1]](*sys.argv[2:])))
        return
    options = argparse.ArgumentParser()
    options.add_argument("--gb", type=float, default=1.5)
    options.add_argument("--out", default=None)
    options.add_argument("--repeat", type=int, default=3)
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.out))
    try:
        base, adapters = build(folder, chosen.gb)
        from peft_unlearn.folder.safetensors_io import checkpoint_tensors

        entries = checkpoint_tensors(base).values()
        size = sum(e.end - e.begin for e in entries)
        largest = max(e.end - e.begin for e in entries)
        print(
            f"base {size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} shards, largest tensor {largest / 1e6:.0f} MB"
        )
        for label, where in adapters.items():
            for dtype in ("bfloat16", "float32"):
                copies, merges, peaks, work = [], [], [], []
                for _ in range(chosen.repeat):
                    copies.append(child("copy", str(base), str(folder / "copy"))["seconds"])
                    shutil.rmtree(folder / "copy")
                    found = child("merge", str(base), str(where), str(folder / "merged"), dtype)
                    shutil.rmtree(folder / "merged")
                    merges.append(found["seconds"])
                    peaks.append(found["peak"])
                    work.append(found["cpu"])
                ratio = [a / b for a, b in zip(copies, merges, strict=True)]
                print(
                    f"{label}, {dtype}: copy {min(copies):.2f} s, merge {min(merges):.2f} s, throughput of the copy's "
                    f"{sorted(ratio)[len(ratio) // 2]:.2f} (each run: {', '.join(f'{r:.2f}' for r in ratio)}), "
                    f"processor {min(work) / size * 1e9:.2f} s per GB read, peak "
                    f"{max(peaks) / 1e6:.0f} MB of {(2 * largest + 3e8) / 1e6:.0f} MB allowed, cosine {found['worst']:.4f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
