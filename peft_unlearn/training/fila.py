"""FILA: a LoRA that starts where the forget set matters and the retain set does not (``adapter.init_lora_weights: fila``).

Fisher information of both sets, F_f and F_r, gives each weight a relative importance I = F_f / (F_r + eps), each row of W a weight
rho_i = sqrt(sum_j I_ij), and the best rank-r approximation U S V^T of diag(rho) W a start

    A0 = sqrt(S / s) V^T        B0 = diag(1 / (rho + eps)) U sqrt(S / s)        (s: the scaling of the LoRA)

The released code takes s B0 A0 out of W, so that the start changes nothing. Here the base stays as it is: the LoRA has twice the rank,
[A; A0] and [B, -B0], whose second half never moves. It is an ordinary LoRA at every step: with the adapter off the model is the base (as a
reference, and for whoever takes it off), and what is saved loads anywhere. Gradients of the second half are masked, not left out, so rules
and logs that look at norms see them too.

Source: Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs (LoKU), arXiv 2408.06621, csm9493/efficient-llm-unlearning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..attribution.streamed import Rows, eligible, gradients, scored
from ..data.collate import padding_id
from ..errors import Errors, UserError
from ..folder.digest import adapter_modules, name_in_base
from ..gradients.terms import Term
from ..progress import Progress
from ..registry import Source
from .config import encode_set

SOURCE = Source(
    "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs (LoKU)",
    "https://arxiv.org/abs/2408.06621",
    2025,
)
NAME, EPS = "fila", 1e-5
_ODD = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters", "negate")


def understood(adapter: dict[str, Any], errors: Errors) -> bool:
    """Whether a recipe's ``adapter`` starts by FILA; what PEFT is told of it instead is put into `adapter`."""
    if adapter.get("init_lora_weights") != NAME:
        return False
    del adapter["init_lora_weights"]
    if str(adapter.get("type", "lora")).lower() != "lora":
        errors.add(f"adapter.init_lora_weights {NAME} is a start of LoRA, not of {adapter['type']}")
        return False
    for key in _ODD:
        if adapter.get(key):
            errors.add(
                f"adapter.{key}: init_lora_weights {NAME} is known for one rank and plain scaling on linear layers only"
            )
    for key, default in (("r", 16), ("lora_alpha", 32)):
        if isinstance(value := adapter.get(key, default), int | float):
            adapter[key] = 2 * value  # the scaling stays
    return True


def start(
    model: Any,
    adapter: str,
    forget: Rows,
    retain: Rows,
    *,
    pad_id: int = 0,
    size: int = 2,
    progress: Progress | None = None,
) -> dict[Tensor, Tensor]:
    """Give a fresh LoRA of even rank 2r its start; returns parameter -> which of it may move (the first half).

    Args:
        size: rows of the micro-batches whose squared gradients are averaged (2 in the released code).

    Raises:
        UserError: no retain rows, or a layer that is no LoRA on a linear one.
    """
    if not retain:
        raise UserError(f"adapter.init_lora_weights {NAME} compares with the retain set, and the data have none")
    layers = {
        name_in_base(n): m for n, m in adapter_modules(model).items() if hasattr(m, "lora_A") and adapter in m.lora_A
    }
    weights = eligible(model, list(layers))
    nll = registry.get("objective", "nll")
    with scored(model, weights):
        fisher = [
            gradients(
                model, weights, rows, Term(name, name, nll), pad_id=pad_id, size=size, squared=True, progress=progress
            )
            for name, rows in (("forget", forget), ("retain", retain))
        ]
    masks: dict[Tensor, Tensor] = {}
    for name, layer in layers.items():
        weight, (f, r) = f"{name}.weight", (x[f"{name}.weight"] for x in fisher)
        turned = bool(getattr(layer, "fan_in_fan_out", False))  # Conv1D keeps (in, out)
        w, f, r = (x.T if turned else x for x in (weights[weight].detach().float(), f, r))
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        half = a.shape[0] // 2
        first = factors(w, f / (r + EPS), half, layer.scaling[adapter])
        with torch.no_grad():
            a.copy_(torch.cat([first[0], first[0]]))
            b.copy_(torch.cat([first[1], -first[1]], 1))
        ahead = torch.arange(2 * half, device=a.device) < half
        masks |= {a: ahead[:, None].expand(a.shape), b: ahead[None].expand(b.shape)}
    return masks


def begun(run: Any, model: Any, tokenizer: Any, adapter: str = "default") -> dict[Tensor, Tensor]:
    """`start` by the rows of a run."""
    from ..progress import bars

    forget, retain = (
        encode_set(run.config, run.data, n, tokenizer) if run.data.rows(n) else [] for n in ("forget", "retain")
    )
    with bars() as progress:
        return start(model, adapter, forget, retain, pad_id=padding_id(tokenizer), progress=progress)


def factors(w: Tensor, importance: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A0 (r, in), B0 (out, r)) of a weight (out, in) by the importance of its entries; scaling * B0 A0 is what FILA takes out of it."""
    rho = importance.sum(1).sqrt()  # (out,)
    u, s, vt = torch.linalg.svd(rho[:, None] * w, full_matrices=False)
    if rank > len(s):
        raise UserError(f"adapter.r: {NAME} wants rank {rank} of a weight that has {len(s)} at most")
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vt[:rank], (u[:, :rank] * root) / (rho[:, None] + EPS)
