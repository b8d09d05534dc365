"""Gradients of the base's own weights over whole data sets, accumulated module by module; the model is afterwards as it was.

A hook behind every weight adds its gradient to an accumulator as soon as it is there and drops it, so that besides the accumulators no
more than one module's gradient lives at a time. Losses are objectives of the registry, run by the same window as in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .. import registry
from ..data.collate import IGNORE, collate
from ..errors import Errors, UserError, nearest
from ..folder.digest import base_tensors, name_in_base
from ..forward import Pass, Reference
from ..gradients.terms import Term
from ..gradients.window import Window
from ..head import held
from ..progress import Progress
from ..tuners.bypass import refuse_bypass
from ..tuners.linear import ALL_LINEAR, called_modules, linear_modules

Rows = Sequence[Mapping[str, Any]]  # encoded rows, see `data.collate.encode`


def eligible(model: Any, targets: str | Iterable[str] = ALL_LINEAR) -> dict[str, nn.Parameter]:
    """The base's weights that a selection may choose from, by their names in the base, in the model's order.

    Args:
        targets: ``"all-linear"`` (the output embeddings left out), names (ends of names) of linear modules or of 3-D parameters with
            a weight for every expert (``experts.down_proj``), or a regular expression for whole names.

    Raises:
        UserError: names that match nothing, or nothing of that kind; weights that cannot be differentiated or are tied.
    """
    refuse_bypass(model, "a selection")
    names = [targets] if isinstance(targets, str) else list(targets)
    if names == [ALL_LINEAR]:
        names = linear_modules(model, called_modules(model)).names
        targets = names
    owner = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    known: dict[str, nn.Parameter] = {}  # what a target may be called -> its weight
    full: dict[str, str] = {}
    for name, p in base_tensors(model).items():
        module, _, leaf = name.rpartition(".")
        if isinstance(p, nn.Parameter) and _chooses(owner.get(id(p)), p, leaf):
            called = module if p.dim() == 2 else name
            known[called], full[called] = p, name
    errors, wanted = Errors(), set()
    for target in names:
        hits = {c for c in known if _named(c, target, isinstance(targets, str))}
        if not hits:
            leaves = sorted({c.rpartition(".")[2] for c in known})
            errors.add(
                f"target_modules: no linear module or 3-D expert weight is called {target!r}.{nearest(target, leaves)}"
            )
        wanted |= hits
    for called in sorted(wanted):
        if not known[called].is_floating_point():
            errors.add(
                f"target_modules: {called} is quantized ({known[called].dtype}): its entries cannot move one by one"
            )
    head = getattr(model.get_output_embeddings(), "weight", None)
    if any(known[c] is head for c in wanted) and head is model.get_input_embeddings().weight:
        errors.add("target_modules: the output embeddings are tied to the input embeddings, and would move those too")
    errors.raise_if_any("selection")
    return {full[c]: p for c, p in known.items() if c in wanted}


def adapter_weights(model: Any, learned: bool) -> dict[str, nn.Parameter]:
    """The trainable weights of an adapter, by their own names.

    Args:
        learned: they have to be more than a fresh start, since scores read values or gradients.

    Raises:
        UserError: there are none, or a LoRA whose B is zero throughout.
    """
    params = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() in (2, 3)}
    if not params:
        raise UserError("selection in space adapter: the model has no adapter that is trainable")
    ends = [p for n, p in params.items() if "lora_B" in n]
    if learned and ends and not any(bool(p.any()) for p in ends):
        raise UserError(
            "selection in space adapter: this LoRA is fresh. Where B is zero A has no gradient, and B itself no value, so that every "
            "product of the two is zero and ranks nothing. Score the base's weights and choose structures of the LoRA (unit row, column, "
            "module or rank), or train some steps first, or start it with B not zero (adapter.init_lora_weights: fila)"
        )
    return params


def _chooses(module: Any, p: Tensor, leaf: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    return p.dim() == 3 or (p.dim() == 2 and leaf == "weight" and isinstance(module, nn.Linear | Conv1D))


def _named(called: str, target: str, pattern: bool) -> bool:
    if called == target or called.endswith(f".{target}"):
        return True
    try:
        return pattern and re.fullmatch(target, called) is not None
    except re.error:
        return False


def input_axis(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, int]:
    """The axis of each weight along which a module's inputs lie; outputs lie along the other one, of 3-D weights of the last two."""
    from transformers.pytorch_utils import Conv1D

    from ..tuners.expert_lora.blocks import is_transposed

    owner = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    out = {}
    for name, p in params.items():
        module = owner[id(p)]
        turned = isinstance(module, Conv1D) if p.dim() == 2 else is_transposed(module)
        out[name] = p.dim() - 2 if turned else p.dim() - 1
    return out


def batches(rows: Rows, name: str, pad_id: int, size: int, device: Any, padded: bool = True) -> list[dict[str, Any]]:
    """Micro-batches ``{name: batch}`` of rows of like lengths; without padding where `padded` is False."""
    ordered = sorted(rows, key=lambda r: len(r["input_ids"]))
    alike = [ordered] if padded else [list(g) for _, g in groupby(ordered, lambda r: len(r["input_ids"]))]
    groups = [g[i : i + size] for g in alike for i in range(0, len(g), size)]
    return [_to(collate([{name: [dict(r)]} for r in g], pad_id), device) for g in groups]


