"""Adapters of several kinds on tiny bases, written as complete folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tinyfolder import RECIPE, save_base, tokenizer, write

from peft_unlearn.folder.base import base_reference, load_base
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.manifest import Manifest, probes
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.training.save import stock_export
from peft_unlearn.tuners.delta import Deltas
from peft_unlearn.tuners.expert_lora import ExpertLoraConfig


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 base; read only."""
    return save_base(tmp_path_factory.mktemp("base") / "b")


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete forget adapter of `base_dir`; read only (copy it to damage it)."""
    out = tmp_path_factory.mktemp("adapter") / "forget"
    write(out, base_dir)
    return out


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny mixture of experts; read only."""
    return save_moe(tmp_path_factory.mktemp("moe") / "b")


def save_moe(path: Path, family: str = "olmoe") -> Path:
    families.base(family).to(torch.float32).save_pretrained(str(path))
    tokenizer().save_pretrained(str(path))
    return path


def write_config(out: Path, base_dir: Path, config: Any, seed: int, **more: Any) -> Any:
    """A complete folder with random factors, none of them zero."""
    model = get_peft_model(load_base(base_dir), config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    model.eval()
    manifest = Manifest(
        base=base_reference(str(base_dir), base_dir, digest_checkpoint(base_dir)),
        method={"seed": seed},
        data={"forget": {"sha256": hashlib.sha256(str(seed).encode()).hexdigest(), "n": 3}},
        probes=probes(model, tokenizer()),
        **more,
    )
    save = stock_export(model, "default", manifest.base)
    return write_adapter(out, model, manifest, RECIPE, tokenizer=tokenizer(), save=save)


def lora(out: Path, base_dir: Path, seed: int, modules: Any = ("q_proj", "v_proj"), **over: Any) -> Any:
    more = {k: over.pop(k) for k in ("depends_on", "scale", "name") if k in over}
    shape: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": list(modules), "task_type": "CAUSAL_LM", **over}
    return write_config(out, base_dir, LoraConfig(**shape), seed, **more)


def expert(out: Path, base_dir: Path, seed: int, experts: dict[Any, list[int]], **over: Any) -> Any:
    more = {k: over.pop(k) for k in ("depends_on", "scale", "name") if k in over}
    shape: dict[str, Any] = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM", **over}
    return write_config(out, base_dir, ExpertLoraConfig(experts=experts, **shape), seed, **more)


def dense(parts: list[tuple[Path, float]], base_dir: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The dense sum of weight times delta, weight by weight, in float64; and the base with it added."""
    base = load_base(base_dir)
    out: dict[str, Any] = {}
    for path, weight in parts:
        folder = read_adapter(path)
        deltas = Deltas(folder, base)
        for name in deltas:
            out[name] = out.get(name, 0) + weight * folder.manifest.scale * delta(deltas, name).double()
    with torch.no_grad():
        for name, d in out.items():
            base.get_parameter(name).add_(d.float())
    return out, base


def delta(deltas: Deltas, weight: str, expert: int | None = None) -> torch.Tensor:
    """The whole delta at scale 1, float32, in the weight's shape; of one expert if `expert` is given."""
    row = deltas.adapted[weight]
    if row.experts > 1 and expert is None:
        return torch.stack([delta(deltas, weight, e) for e in range(row.experts)])
    left, right = deltas.product(weight, expert)
    d = left @ right
    if row.experts > 1:
        return d
    return d.reshape(row.shape or ((d.shape[0], *row.a.shape[1:]) if len(row.a.shape) > 2 else d.shape))


def edit(folder: Path, file: str, change: Any) -> None:
    """Change a JSON file of an adapter and make the manifest agree, as somebody would who wants to be believed."""
    value = json.loads((folder / file).read_text(encoding="utf-8"))
    change(value)
    (folder / file).write_text(json.dumps(value), encoding="utf-8")
    if file != "forget.json":
        edit(
            folder,
            "forget.json",
            lambda m: m["files"].update({file: hashlib.sha256((folder / file).read_bytes()).hexdigest()}),
        )
