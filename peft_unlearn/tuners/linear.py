"""What ``all-linear`` stands for on a base: the linear layers that text passes through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL_LINEAR = "all-linear"


class Linears(NamedTuple):
    """names: last parts of module names, whole names where others end alike. everything: PEFT's own all-linear is the same."""

    names: list[str]
    everything: bool


def linear_modules(model: Any, called: set[str] | None = None) -> Linears:
    """The linear modules of a base, or of one with adapters on it, the output embeddings left out.

    Left out too, because PEFT would break them or nothing would train there: subclasses of nn.Linear that compute something else
    (routers), and what a forward over text never calls (vision towers, projectors, cross-attention).

    Args:
        called: names of the modules that such a forward called and that `computes`; None: not known.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    head, inside = model.get_output_embeddings(), ""
    head = getattr(model, "classifier", None) if head is None else head  # of an image classifier
    heads = set() if head is None else {*head.modules()}
    plain: dict[str, str] = {}  # name in the base -> name here
    linear: dict[str, Any] = {}
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, BaseTunerLayer) else ""
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        short = name.removeprefix("base_model.model.")
        plain[short] = name
        if isinstance(base, nn.Linear | Conv1D) and not {base, module} & heads:
            linear[short] = base
    seen = None if called is None else {_numberless(n) for n in called}  # experts: one of a kind stands for all
    wanted = [
        n for n, m in linear.items()
        if (type(m).forward in (nn.Linear.forward, Conv1D.forward) if seen is None else _numberless(plain[n]) in seen)
    ]  # fmt: skip
    others = {n.rpartition(".")[2] for n in plain.keys() - set(wanted)}
    names = {n if (leaf := n.rpartition(".")[2]) in others else leaf for n in wanted}
    return Linears(sorted(names), len(wanted) == len(linear))


@contextmanager
def calls(model: nn.Module) -> Iterator[set[str]]:
    """Names of the modules that forward passes within it call, of linear ones those that gave a linear map (`computes`)."""
    called: set[str] = set()

    def seen(module: nn.Module, args: Any, out: Any, name: str) -> None:
        if computes(module, args, out):
            called.add(name)

    hooks = [m.register_forward_hook(partial(seen, name=n)) for n, m in model.named_modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def called_modules(model: Any) -> set[str] | None:
    """Names of the modules that a forward over text calls (`calls`); None for a model without weights in memory."""
    weight = next(iter(model.parameters()), None)
    if weight is None or weight.is_meta:
        return None
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = False
        with calls(model) as called:
            model(input_ids=torch.tensor([[0, 1, 2, 3]], device=weight.device), use_cache=False)
    finally:
        for m in training:
            m.training = True
    return called


def computes(module: nn.Module, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a call of `module` was what its class promises; subclasses of nn.Linear may compute something else."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return True
    if not module.weight.is_floating_point():  # bitsandbytes: packed numbers, which nothing else can multiply with
        return True
    if not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor):
        return False
    wanted = F.linear(args[0], module.weight, module.bias)
    return out.shape == wanted.shape and bool(torch.allclose(out, wanted, rtol=1e-3, atol=1e-3))


def _numberless(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