def _to(x: Any, device: Any) -> Any:
    return {k: _to(v, device) for k, v in x.items()} if isinstance(x, Mapping) else x.to(device)


@contextmanager
def scored(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only these weights are differentiable and nothing is dropped at random; flags, modes, random states and ``.grad`` come back."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    training = [m for m in model.modules() if m.training]
    mine = {id(p) for p in params.values()}
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.callback(_restore, flags, training)
        for p, _, _ in flags:
            p.requires_grad_(id(p) in mine)
            p.grad = None
        for m in training:
            m.training = False
        yield


def _restore(flags: list[tuple[nn.Parameter, bool, Tensor | None]], training: list[nn.Module]) -> None:
    for p, flag, grad in flags:
        p.requires_grad_(flag)
        p.grad = grad
    for m in training:
        m.training = True


def gradients(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    rows: Rows,
    term: Term,
    *,
    pad_id: int = 0,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    reference: Reference | None = None,
    squared: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """d (weight * mean over all units of the objective) / d weight of every parameter, over all rows; inside `scored`.

    Args:
        dtype, device: of the accumulators; default float32 where the model is.
        reference: what an objective compares with; None: the model itself, as it is.
        squared: instead of the gradient of all rows the mean over micro-batches of the square of each one's own, weighted by its units
            (the diagonal of the empirical Fisher information).

    Raises:
        UserError: rows without targets, a gradient that is not finite, or an objective that compares with a reference.
    """
    itself = _own_reference(term, reference)
    sums = {n: torch.zeros(p.shape, dtype=dtype, device=device or p.device) for n, p in params.items()}

    def taken(into: Tensor):
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            g = p.grad.to(into.device, into.dtype)
            into.add_(g * g * share if squared else g)
            p.grad = None

        return hook

    parts = batches(rows, term.batch, pad_id, size, next(model.parameters()).device)
    window = Window(model, [term], (registry.get("rule", "sum"), {}), reference=reference)
    (count,), share = window.counts(parts), 1.0
    with held(*(p.register_post_accumulate_grad_hook(taken(sums[n])) for n, p in params.items())):
        for i, part in enumerate(parts):
            batch = part[term.batch]
            if itself:
                with torch.no_grad():
                    batch["ref_logp"] = _filled(batch, Pass(model, batch).logp)
            own = window.counts([part])[0] if squared else count
            share = own / count  # read by the hooks
            window.loss(batch, [(term, own)]).backward()
            if progress is not None:
                progress(f"gradient of {term.objective.name} on {term.batch}", i + 1, len(parts))
    if bad := [n for n, g in sums.items() if not bool(torch.isfinite(g).all())]:
        raise UserError(
            f"the gradient of {term.objective.name} on the {term.batch} set is not finite in {len(bad)} weights, first {bad[0]}: "
            "scores by it would mean nothing. Load the base in float32 (or bfloat16), or choose another objective"
        )
    return sums


def _own_reference(term: Term, reference: Reference | None) -> bool:
    """Whether the model's own log-probabilities stand in for a reference's."""
    compared = {n for n in term.objective.needs if n.startswith("ref_")}
    if reference is None and compared - {"ref_logp"}:
        raise UserError(
            f"{term.objective.name} compares whole distributions with the reference, which is the base itself here: its gradient is zero "
            "there and says nothing. Choose another objective for the scores, e.g. nll"
        )
    return reference is None and bool(compared)


def _filled(batch: Mapping[str, Any], logp: Tensor) -> Tensor:
    """Values of the targets (n,) at their positions, (batch, seq-1)."""
    mask = batch["labels"][:, 1:] != IGNORE
    return torch.zeros(mask.shape, device=logp.device).masked_scatter_(mask, logp)


@torch.no_grad()
def input_norms(
    model: nn.Module, params: Mapping[str, nn.Parameter], rows: Rows, *, pad_id: int = 0, size: int = 16,
    progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Euclidean norm of each input feature over all tokens, (in,) float32 by weight; padding is not among them.

    Raises:
        UserError: weights of several experts in one tensor, which no module of their own is called with.
    """
    if fused := [n for n, p in params.items() if p.dim() == 3]:
        raise UserError(
            f"the inputs of single experts cannot be seen: {fused[0]} holds all of them; leave it out or choose another method"
        )
    owner = {id(p): m for m in model.modules() for p in m._parameters.values() if p is not None}
    sums: dict[str, Tensor] = {}

    def seen(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + (x * x).sum(0)

        return hook

    parts = batches(rows, "forget", pad_id, size, next(model.parameters()).device, padded=False)
    with held(*(owner[id(p)].register_forward_pre_hook(seen(n)) for n, p in params.items())):
        for i, part in enumerate(parts):
            batch = part["forget"]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            if progress is not None:
                progress("inputs of the modules", i + 1, len(parts))
    if dead := sorted(set(params) - set(sums)):
        raise UserError(
            f"no text passes through {len(dead)} of the chosen modules, first {name_in_base(dead[0])}; leave them out"
        )
    return {n: s.sqrt() for n, s in sums.items()}
