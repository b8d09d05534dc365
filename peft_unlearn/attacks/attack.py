"""From adapter folders to what attacks bring back, stored in eval.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.subjects import (
    bundle_for,
    embedded_retain_model,
    judged_folders,
    retain_model_folder,
    stack_of,
    subject_of,
    subjects_on,
)
from ..folder.results import store
from ..folder.write import update_block
from .requests import Requests, wanted
from .run import SHOWN, AttackResult, run_attacks

BLOCK = "attacks"  # of eval.json


def attack(
    folders: Sequence[str | Path],
    requests: Requests,
    *,
    base: str | None = None,
    data: str | None = None,
    n: int | None = None,
    seed: int = 0,
    below: Sequence[str | Path] = (),
    dtype: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
    write: bool = True,
) -> AttackResult:
    """Attack base, adapters and, where there is one, the retain model; one loaded base, adapters swapped in place.

    With one folder and all rows the result becomes block "attacks" of its eval.json; earlier attacks on the same
    adapter and rows stay in it.

    Args:
        requests: (attack, hyper-parameters), see `requests_of`.
        data: a bundle whose forget set is the one that every adapter was trained to forget, by its hash.
        n: at most so many of the scored rows; nothing is stored then.
        below: adapters that these were trained on top of, lowest first.
        dtype: what all models are computed in: float32, bfloat16, float16, or auto: float32 for attacks that change the weights
            themselves (rounding each step to bfloat16 would weaken them), else the base's own where this machine is fast in it.
    """
    chosen = wanted(requests)
    adapters = judged_folders(folders)
    found = list(adapters.values())
    bundle = bundle_for(found, data)
    if dtype == "auto" and any(w.method.name == "quantize" or w.settings.get("weights") == "full" for w in chosen):
        dtype = "float32"
    stack = stack_of(adapters, base, below, dtype)
    subjects = subjects_on(stack, list(adapters))
    ref = found[0].manifest.base.ref
    checkpoints: dict[str, Any] = dict.fromkeys(subjects, stack.base_dir)
    subjects["retain_only"] = embedded_retain_model(ref, bundle, stack.dtype)
    checkpoints["retain_only"] = retain_model_folder(ref, bundle)
    shown = max([int(w.settings["rows"]) for w in chosen if w.method.name == "relearn"], default=SHOWN)
    result = run_attacks(
        subjects, chosen, bundle, stack.tokenizer, shown=shown, n=n, seed=seed, checkpoints=checkpoints, base=ref,
        adapter_id=found[0].adapter_id if len(found) == 1 else None, progress=progress,
    )  # fmt: skip
    result.dtype = stack.dtype
    result.scale = {subject: stack.scales()[name] for subject, name in subject_of(list(adapters)).items()}
    if write and len(found) == 1 and n is None:
        whole = _with_earlier(result.to_dict(), (found[0].eval or {}).get(BLOCK))
        store(found[0].path, lambda: update_block(found[0].path, BLOCK, whole, result.attacks))
    return result


def _with_earlier(block: dict[str, Any], earlier: Any) -> dict[str, Any]:
    """The block with those attacks of an earlier one that were not run again and are about the same thing."""
    same = ("format", "rows", "adapter_id", "base", "versions", "scale", "dtype")
    if not isinstance(earlier, Mapping) or any({"dtype": "float32", **earlier}.get(k) != block[k] for k in same):
        return block
    return {**block, "attacks": {**earlier.get("attacks", {}), **block["attacks"]}}
