"""One optimizer step as a pure function of its whole accumulation window.

All micro-batches of a step are kept until the last one; then the units of every term are counted over all of them and over all
ranks, each named gradient is swept and summed in float32, and a rule combines them. So the result does not depend on how rows are
split into micro-batches or ranks, whatever their lengths, and non-linear rules see the true gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, UserError
from ..forward import Pass, Reference
from ..registry import Method
from ..tuners.bypass import refuse_bypass
from .terms import Term, count_units
from .vector import Space, Vec, gradients_of, is_sharded, whole

Batches = Sequence[Mapping[str, Any]]  # micro-batches: {"forget": batch, "retain": batch, ..}
_STOPPING = frozenset({"hidden", "ref_hidden", "router", "ref_router"})  # nothing beyond a layer is needed


@dataclass
class Step:
    """What one step found out: the update direction, each named gradient's loss and norm, their cosines."""

    update: Vec
    values: dict[str, float]
    norms: dict[str, float]
    cosines: dict[str, float]
    moved: list[float] = field(default_factory=list)

    def logs(self) -> dict[str, float]:
        out = {f"loss/{k}": v for k, v in self.values.items()}
        out |= {f"grad_norm/{k}": v for k, v in self.norms.items()}
        return out | {f"cos/{k}": v for k, v in self.cosines.items()}


def group_indices(names: Sequence[str], scope: str) -> dict[str, list[int]]:
    """Indices of the parameters that a rule sees as one vector: "global", "layer" (up to the first number in the name), "tensor"."""
    out: dict[str, list[int]] = {}
    for i, n in enumerate(names):
        block = re.match(r".*?\.\d+(?=\.)", n)
        key = {"global": "", "layer": block[0] if block else "", "tensor": n}[scope]
        out.setdefault(key, []).append(i)
    return out


