"""Taking a forget adapter off, with proof that what remains is the base.

The proof does not trust a copy taken before: the tensors that live in memory after unloading are digested and compared
with the digest of the base's FILES, no module of PEFT may be left, and the four probe prompts must give the logits
that the manifest stored for the base. Unmerging is no removal: in half precision it leaves rounded weights, and is
reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import UserError
from ..folder.digest import LiveDigest, adapter_modules, digest_live
from ..folder.manifest import Probes, probe_difference
from ..folder.quantized import name_of, options_of
from ..reporting.result import Result
from ..tuners.names import belongs
from .attach import detach

PROBE_TOLERANCE = 1e-3
"""Largest allowed |logit - stored logit|: other kernels and thread counts differ by less, a changed model by more."""


@dataclass
class RemovalReport(Result):
    """What was taken off and what was found.

    digest, base_digest: of the live tensors and of the files. changed: tensors that differ. left: what is still there of
    the adapters. merged: modules that hold rounded sums. remaining: adapters that go on. quantized: how the base is held in fewer
    bits, so that it was compared with its files quantized again.
    """

    verdict: Literal["removed", "changed", "cannot tell"]
    adapters: list[str]
    base_digest: str
    digest: str | None
    n_tensors: int
    changed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    probe_difference: float | None = None
    probe_tolerance: float = PROBE_TOLERANCE
    reasons: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)
    quantized: str | None = None

    @property
    def ok(self) -> bool:
        return self.verdict == "removed"

    @property
    def exit_code(self) -> int:
        """0 removed with proof; 1 the check answered no, or could not tell."""
        return 0 if self.ok else 1

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {k: v for k, v in found.items() if k != "quantized" or v is not None}

    def __str__(self) -> str:
        names = ", ".join(self.adapters)
        again = "" if self.quantized is None else f" quantized again, {self.quantized}"
        if self.verdict == "removed" and self.remaining:
            head = (
                f"Removed {names}; {', '.join(self.remaining)} {'goes' if len(self.remaining) == 1 else 'go'} on over a "
                f"base all of whose {self.n_tensors} tensors have the bytes of its files{again}."
            )
        elif self.verdict == "removed":
            head = f"Removed {names}: all {self.n_tensors} tensors in memory have the bytes of the base's files{again}."
        elif self.verdict == "changed":
            head = f"CHANGED: {names} taken off, but what is left is not the base."
        else:
            head = f"Cannot tell: {names} taken off, but it could not be proved that what is left is the base."
        lines = [head, f"  base files   {self.base_digest}", f"  live tensors {self.digest or 'no digest'}"]
        if self.probe_difference is not None:
            lines.append(
                f"  probes       differ by at most {self.probe_difference:.2g} (allowed {self.probe_tolerance:g})"
            )
        return "\n".join(lines + [f"  {r}" for r in self.reasons])


def take_off(
    model: Any, base_dir: Path, probes: Probes | None = None, tokenizer: Any = None
) -> tuple[Any, RemovalReport]:
    """Unload every adapter of `model` and prove the result against the files in `base_dir`: (plain model, report).

    Raises `UserError` when there is no adapter on the model; never for a failed proof.
    """
    if not adapter_modules(model) and not _soft(model):
        raise UserError("There is no adapter on this model to remove.")
    names, merged = list(getattr(model, "peft_config", {})), _merged(model)
    plain = unload(model)
    live = digest_live(plain, base_dir)
    left = list(adapter_modules(plain))
    left += [n for n, _ in plain.named_parameters() if "lora_" in n and n not in left]
    reasons = [live.reason] if live.reason else []
    if merged:
        reasons.append(f"It was merged into {len(merged)} modules; reload the base to be rid of it.")
    if left:
        reasons.append(f"Left behind: {', '.join(left[:4])}.")
    gap = None if probes is None else probe_difference(plain, tokenizer, probes.prompts, probes.base)
    bad_probe = probes is not None and (gap is None or not gap <= PROBE_TOLERANCE)
    if bad_probe:
        why = "are not there to be compared" if gap is None else "do not give the base's logits"
        reasons.append(f"The probe prompts {why}.")
    if live.verdict == "changed" or left or (bad_probe and live.verdict == "cannot tell"):
        verdict = "changed"
    elif bad_probe or live.verdict == "cannot tell" or live.digest != live.checkpoint_digest:
        verdict = "cannot tell"  # equal weights with other logits: other code, other dtype, a hook
    else:
        verdict = "removed"
    report = RemovalReport(
        verdict, names, live.checkpoint_digest, live.digest, live.n_tensors, live.changed, left, merged,
        gap if gap is None or math.isfinite(gap) else None, PROBE_TOLERANCE, reasons, quantized=_held(live, plain),
    )  # fmt: skip
    return plain, report


def take_one_off(model: Any, base_dir: Path, names: Sequence[str]) -> RemovalReport:
    """Take `names` off a stack that goes on without them, and prove it: nothing of them is left, the base under the others
    has the bytes of its files, and no factor of the others has changed. (Logits would prove nothing here: no manifest
    stores those of this combination.)

    Raises:
        UserError: the adapters are merged into this model. Never for a failed proof.
    """
    if merged := _merged(model):
        raise UserError(
            f"The adapters are merged into {len(merged)} modules of this model, and taking one out of rounded sums does not "
            "give the others back. Load the base and the other adapters anew."
        )
    before = _others(model, names)
    left = [rest for name in names for rest in detach(model, name)]
    moved = sorted(n for n, t in _others(model, names).items() if not torch.equal(t, before.get(n, t.new_empty(0))))
    live = digest_live(model, base_dir)
    reasons = [live.reason] if live.reason else []
    if left:
        reasons.append(f"Left behind: {', '.join(left[:4])}.")
    if moved:
        reasons.append(f"Factors of other adapters changed: {', '.join(moved[:4])}.")
    bad = live.verdict == "changed" or left or moved
    same = live.verdict == "same" and live.digest == live.checkpoint_digest
    return RemovalReport(
        "changed" if bad else "removed" if same else "cannot tell", list(names), live.checkpoint_digest, live.digest,
        live.n_tensors, live.changed, left, [], None, PROBE_TOLERANCE, reasons, list(model.peft_config), _held(live, model),
    )  # fmt: skip


def _others(model: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of the factors of every adapter but `names`; wrappers that go away with one are not part of a key."""
    kept = [n for n in model.peft_config if n not in names]
    return {
        key.replace(".base_layer", ""): p.detach().clone()
        for key, p in model.named_parameters()
        if any(belongs(key, n) for n in kept)
    }


def _held(live: LiveDigest, model: Any) -> str | None:
    return name_of(options_of(model)) if live.requantized else None


def _merged(model: Any) -> list[str]:
    return [n for n, m in adapter_modules(model).items() if getattr(m, "merged", False)]


def _soft(model: Any) -> bool:
    """Whether what is on the model is a soft prompt, which stands beside its modules."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def unload(model: Any) -> Any:
    """The base model inside `model` with PEFT's modules taken out and its marks wiped."""
    if _soft(model):
        return model.get_base_model()
    from ..tuners.expert_lora.layer import TunerLayer

    for name, layer in adapter_modules(model).items():
        if isinstance(layer, TunerLayer):  # PEFT would move a `.weight` about, and fused experts have none
            model.set_submodule(name, layer.base_layer)
    plain = model.unload() if hasattr(model, "unload") else model.base_model.unload()
    for holder in (plain, getattr(plain, "model", None)):
        if holder is not None and "peft_config" in vars(holder):
            del holder.peft_config
    if getattr(plain, "_hf_peft_config_loaded", False):
        plain._hf_peft_config_loaded = False
    return plain
