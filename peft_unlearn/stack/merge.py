"""Writing an adapter into its base's weights, in float32 with one cast, and saying what that cast kept.

W' = cast(W + s B A). Rounding to a short dtype can swallow a small delta whole: what was kept is cast(W + D) -
cast(W), and the table gives, per layer, its cosine with the wanted D and the share of weights that changed at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..folder.atomic import staged
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.digest import adapter_modules, digest_checkpoint, digest_live
from ..folder.read import AdapterFolder, read_adapter
from .model import attach, check_base
from .removal import unload

MIN_COSINE = 0.9
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LayerMerge:
    """One layer. cosine: of the kept delta with the wanted one, None where none was wanted; relative: |D| / |W|."""

    name: str
    cosine: float | None
    changed: float
    relative: float


@dataclass
class MergeReport:
    out: str
    dtype: str
    scale: float
    layers: list[LayerMerge] = field(default_factory=list)
    digest: str | None = None

    @property
    def worst_cosine(self) -> float | None:
        return min((row.cosine for row in self.layers if row.cosine is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "worst_cosine": self.worst_cosine}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.layers), default=5)
        head = f"{'layer':<{width}}  cosine  changed  |D|/|W|"
        rows = [
            f"{r.name:<{width}}  {'  none' if r.cosine is None else f'{r.cosine:6.4f}'}  {r.changed:6.1%}  "
            f"{r.relative:8.2e}"
            for r in self.layers
        ]
        return "\n".join([f"merged in float32, stored as {self.dtype}, scale {self.scale:g}", head, *rows])


class MergeRefused(UserError):
    """The cast would lose too much of the adapter; `report` holds the table."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


def merge(
    adapter_dir: str | Path,
    base_dir: str | Path | None = None,
    out: str | Path = "",
    dtype: str = "float32",
    scale: float | None = None,
    min_cosine: float = MIN_COSINE,
) -> MergeReport:
    """Write base + adapter as a plain model to `out` (atomically), loadable by AutoModelForCausalLM.

    base_dir: default the manifest's base. scale: default the manifest's. Raises `MergeRefused` if the kept delta of any
    layer has a cosine under `min_cosine` with the wanted one, `UserError` for adapters that are not
    a plain sum W + s B A.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}.")
    if not str(out):
        raise UserError("merge: say where to write the merged model (--out).")
    folder = read_adapter(adapter_dir)
    strength = float(folder.manifest.scale if scale is None else scale)
    _refuse_unmergeable(folder)
    ref = folder.manifest.base
    base_path = resolve_base(ref.ref, override=base_dir, revision=ref.revision)
    check_base(folder, base_path, digest_checkpoint(base_path))
    report = MergeReport(str(out), dtype, strength)
    with staged(out, lambda _: "is not empty, and a merged model never replaces anything") as stage:
        model = attach(load_base(base_path, torch.float32), {"default": folder})
        with torch.no_grad():
            for name, layer in _lora_layers(model):
                report.layers.append(_merge_layer(name, layer, strength, _DTYPES[dtype]))
        _refuse_lossy(report, min_cosine)
        plain = unload(model).to(_DTYPES[dtype])
        plain.save_pretrained(str(stage))
        load_tokenizer(folder.path, base_path).save_pretrained(str(stage))
        _scrub(stage / "config.json")
        proof = digest_live(plain, stage)
        if proof.verdict == "changed":
            raise RuntimeError(f"{stage}: the files written are not what is in memory: {proof.reason}")
        report.digest = proof.checkpoint_digest
    return report


def _refuse_unmergeable(folder: AdapterFolder) -> None:
    config = folder.config
    kind = config["peft_type"]
    if kind != "LORA":
        raise UserError(
            f"{folder.path}: merging adapters of type {kind} is not supported; only LORA is a sum of weights."
        )
    for key, what in (
        ("use_dora", "DoRA"), ("lora_bias", "a LoRA bias"), ("modules_to_save", "fully trained modules"),
        ("target_parameters", "fused expert parameters"), ("trainable_token_indices", "trained token embeddings"),
        ("use_qalora", "QALoRA"), ("alora_invocation_tokens", "activated LoRA"),
    ):  # fmt: skip
        if config.get(key):
            raise UserError(
                f"{folder.path}: has {what} ({key}), which is not a plain sum of weights; merging it is not supported."
            )
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder.path}: trains biases (bias: {config['bias']}); merging it is not supported.")


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    storages: dict[int, str] = {}
    layers = {n: m for n, m in adapter_modules(model).items() if hasattr(m, "get_delta_weight")}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        other = storages.setdefault(tensor.data_ptr(), name)
        if other != name and any(n in (o.rsplit(".base_layer.", 1)[0]) for n in layers for o in (name, other)):
            raise UserError(
                f"The adapted weight {name.removeprefix('base_model.model.')} is tied to "
                f"{other.removeprefix('base_model.model.')}: merging into one would change both."
            )
    for name, layer in layers.items():
        yield name.removeprefix("base_model.model."), layer


def _merge_layer(name: str, layer: Any, scale: float, dtype: torch.dtype) -> LayerMerge:
    weight = layer.base_layer.weight
    wanted = layer.get_delta_weight("default").float() * scale
    merged = (weight + wanted).to(dtype)
    if not torch.isfinite(merged).all():
        raise UserError(f"{name}: the merged weight does not fit {str(dtype).removeprefix('torch.')}; use float32.")
    start = weight.to(dtype)
    kept = merged.double() - start.double()
    wide = wanted.double()
    size = wide.norm()
    cosine = None
    if size > 0:
        lost = kept.norm()
        cosine = float((kept * wide).sum() / (size * lost)) if lost > 0 else 0.0
    row = LayerMerge(name, cosine, float((merged != start).double().mean()), float(size / weight.double().norm()))
    weight.copy_(merged.float())
    return row


def _refuse_lossy(report: MergeReport, min_cosine: float) -> None:
    worst = report.worst_cosine
    if worst is None or worst >= min_cosine:
        return
    bad = [r for r in report.layers if r.cosine is not None and r.cosine < min_cosine]
    raise MergeRefused(
        f"Merging as {report.dtype} would lose the adapter: in {len(bad)} of {len(report.layers)} layers the "
        f"kept change has a "
        f"cosine under {min_cosine:g} with the wanted one (worst {worst:.2f}, {bad[0].name}); nothing was written.\n"
        f"{report}\nWays out: --dtype float32; a larger --scale; or serve the adapter unmerged on the base.",
        report,
    )


def _scrub(config_path: Path) -> None:
    """No machine path in the merged model's configuration."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if "_name_or_path" in config:
        del config["_name_or_path"]
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