class Window:
    """Sweeps the micro-batches of one optimizer step.

    Args:
        model: the unwrapped model, called through its outermost forward.
        rule: (method, hyper-parameters).
        scope: a rule works on all parameters as one vector ("global"), or on each block's ("layer") or each tensor's ("tensor") alone.
        smoothing: (method, hyper-parameters) applied to the gradient named forget; its hyper-parameter `space` is "adapter" or "base".
        reduce: sums a flat tensor over ranks in place; None on one process.
        seed: of the smoothing's random directions, equal on all ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        rule: tuple[Method, Mapping[str, Any]],
        *,
        scope: str = "global",
        smoothing: tuple[Method, Mapping[str, Any]] | None = None,
        space: str = "adapter",
        reference: Reference | None = None,
        reduce: Callable[[Tensor], Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.terms, self.rule = model, list(terms), rule
        self.reference, self.reduce, self.smoothing = reference, reduce, smoothing
        self.space = Space.trainable(model)
        if not self.space:
            raise UserError("nothing is trainable: the model has no adapter parameter that requires a gradient")
        self.smooth_space = self.space if space == "adapter" else Space.under_adapters(model)
        if not self.smooth_space or not all(p.is_floating_point() for p in self.smooth_space.params):
            raise UserError(
                "smoothing in space base moves the weights under the adapters, and "
                + ("they are quantized" if self.smooth_space else "there are none")
                + "; use space: adapter"
            )
        if smoothing is not None and space == "base":
            refuse_bypass(model, "smoothing in space base")
        self.sharded = any(map(is_sharded, self.space.params))
        if self.sharded and smoothing is not None and space == "base":
            raise UserError(
                "smoothing in space base is refused on a sharded base: FSDP2 gives no gradient of weights that it froze"
            )
        self.groups = group_indices(self.space.names, scope)
        self.rng = torch.Generator().manual_seed(seed)
        self.rule_state: dict[str, dict[str, Any]] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the rule's state and the random generator."""
        return {"rule": self.rule_state, "rng": self.rng.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule_state = dict(state["rule"])
        self.rng.set_state(state["rng"])

    @property
    def gradients(self) -> list[str]:
        return list(dict.fromkeys(t.gradient for t in self.terms))

    def step(self, window: Batches) -> Step:
        """The update direction of one optimizer step.

        Raises:
            Diverged: a non-finite gradient (names the term and the tensors).
            UserError: all of them exactly zero.
        """
        counts = self.counts(window)
        g: dict[str, Vec] = {}
        values: dict[str, float] = {}
        for name in self.gradients:
            sweep = self._smoothed if self.smoothing is not None and name == "forget" else self.sweep
            g[name], values[name] = sweep(name, window, counts)
        norms = {name: float(self.space.norm(v)) for name, v in g.items()}
        for name in g:
            self._check_finite(name, g[name], norms[name], values[name])
        if not any(norms.values()):
            raise UserError(
                f"the gradients of {', '.join(g)} are all exactly zero: nothing can be learned from this step"
            )
        return Step(self._combine(g, values), values, norms, self._cosines(g, norms), self._moved(g))

    def _combine(self, g: dict[str, Vec], values: dict[str, float]) -> Vec:
        """The rule, once per group of the scope, each with its own sub-vectors, sub-space and state."""
        method, hyper = self.rule
        out: list[Any] = [None] * len(self.space)
        for group, indices in self.groups.items():
            part = {n: Vec([v.tensors[i] for i in indices]) for n, v in g.items()}
            state = self.rule_state.setdefault(group, {})
            update = method.fn(part, self.space.sub(indices), state, values, **hyper)
            for i, t in zip(indices, update.tensors, strict=True):
                out[i] = t
        return Vec(out)

    def _smoothed(self, name: str, window: Batches, counts: Sequence[int]) -> tuple[Vec, float]:
        """The smoothed gradient, and the loss at the unshifted point, or the mean over the sweeps where none was there."""
        assert self.smoothing is not None
        method, hyper = self.smoothing
        caches: list[dict[str, Any]] = [{} for _ in window]
        if self.smooth_space is not self.space:
            # The reference shares the weights that are about to be shifted: it runs first.
            for mb, cache in zip(window, caches, strict=True):
                for batch, counted in self._by_batch(name, counts, mb).items():
                    terms = [t for t, _ in counted]
                    if any(n.startswith("ref_") for t in terms for n in t.objective.needs):
                        self._pass(mb[batch], terms, cache.setdefault(batch, {})).see_reference()
        here: list[float] = []
        there: list[float] = []

        def grad(at: Vec | None, wrt: Space | None = None) -> Vec:
            with self.smooth_space.shifted(at):
                v, value = self.sweep(name, window, counts, wrt, caches)
            (here if at is None else there).append(value)
            return v

        v = method.fn(grad, self.smooth_space, self.rng, **hyper)
        seen = here[:1] or there
        return v, sum(seen) / len(seen)

    @torch.no_grad()
    def value(self, name: str, window: Batches) -> float:
        """Loss of one named gradient over the window and all ranks, without gradient."""
        counts = self.counts(window)
        total = torch.zeros((), dtype=torch.float64, device=self.space.params[0].device)
        for mb in window:
            for batch, terms in self._by_batch(name, counts, mb).items():
                total += self.loss(mb[batch], terms).double()
        if self.reduce is not None:
            self.reduce(total)
        return float(total)

    def counts(self, window: Batches) -> list[int]:
        """What each term is divided by: its units over all micro-batches and ranks, of joint terms those of all their batches.

        Raises:
            UserError: a term has no unit in the whole window.
        """
        local = [
            sum(count_units(t.objective.unit, mb[t.batch], t.hyper) for mb in window if t.batch in mb)
            for t in self.terms
        ]
        total = torch.tensor(local, dtype=torch.float64, device=self.space.params[0].device)
        if self.reduce is not None:
            self.reduce(total)
        if self.sharded and self.reduce is not None:
            self._check_in_step(window)
        counts = [int(x) for x in total.tolist()]
        for t, n in zip(self.terms, counts, strict=True):
            if n == 0:
                raise UserError(
                    f"the {t.batch} batch has no {t.objective.unit} for {t.objective.name}: rows without targets"
                )
        joint = sum({t.batch: n for t, n in zip(self.terms, counts, strict=True) if t.joint}.values())
        return [joint if t.joint else n for t, n in zip(self.terms, counts, strict=True)]

    def _check_in_step(self, window: Batches) -> None:
        """Raise a `UserError` unless all ranks read the same sets in the same micro-batches: else they would wait for each other."""
        assert self.reduce is not None
        names = sorted({t.batch for t in self.terms})
        here = torch.tensor([[float(b in mb) for b in names] for mb in window], device=self.space.params[0].device)
        total, ranks = here.clone(), torch.ones((), device=here.device)
        self.reduce(total)
        self.reduce(ranks)
        if not torch.equal(total, here * ranks):
            raise UserError(
                "on a sharded base all ranks run the same passes, and in this step some have no rows of a set that others have: give whole "
                "numbers for per_anchor, or a larger per_device_train_batch_size"
            )

    def sweep(
        self,
        name: str,
        window: Batches,
        counts: Sequence[int],
        space: Space | None = None,
        caches: Sequence[dict[str, Any]] | None = None,
    ) -> tuple[Vec, float]:
        """(gradient, loss) of one name over the whole window and all ranks. One graph lives at a time.

        Args:
            space: the parameters to differentiate by; default the adapter's.
            caches: per micro-batch, what the reference computed (see `Pass`).
        """
        space = space or self.space
        total, value = space.zeros(), torch.zeros((), dtype=torch.float64, device=space.params[0].device)
        with space.differentiable():
            for mb, cache in zip(window, caches or [None] * len(window), strict=True):
                for batch, terms in self._by_batch(name, counts, mb).items():
                    loss = self.loss(mb[batch], terms, None if cache is None else cache.setdefault(batch, {}))
                    value += loss.detach().double()
                    if loss.requires_grad:  # else constant, e.g. every adapter lies beyond the layer it looks at
                        for into, got in zip(total.tensors, gradients_of(loss, space.params), strict=True):
                            if got is not None:
                                into.add_(got)
        return self._reduced(total, value)

    def _by_batch(self, name: str, counts: Sequence[int], mb: Mapping[str, Any]) -> dict[str, list[tuple[Term, int]]]:
        """Batch name -> the terms of one gradient that read it, each with its units; batches that a micro-batch has rows of."""
        out: dict[str, list[tuple[Term, int]]] = {}
        for t, n in zip(self.terms, counts, strict=True):
            if t.gradient == name and t.batch in mb:
                out.setdefault(t.batch, []).append((t, n))
        return out

    def _pass(self, batch: Mapping[str, Any], terms: Sequence[Term], cache: dict[str, Any] | None) -> Pass:
        needs = {n for t in terms for n in t.objective.needs}
        return Pass(
            self.model,
            batch,
            reference=self.reference,
            layers=[k for t in terms for k in t.layers],
            routers=[k for t in terms for k in t.routers],
            share=not self.sharded,
            stop=bool(needs) and needs <= _STOPPING and not self.sharded,  # all ranks run every module
            reference_cache=cache,
        )

    def loss(
        self, batch: Mapping[str, Any], terms: Sequence[tuple[Term, int]], cache: dict[str, Any] | None = None
    ) -> Tensor:
        """Sum over terms of weight * sum of values / count, from one shared pass."""
        p = self._pass(batch, [t for t, _ in terms], cache)
        return torch.stack([t.weight * t.objective.fn(p, **t.hyper).sum() / n for t, n in terms]).sum()

    def _reduced(self, v: Vec, value: Tensor) -> tuple[Vec, float]:
        """Sum a vector over ranks, together with its loss value, in one call; sharded tensors are sums already."""
        if self.reduce is None:
            return v, float(value)
        own = [t for t in v.tensors if not is_sharded(t)]
        flat = torch.cat([t.flatten() for t in own] + [value.float()[None]])
        self.reduce(flat)
        start = 0
        for t in own:
            t.copy_(flat[start : start + t.numel()].view_as(t))
            start += t.numel()
        return v, float(flat[-1])

    def _check_finite(self, name: str, v: Vec, norm: float, value: float) -> None:
        if torch.isfinite(torch.tensor([norm, value])).all():
            return
        bad = [n for n, t in zip(self.space.names, v.tensors, strict=True) if not torch.isfinite(whole(t)).all()]
        methods = ", ".join(t.objective.name for t in self.terms if t.gradient == name)
        where = f"in {len(bad)} tensors, first {', '.join(bad[:3])}" if bad else "in the loss itself"
        raise Diverged(f"the gradient of {name} ({methods}) is not finite (loss {value:g}) {where}")

    def _cosines(self, g: Mapping[str, Vec], norms: Mapping[str, float]) -> dict[str, float]:
        names = list(g)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if norms[a] > 0 and norms[b] > 0]
        return {f"{a},{b}": float(self.space.dot(g[a], g[b])) / (norms[a] * norms[b]) for a, b in pairs}

    def _moved(self, g: Mapping[str, Vec]) -> list[float]:
        """Largest absolute gradient entry of each parameter over all names."""
        largest = torch.stack([torch.stack([_largest(t) for t in v.tensors]) for v in g.values()]).amax(0)
        if self.sharded:
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.tolist()


def _largest(t: Tensor) -> Tensor:
    """Largest absolute entry; of a sharded tensor among this rank's, of which there may be none."""
    own: Tensor = t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
    return own.abs().max() if own.numel() else own.new_zeros(())
