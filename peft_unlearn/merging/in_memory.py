"""The merge that builds the model: for layouts whose way back to the files is not known. Same arithmetic, more memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..folder.atomic import staged
from ..folder.base import load_base, load_tokenizer
from ..folder.digest import digest_checkpoint, digest_live
from ..folder.merge_record import write_record
from ..stack.fits import check_base
from .job import Job, refuse_tied
from .report import MergeReport, refuse_lossy, table
from .rounding import DTYPES, Adder, Overflow, Sums, blocks, generator
from .sidecars import scrub
from .stream import Overlay, Unit, wide_patterns


def merge_in_memory(job: Job, min_cosine: float) -> MergeReport:
    """As `merge.merge`, through the model in float32."""
    report = job.report()
    report.base_digest = digest_checkpoint(job.base_path)
    if job.expected is not None:
        for folder in job.folders.values():
            check_base(folder, job.base_path, report.base_digest)
    with staged(job.out, lambda _: "is not empty, and a merged model never replaces anything") as stage:
        model = load_base(job.base_path, torch.float32)
        overlay = job.overlay(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for weight in overlay.units():
            tied = (n for n, p in parameters.items() if n != weight and p is parameters[weight])
            refuse_tied(weight, next(tied, None))
        dtype = DTYPES[job.dtype]
        wide = wide_patterns(model, dtype)
        seed = job.seed if job.rounding == "stochastic" else None
        units: dict[Unit, Sums] = {}
        with torch.no_grad():
            for weight, experts in overlay.units().items():
                kind = torch.float32 if any(p.search(weight) for p in wide) else dtype
                _add(parameters[weight], weight, experts, overlay, kind, seed, units)
        report.layers = table(units)
        refuse_lossy(report, min_cosine)
        _cast(model, dtype, wide)
        model.save_pretrained(str(stage))
        load_tokenizer(*job.tokenizers).save_pretrained(str(stage))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            scrub(stage / name)
        proof = digest_live(model, stage)
        if proof.verdict == "changed":
            raise RuntimeError(f"{stage}: the files written are not what is in memory: {proof.reason}")
        report.digest = proof.checkpoint_digest
        write_record(stage, job.record(report))
    return report


def _add(
    parameter: nn.Parameter, weight: str, experts: list[int], overlay: Overlay, dtype: torch.dtype, seed: int | None,
    units: dict[Unit, Sums],
) -> None:  # fmt: skip
    fused = any(d.adapted[weight].fused for d, _ in overlay.parts if weight in d)
    if not experts:
        units[weight, None] = Sums()
    adder = Adder(dtype)
    for e in experts:
        unit = (weight, e if fused else None)
        product = overlay.product(*unit)
        assert product is not None
        left, right = product
        assert right is not None
        matrix = (parameter[e] if fused else parameter).flatten(1)
        rng = None if seed is None else generator(seed, f"{weight}[{unit[1]}]")
        for part in blocks(*matrix.shape):
            out = torch.empty(matrix[part].shape, dtype=dtype)
            try:
                sums = adder(matrix[part], left[part], right, out, rng)
            except Overflow:
                kind = str(dtype).removeprefix("torch.")
                raise UserError(f"{weight}: the merged weight does not fit {kind}; use float32.") from None
            matrix[part] = out.float()
            units.setdefault(unit, Sums()).add(sums)


def _cast(model: Any, dtype: torch.dtype, wide: list[Any]) -> None:
    """Every float tensor to `dtype`, but those that the class keeps in float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or any(p.search(name) for p in wide):
            continue
        cast = tensor.data.to(dtype)
        if not torch.isfinite(cast).all() and torch.isfinite(tensor.data).all():
            raise UserError(f"{name}: the base's weight does not fit {str(dtype).removeprefix('torch.')}; use float32.")
        tensor.data = cast
    model.config.dtype = dtype
