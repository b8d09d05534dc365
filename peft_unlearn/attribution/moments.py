"""What adapted modules read: second moments of their inputs, and taking out of A what acts on the dominant ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..folder.digest import adapter_modules, name_in_base
from ..forward import adapters_off
from ..head import held
from ..progress import Progress
from ..tuners.expert_lora.blocks import is_llama4
from ..tuners.expert_lora.layer import PROJECTIONS, ExpertsLayer, RouterLayer
from .streamed import batches

EXACT, KEPT = 1024, 256
"""Modules of at most `EXACT` inputs have their whole second moment taken; of wider ones the `KEPT` strongest directions."""
NAME = "default"
Key = tuple[str, str | None, int]  # module, of experts the projection, which expert


def factors(model: Any) -> Iterator[tuple[Key, Tensor, Tensor | None]]:
    """(where, A (r, in), B (out, r)) of every adapted weight as views of the model's own; a whole router delta has no B.

    Raises:
        UserError: an adapted layer that is no linear one.
    """
    from peft.tuners.lora.layer import Linear

    for name, layer in adapter_modules(model).items():
        if isinstance(layer, ExpertsLayer):
            for p in PROJECTIONS:
                for j, e in enumerate(layer.experts[NAME]):
                    a, b = (layer._factors(f"{p}_{f}")[NAME][j] for f in "AB")
                    yield (name, p, e), a, b
        elif isinstance(layer, RouterLayer):
            whole = NAME in layer._factors("router_delta")
            a = layer._factors("router_delta" if whole else "router_A")[NAME]
            yield (name, None, 0), a, None if whole else layer._factors("router_B")[NAME]
        elif isinstance(layer, Linear) and NAME in layer.lora_A:
            a, b = (f[NAME].get_parameter("weight") for f in (layer.lora_A, layer.lora_B))
            yield (name, None, 0), a, b
        else:
            raise UserError(
                f"the adapter is on {name_in_base(name)} ({type(layer).__name__}), and only linear layers and experts have an input "
                "that a part of the delta can be taken from; sanitize refuses the whole, since the rest would still act"
            )


class Moment:
    """The second moment of vectors of one width: whole, or its strongest directions where it is wide."""

    def __init__(self, width: int) -> None:
        self.width, self.n, self.trace = width, 0, 0.0
        self.total: Any = 0  # (width,), the sum of the vectors
        self.seen: Tensor | None = None  # (width, width), or rows whose second moment it is

    def add(self, x: Tensor) -> None:
        """x (tokens, width)."""
        x = x.float()
        self.n, self.trace = self.n + len(x), self.trace + float(x.square().sum())
        self.total = self.total + x.sum(0)
        if self.width <= EXACT:
            self.seen = x.T @ x if self.seen is None else self.seen.addmm_(x.T, x)
            return
        self.seen = x if self.seen is None else torch.cat([self.seen, x])
        if len(self.seen) > 2 * KEPT:
            _, s, v = torch.linalg.svd(self.seen, full_matrices=False)
            self.seen = s[:KEPT, None] * v[:KEPT]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(l (k,) in units of the mean eigenvalue, V (k, width)), float32."""
        assert self.seen is not None
        if self.width <= EXACT:
            energy, v = torch.linalg.eigh(self.seen.double())
            energy, v = energy.clamp_min(0), v.T
        else:
            _, s, v = torch.linalg.svd(self.seen, full_matrices=False)
            energy = s.square()
        return (energy * (self.width / max(self.trace, 1e-30))).float(), v.float()


@torch.no_grad()
def activations(model: Any, rows: Any, pad_id: int = 0, progress: Progress | None = None) -> dict[Key, Moment]:
    """What each adapted module reads on these encoded rows with the adapter off; experts by the tokens routed to them."""
    out: dict[Key, Moment] = {}
    last: list[Any] = [None, None]  # q, k and v read one and the same tensor

    def linear(name: str):
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if last[0] is not args[0]:
                last[:] = args[0], out.setdefault((name, None, 0), Moment(args[0].shape[-1]))
                last[1].add(args[0].reshape(-1, args[0].shape[-1]))
            out[name, None, 0] = last[1]

        return hook

    def experts(name: str):
        def hook(layer: Any, args: tuple[Any, ...]) -> None:
            for e, p, x in _routed(layer, *args):
                out.setdefault((name, p, e), Moment(x.shape[-1])).add(x)

        return hook

    layers = adapter_modules(model)
    hooks = [
        m.register_forward_pre_hook((experts if isinstance(m, ExpertsLayer) else linear)(n)) for n, m in layers.items()
    ]
    parts = batches(rows, "rows", pad_id, 16, next(model.parameters()).device, padded=False)
    with held(*hooks), adapters_off(model):
        for i, part in enumerate(parts):
            batch = part["rows"]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            if progress is not None:
                progress("activations", i + 1, len(parts))
    return out


def _routed(layer: ExpertsLayer, hidden: Tensor, *routing: Tensor) -> Iterator[tuple[int, str, Tensor]]:
    """(expert, projection, its inputs (tokens, in)) of the adapted experts that a token is routed to, the adapter off."""
    base: Any = layer.get_base_layer()
    for e in layer.experts[NAME]:
        if is_llama4(layer):
            x = hidden.view(layer.num_experts, -1, hidden.shape[-1])[e]
            x = x[(x != 0).any(-1)]
        else:
            x = hidden[(routing[0] == e).any(-1)]
        if len(x):
            yield e, "gate_up", x
            y = layer._project(x, "gate_up", e, [])
            gate, up = y.chunk(2, dim=-1)
            yield e, "down", up * base.act_fn(gate) if is_llama4(layer) else base._apply_gate(y)


@torch.no_grad()
def project(a: Tensor, b: Tensor | None, moment: Moment, strength: float) -> Tensor:
    """Change A in place; [|D|^2 before, after, tr(D C D^T) before, after], float64."""
    energy, v = moment.spectrum()
    old, energy, v = a.float(), energy.to(a.device), v.to(a.device)
    share = (1 / (1 + 1 / (strength * energy))) if strength < float("inf") else (energy > 1e-6).float()
    new = old - ((old @ v.T) * share) @ v
    root = v.T * energy.sqrt()  # (in, k)
    sizes = torch.stack([square(x, b) for x in (old, new, old @ root, new @ root)])
    a.copy_(new)
    return sizes


def square(a: Tensor, b: Tensor | None) -> Tensor:
    """|B A|^2, from the factors' Gram matrices."""
    a = a.detach().double()
    return (a.square().sum() if b is None else ((b.detach().double().T @ b.detach().double()) * (a @ a.T)).sum()).cpu()
