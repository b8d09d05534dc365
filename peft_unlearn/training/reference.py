"""What losses read of the reference model, taken once before training and cached beside the checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.collate import pad
from ..folder.atomic import part_of, sweep_parts
from ..folder.digest import adapter_modules, plain_tensors
from ..folder.quantized import options_of, plain_parts
from ..forward import Pass, Reference
from ..gradients.vector import whole
from ..tuners.names import belongs, scalings


@torch.no_grad()
def precompute(
    model: Any,
    sets: Mapping[str, list[dict[str, Any]]],
    wanted: Mapping[str, str],
    folder: Path,
    *,
    reference: Reference,
    pad_id: int,
    write: bool = True,
) -> None:
    """Give every row of the named sets (and its winner answer) what their losses read of the reference.

    Args:
        wanted: set -> ``ref_logp``, one value per target, (n,) float32; or ``ref_head``, the hidden states before the output
            embeddings at its targets, (n, hidden), from which any function of the logits follows.
        folder: where the cache lies, one file per key (see `cache_key`); made if it is not there.
        write: whether this process writes the file (the first rank does).
    """
    digest = None
    for name, what in sorted(wanted.items()):
        rows = sets[name]
        both = rows + [r["alternate"] for r in rows if "alternate" in r]
        if all(what in r for r in both):
            continue
        digest = digest or model_digest(model, reference.trained)
        path = folder / f"reference-{cache_key(digest, both)[:16]}.{what}.safetensors"
        values = _cached(path, what, [n_targets(r) for r in both])
        if values is None:
            values = reference_values(model, both, reference, pad_id, what)
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep_parts(path.parent)
                stage, whole = part_of(path), torch.cat(values)
                save_file({what: whole}, stage, metadata={"sha256": hashlib.sha256(raw_bytes(whole)).hexdigest()})
                os.replace(stage, path)
        for row, v in zip(both, values, strict=True):
            row[what] = v


def _cached(path: Path, what: str, lengths: list[int]) -> list[torch.Tensor] | None:
    """What an earlier run wrote to `path`; None where there is nothing, or not all of it as it was written."""
    try:
        with safe_open(path, framework="pt") as f:
            whole, sha = f.get_tensor(what), (f.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    if whole.shape[:1] != (sum(lengths),) or hashlib.sha256(raw_bytes(whole)).hexdigest() != sha:
        return None
    return list(whole.split(lengths))


@torch.no_grad()
def reference_values(
    model: Any, rows: list[dict[str, Any]], reference: Reference, pad_id: int, what: str = "ref_logp", size: int = 32
) -> list[torch.Tensor]:
    """``ref_logp`` or ``ref_head`` of each row's targets, in the order of `rows`; batches of like length."""
    out: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    device = next(model.parameters()).device
    for at in range(0, len(order), size):
        part = order[at : at + size]
        batch = {k: v.to(device) for k, v in pad([rows[i] for i in part], pad_id).items()}
        p = Pass(model, batch, reference=reference, share=True)
        for i, v in zip(part, getattr(p, what).split(p.mask.sum(1).tolist()), strict=True):
            out[i] = v.cpu()
    return out


def cache_key(digest: str, rows: list[dict[str, Any]]) -> str:
    """sha256 over a model's digest and the rows' ids and labels."""
    return hashlib.sha256((digest + json.dumps([[r["input_ids"], r["labels"]] for r in rows])).encode()).hexdigest()


def model_digest(model: Any, trained: str) -> str:
    """sha256 over the base, the active adapters below the trained one, and the dtype."""
    h = hashlib.sha256()
    # Which adapters are on, and at which scale (lora_alpha and its like), is not in the weights.
    others = [a for a in model.active_adapters if a != trained]
    settings = [{**model.peft_config[a].to_dict(), "base_model_name_or_path": None} for a in others]
    h.update(json.dumps([others, settings, *_scales(model, others)], sort_keys=True, default=str).encode())
    held = [part for n, p in model.named_parameters() if not belongs(n, trained) for part in plain_parts(n, p)]
    if options_of(model):  # the scales of packed numbers are no parameters
        held += sorted(plain_tensors(model).items())
    for n, p in held:
        h.update(f"{n}{p.dtype}{tuple(p.shape)}".encode() + raw_bytes(p))
    for n, t in fixed_tensors(model, others):
        h.update(f"{n}{t.dtype}{tuple(t.shape)}".encode() + raw_bytes(t))
    return h.hexdigest()


def stack_digest(model: Any, trained: str) -> str | None:
    """sha256 over the adapters below the trained one: weights, order and scales; None where there are none."""
    others = [a for a in model.peft_config if a != trained]
    if not others:
        return None
    h = hashlib.sha256(json.dumps([others, _scales(model, others)]).encode())
    for n, p in model.named_parameters():
        if any(belongs(n, a) for a in others):
            h.update(n.encode() + raw_bytes(p))
    for n, t in fixed_tensors(model, others):
        h.update(n.encode() + raw_bytes(t))
    return h.hexdigest()


def fixed_tensors(model: Any, adapters: Sequence[str]) -> list[tuple[str, torch.Tensor]]:
    """Tensors of adapters that are no parameters and decide what they do all the same: the positions of sparse ones, SHiRA's too."""
    found = []
    for name, layer in adapter_modules(model).items():
        for kind in getattr(layer, "other_param_names", ()):
            held: Any = getattr(layer, kind, None)
            for a in adapters if hasattr(held, "keys") else ():
                if a in held.keys() and isinstance(held[a], torch.Tensor):  # noqa: SIM118  a module of buffers
                    found.append((f"{name}.{kind}.{a}", held[a]))
    return found


def _scales(model: Any, adapters: list[str]) -> list[Any]:
    """The scale of each adapter, layer by layer."""
    return [[n, a, float(scaling[a])] for n, scaling in scalings(model) for a in adapters if a in scaling]


def n_targets(row: Mapping[str, Any]) -> int:
    return sum(y != -100 for y in row["labels"][1:])


def raw_bytes(p: torch.Tensor) -> bytes:
    """The tensor's values as they lie in memory; of a sharded one all of them, for which every rank has to ask."""
    return whole(p.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
