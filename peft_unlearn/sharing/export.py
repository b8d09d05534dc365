"""An adapter as other programs want it: the same numbers, without what they would read wrongly.

Servers read of a LoRA its tensors, ``r`` and ``lora_alpha``. They do not know forget.json, and some pass over `rank_pattern` and
`alpha_pattern` without a word, which is another scale than the one that was measured. So the exported form holds everything
in the tensors: one rank, alpha = r, all scaling multiplied into B.

Layouts: what vLLM's loader accepts (vllm/lora/peft_helper.py, lora_model.py of vllm-project/vllm) and what SGLang's reads
(python/sglang/srt/lora of sgl-project/sglang); mergekit takes ``BASE+ADAPTER`` as a model (https://github.com/arcee-ai/mergekit).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError, nearest
from ..folder.atomic import staged
from ..folder.base import resolve_base
from ..folder.fetch import resolve_adapter
from ..folder.read import CONFIG, WEIGHTS, AdapterFolder, read_adapter, read_json
from ..folder.yaml_io import dump_yaml
from ..reporting.result import Result
from .gguf import FILE, write_gguf

TARGETS = ("vllm", "sglang", "mergekit", "gguf")
NAMES = re.compile(r"base_model\.model\.[\w.]+\.(lora_[AB]\.weight|lora_embedding_[AB])")
"""What a tensor of a served adapter may be called: vLLM's parse_fine_tuned_lora_name takes no other ending."""


@dataclass(frozen=True)
class Exported(Result):
    """What was written. rank: of every module. scale: what B is multiplied with. use: how to put it to work."""

    out: str
    target: str
    rank: int
    scale: float
    tensors: int
    use: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.out}: {self.tensors} tensors of rank {self.rank}, scale {self.scale:g} multiplied in, for {self.target}"
        return "\n".join([head, *(f"  {line}" for line in self.use)])


