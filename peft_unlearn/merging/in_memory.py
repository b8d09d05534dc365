"""The merge that builds the model: for layouts whose way back to the files is not known. Same arithmetic, more memory.

PEFT's own merge does not serve here: it writes over W, so that what the cast keeps of D, which the table and the refusal are
made of, could be had from a second copy of the model only; and it rounds to the nearest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..folder.atomic import staged
from ..folder.base import load_base, load_tokenizer
from ..folder.digest import digest_checkpoint, digest_live
from ..folder.merge_record import write_record
from .layout import Unit
from .report import Job
from .rounding import DTYPES, Adder, Overflow, Sums, blocks, generator
from .sidecars import scrub, write_processor
from .stage import KEEP
from .stream import Overlay, empty_table, wide_patterns


def merge_in_memory(job: Job, passes: Callable[[Path], None]) -> None:
    """As the streamed merge, through the model in float32."""
    job.was_read(digest_checkpoint(job.base_path))
    with staged(job.out, lambda _: KEEP) as stage:
        model = load_base(job.base_path, torch.float32, job.targets)
        overlay = job.overlay(model)
        dtype = DTYPES[job.dtype]
        wide = wide_patterns(model, dtype)
        sums = empty_table(overlay.units())
        for unit in [(w, e) for w, experts in overlay.units().items() for e in experts]:
            kind = torch.float32 if any(p.search(unit[0]) for p in wide) else dtype
            _add(model, unit, overlay, kind, job, sums[unit])
        job.account(sums)
        _cast(model, dtype, wide)
        model.save_pretrained(str(stage))
        if (tokenizer := load_tokenizer(*job.tokenizers)) is not None:  # an image classifier has none
            tokenizer.save_pretrained(str(stage))
        write_processor(stage, job.base_path)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            scrub(stage / name)
        proof = digest_live(model, stage)
        if proof.verdict == "changed":
            raise RuntimeError(f"{stage}: the files written are not what is in memory: {proof.reason}")
        job.report.digest = proof.checkpoint_digest
        write_record(stage, job.record())
        del model
        passes(stage)


@torch.no_grad()
def _add(model: Any, unit: Unit, overlay: Overlay, dtype: torch.dtype, job: Job, sums: Sums) -> None:
    """Add a unit's delta to the model, rounded to `dtype`."""
    weight, expert = unit
    left, right = overlay.product(weight, expert) or (None, None)
    assert left is not None
    parameter = model.get_parameter(weight)
    matrix = parameter if expert is None else parameter[expert]
    matrix = matrix.view(matrix.shape[0], -1)
    rng = generator(job.seed, f"{weight}[{expert}]") if job.rounding == "stochastic" else None
    adder = Adder(dtype)
    for part in blocks(*matrix.shape):
        out = torch.empty(matrix[part].shape, dtype=dtype)
        try:
            sums.add(adder(matrix[part], left[part], right, out, rng))
        except Overflow:
            raise UserError(f"{weight}: the merged weight does not fit {_name(dtype)}; use float32.") from None
        matrix[part] = out.float()


def _cast(model: Any, dtype: torch.dtype, wide: list[Any]) -> None:
    """Every float tensor to `dtype`, but those that the class keeps in float32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or any(p.search(name) for p in wide):
            continue
        cast = tensor.data.to(dtype)
        if not torch.isfinite(cast).all() and torch.isfinite(tensor.data).all():
            raise UserError(f"{name}: the base's weight does not fit {_name(dtype)}; use float32.")
        tensor.data = cast
    model.config.dtype = dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
