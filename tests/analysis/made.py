"""Forget adapters on the embedded base, made in seconds: a few steps of gradient ascent on a few rows, saved as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peft_unlearn.data import embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.folder.base import load_base, load_tokenizer
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.manifest import BaseRef, Manifest
from peft_unlearn.folder.read import AdapterFolder
from peft_unlearn.folder.write import write_adapter


def _logp(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(targets,) log-probabilities of the answers' tokens."""
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    y = batch["labels"][:, 1:]
    return z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)[y != -100]


def make(
    out: Path, data: ForgetRetain, rows: list[dict[str, Any]], steps: int = 10, lr: float = 3e-3, eval_json: Any = None
) -> AdapterFolder:
    """An adapter trained to forget `rows`, whose manifest says that its forget set is that of `data`."""
    from peft import LoraConfig, get_peft_model

    base_dir = embedded.base_path("people")
    torch.manual_seed(0)
    model = get_peft_model(load_base(base_dir), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    tokenizer = load_tokenizer(base_dir)
    kept = (data.extra.get("retain") or data.retain or [])[:16]
    batches = [
        pad([encode(*to_text(r, tokenizer, "qa"), tokenizer)[0] for r in some], tokenizer.pad_token_id)
        for some in (rows, kept)
    ]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        forget, retain = (_logp(model, batch) for batch in batches)
        loss = forget.clamp(min=-8).mean() - 3 * retain.mean()  # ascent on the forget NLL, to a depth
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    about = {k: {kk: v for kk, v in d.items() if v is not None} for k, d in data.describe().items()}
    manifest = Manifest(
        base=BaseRef("embedded:people", digest_checkpoint(base_dir)), method={"steps": steps}, data=about,
        seeds={"seed": 0}, versions={"torch": torch.__version__}, description="made for a test",
    )  # fmt: skip
    recipe = {
        "base": "embedded:people",
        "data": {"bundle": "embedded:people"},
        "terms": {"forget": {"ga": {}}},
        "seed": 0,
    }
    return write_adapter(out, model.eval(), manifest, recipe, tokenizer=tokenizer, eval_json=eval_json)
