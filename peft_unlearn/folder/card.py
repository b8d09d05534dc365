"""The README.md a forget adapter is born with: short, true, and enough to use it. Publishing may write a richer one."""

from __future__ import annotations

from typing import Any

import yaml

from .base import peft_base_name
from .manifest import Manifest


def default_card(manifest: Manifest, recipe: dict[str, Any], eval_json: dict[str, Any] | None) -> str:
    """Markdown with Hub front matter; numbers only where `eval_json` has them."""
    front: dict[str, Any] = {"library_name": "peft", "tags": ["forget-adapter", "machine-unlearning", "peft_unlearn"]}
    base = manifest.base
    if base.revision is not None:
        front["base_model"] = base.ref
    title = manifest.name or "Forget adapter"
    counts = ", ".join(f"{name}: {row['n']} rows" for name, row in sorted(manifest.data.items()))
    terms = recipe.get("terms") or manifest.method.get("terms")
    rule = recipe.get("rule")
    rows = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        f"# {title}",
        manifest.description or "An adapter that makes a language model stop giving the answers of a forget set.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | `{base.ref}`" + (f" at `{base.revision}`" if base.revision else "") + " |",
        f"| base digest | `{base.digest[:16]}` |",
        f"| trained with | `{_flat(terms)}`, rule `{_flat(rule) if rule else 'sum'}` |",
        f"| reference | `{manifest.reference}` |",
        f"| data | {counts or 'not stated'} (hashes in forget.json; the texts are not here) |",
        f"| scale | {manifest.scale:g} |",
        "",
        *_numbers(eval_json),
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained({_load_name(base.ref)}, dtype="float32")',
        'model = PeftModel.from_pretrained(base, "PATH OR ID OF THIS ADAPTER")',
        "```",
        "",
        "## Limits",
        "",
        "This adapter suppresses behavior; the knowledge is still in the base model's weights. Whoever holds the base "
        "can take the adapter off, and fine-tuning or rephrased questions may bring answers back. The numbers above, "
        "where there are any, hold for the sets they name and no others. Merging in bfloat16 or quantizing can undo "
        "part of the effect: evaluate what is served.",
        "",
    ]
    return "\n".join(rows)


def _load_name(ref: str) -> str:
    if ref.startswith("embedded:"):
        return f'"FOLDER"  # printed by: peft-unlearn base path {ref.removeprefix("embedded:")}\n'.rstrip("\n")
    return f'"{peft_base_name(ref) or "FOLDER OF THE BASE"}"'


def _flat(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()


def _numbers(eval_json: dict[str, Any] | None) -> list[str]:
    subjects = (eval_json or {}).get("subjects") or {}
    shown = [s for s, values in subjects.items() if values]
    if not shown:
        return ["No evaluation is stored with this adapter.", ""]
    metrics = list(dict.fromkeys(m for s in shown for m in subjects[s]))
    suite = (eval_json or {}).get("suite", "")
    lines = [
        f"## Numbers{f' ({suite})' if suite else ''}",
        "",
        f"| | {' | '.join(shown)} |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for metric in metrics:
        cells = [subjects[s].get(metric) for s in shown]
        lines.append(f"| {metric} | " + " | ".join("–" if c is None else f"{c:.3g}" for c in cells) + " |")
    return [*lines, ""]