def export(
    folder: str | Path, out: str | Path, target: str, scale: float | None = None, base: str | None = None
) -> Exported:
    """Write `folder` to `out` in the form that `target` (one of `TARGETS`) reads; plain PEFT reads it too, to the same effect.

    Args:
        scale: to multiply in, default the manifest's.
        base: what mergekit puts it on, default the manifest's Hub id; for gguf the base whose family is meant, default the manifest's.

    Raises:
        UserError: an adapter that is not a plain sum, or has parts that the target would pass over or take for something else.
    """
    if target not in TARGETS:
        raise UserError(f"export --for {target!r}: expected one of {', '.join(TARGETS)}.{nearest(target, TARGETS)}")
    found = read_adapter(resolve_adapter(folder))
    if found.manifest.depends_on:
        raise UserError(
            f"{found.path}: was trained on top of other adapters ({', '.join(d[:19] for d in found.manifest.depends_on)}), and "
            f"{target} would run it without them; make one of all with peft-unlearn compose, and export that"
        )
    from ..tuners.delta import is_sparse

    if is_sparse(found):
        raise UserError(
            f"{found.path}: is a sparse adapter ({found.config['peft_type']}), and {target} reads LoRA alone; merge it into its base "
            "(peft-unlearn merge), and use that"
        )
    scale = float(found.manifest.scale if scale is None else scale)
    tensors, rank, leaves, parameters = _tensors(found, scale, target)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": found.config.get("base_model_name_or_path") or "",
        "revision": found.config.get("revision"),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": leaves,
        "target_parameters": parameters or None,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": bool(found.config.get("fan_in_fan_out")),
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    from safetensors.torch import save_file

    family = _family(found, base) if target == "gguf" else {}
    with staged(out, lambda _: "is not empty, and an export never replaces anything") as stage:
        if target == "gguf":
            write_gguf(stage / FILE, tensors, rank, family, found.manifest.name or found.path.resolve().name)
            return Exported(str(out), target, rank, scale, len(tensors), _use(target, str(out), rank, parameters))
        save_file(tensors, str(stage / WEIGHTS), metadata={"format": "pt"})
        (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if target == "mergekit":
            (stage / "mergekit.yaml").write_text(_mergekit(found, Path(out), base), encoding="utf-8")
    return Exported(str(out), target, rank, scale, len(tensors), _use(target, str(out), rank, parameters))


def _tensors(found: AdapterFolder, scale: float, target: str) -> tuple[dict[str, Any], int, list[str], list[str]]:
    """Factors by the names they have on disk, all of one rank, B times s; leaf names of modules; paths of fused parameters."""
    import torch

    from ..tuners.delta import Deltas

    deltas, errors = Deltas(found), Errors()
    rank = max(row.rank for row in deltas.adapted.values())
    fused = {row.module for row in deltas.adapted.values() if row.experts > 1}
    tensors: dict[str, torch.Tensor] = {}
    for weight, row in deltas.adapted.items():
        if row.kind == "parameter" and row.experts == 1:
            errors.add(f"{weight} (a trained router) has no place in a served LoRA")
        if row.experts > 1 and target == "mergekit":
            errors.add(f"{weight} is a stack of experts, which mergekit's models hold one by one")
        if target == "vllm" and row.module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            errors.add(f"{weight} is an embedding, on which vLLM takes no adapter for most families")
        if target == "gguf" and (row.experts > 1 or row.kind == "embedding"):
            errors.add(f"{weight} is a stack of experts or an embedding, whose adapters are not written as GGUF here")
        if row.experts > 1 and row.rank != rank:
            errors.add(f"{weight} has rank {row.rank}, others {rank}; stacks of experts cannot be filled up")
        a, b, s = deltas.factors(weight)
        if row.experts == 1:
            a = torch.cat([a, a.new_zeros(rank - row.rank, *a.shape[1:])])  # (rank, in)
            b = torch.cat([b, b.new_zeros(b.shape[0], rank - row.rank, *b.shape[2:])], 1)  # (out, rank)
        tensors[row.a.name], tensors[row.b.name] = a.contiguous(), (b * (s * scale)).contiguous()
    for module in sorted(fused):
        # there the innermost pair means gate_up_proj and the outermost down_proj: one alone would be taken for the other
        if sum(row.module == module for row in deltas.adapted.values()) != 2:
            errors.add(f"{module}: only one of its two stacks is adapted, and servers need both to know which is which")
    if odd := [n for n in tensors if not NAMES.fullmatch(n)]:
        errors.add(f"{len(odd)} tensors have names that servers do not know, first {odd[0]!r}")
    errors.raise_if_any(f"{found.path} cannot be served by {target} as an adapter; merge it (peft-unlearn merge)")
    leaves = sorted({row.module.rpartition(".")[2] for row in deltas.adapted.values() if row.kind != "parameter"})
    parameters = [w for w, row in deltas.adapted.items() if row.kind == "parameter"]
    return tensors, rank, leaves, parameters


def _family(found: AdapterFolder, base: str | None) -> dict[str, Any]:
    """config.json of the base, which says how llama.cpp holds its weights."""
    ref = found.manifest.base
    return read_json(resolve_base(ref.ref, override=base, revision=ref.revision) / "config.json")


def _mergekit(found: AdapterFolder, out: Path, base: str | None) -> str:
    """A configuration that adds the adapter's task vector to its base, `normalize: false`, so that weights mean what they say."""
    ref = found.manifest.base
    known = None if ref.ref.startswith(("embedded:", "local:")) else f"{ref.ref}@{ref.revision}"
    on = base or known
    if on is None:
        raise UserError(f"{found.path}: mergekit needs the place of the base, which is on no Hub; name it with --base.")
    config = {
        "merge_method": "task_arithmetic",
        "base_model": on,
        "models": [{"model": f"{on}+{out}", "parameters": {"weight": 1.0}}],
        "parameters": {"normalize": False},
        "dtype": "float32",
    }
    return dump_yaml(config, "mergekit.yaml")


def _use(target: str, out: str, rank: int, parameters: list[str]) -> list[str]:
    check = f"then: peft-unlearn verify DIR --server http://localhost:{30000 if target == 'sglang' else 8000} --served-as forget"
    if target == "vllm":
        allowed = next((k for k in (8, 16, 32, 64, 128, 256, 320, 512) if k >= rank), rank)
        line = f"vllm serve BASE --enable-lora --max-lora-rank {allowed} --lora-modules forget={out}"
        return [line, *(["experts: only with a vLLM whose model takes fused expert LoRA"] if parameters else []), check]
    if target == "sglang":
        return [f"python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths forget={out}", check]
    if target == "gguf":
        return [
            f"llama-server -m BASE.gguf --lora {out}/{FILE}",
            'dial it: POST /lora-adapters [{"id": 0, "scale": 0.5}]; scale 0 takes it off, for one request too ("lora" in its body)',
        ]
    return [
        f"mergekit-yaml {out}/mergekit.yaml MERGED --lora-merge-dtype float32",
        "without that flag the adapter is rounded to the base's dtype on the way; weight -1 in the file does the opposite",
    ]
