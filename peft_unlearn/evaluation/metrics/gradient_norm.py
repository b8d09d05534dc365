"""The norm of the loss's gradient, row by row: what the GradNorm attack looks at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np

from ...registry import Range
from ..provider import Context, provider
from ..shapes import Measured, Plan
from ..teacher import evaluating, pad_id_of


@provider("gradient_norm")
def gradient_norm(
    model: Any, plan: Plan, measured: Measured, context: Context, *, p: Annotated[float, Range(1.0)] = 2.0
) -> dict[str, dict[str, Any]]:
    """(rows,) mean over weight tensors of the p-norm of d(mean negative log-probability of the answer) / d(weights).

    The tensors are those of the model under its adapters: a LoRA adapter only adds to them, so their gradient is that of the
    merged weights, and base, adapter and retain model are compared over the same tensors. One forward and backward for each row.
    """
    import torch

    from ...data.collate import pad
    from ...forward import Pass

    pairs = sorted({i for s in context.sets.values() for i in s.answer})
    device = model.get_input_embeddings().weight.device
    norms: dict[int, float] = {}
    with evaluating(model), _weights(model) as weights, torch.enable_grad():
        for done, i in enumerate(pairs, 1):
            batch = {k: v.to(device) for k, v in pad([plan.encoded[i]], pad_id_of(plan.tokenizer)).items()}
            found = torch.autograd.grad(-Pass(model, batch).logp.mean(), weights, allow_unused=True)
            norms[i] = float(torch.stack([g.float().norm(p) for g in found if g is not None]).mean())
            if context.progress is not None and (done % 50 == 0 or done == len(pairs)):
                context.progress("gradient norms", done, len(pairs))
    return {"gradient_norm": {name: np.array([norms[i] for i in s.answer]) for name, s in context.sets.items()}}


@contextmanager
def _weights(model: Any) -> Iterator[list[Any]]:
    """The weights under the adapters, trainable inside; every flag as before afterwards."""
    from ...folder.digest import base_tensors

    base = {id(t) for t in base_tensors(model).values()}  # tied weights once
    flags = [(q, q.requires_grad) for q in model.parameters()]
    wanted = [q for q in model.parameters() if q.is_floating_point() and id(q) in base]
    try:
        for q, _ in flags:
            q.requires_grad_(False)
        for q in wanted:
            q.requires_grad_(True)
        yield wanted
    finally:
        for q, flag in flags:
            q.requires_grad_(flag)
