"""G-effect: what one step along an objective's gradient does to the forget risk and to the retain risk, to first order.

    unlearning effect  e_u = <grad R(forget), grad L>        retaining effect  e_r = <grad R(retain), grad L>

R is the mean negative log-likelihood per target token, L any objective (minimized). A plain gradient step theta - eta grad L changes R
by -eta e: forgetting wants e_u well below 0, keeping wants e_r at or above 0. An adaptive optimizer rescales the step, so it
follows these numbers in sign and tendency, not in size.

Source: Rethinking LLM Unlearning Objectives: A Gradient Perspective (Go Beyond), arXiv 2502.19301, tmlr-group/G-effect.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import registry
from ..errors import UserError
from ..forward import Reference, blocks, causal_lm, dropouts
from ..gradients.terms import Term
from ..gradients.vector import Space, Vec
from ..gradients.window import Batches, Window
from ..reporting.effect_pictures import group_of
from ..tuners.names import belongs
from .instances import Instance, PerInstance, products

FORGET, RETAIN = "risk_forget", "risk_retain"
UPDATE = "update"  # label of the direction that a run's rule and smoothing make of its terms
GROUPS = ("input_embedding", "shallow", "middle", "deep", "head", "other")
_KEEP, _NEW, _REPORT = 0.6, 0.4, 4  # the released code: moving average over batches, read at the 3rd, 7th, 11th, ..


@dataclass(frozen=True)
class Estimate:
    """One effect measured on n batches.

    value: mean over batches, each batch's risk gradient against its own objective gradient. se: standard error of that mean
    (None for one batch). pooled: inner product of the gradients averaged over all batches first: what a step on all rows does to
    all rows. batches: the n single values. With ``repro`` value is the product of the moving averages, se and pooled are None, and
    batches holds the values where the released code reads them.
    """

    value: float
    se: float | None
    pooled: float | None
    batches: list[float]


@dataclass(frozen=True)
class Part:
    """The share of one layer or layer group in both effects; shares add up to the totals."""

    unlearning: float
    unlearning_se: float | None
    retaining: float
    retaining_se: float | None


@dataclass
class Effect:
    """Both effects of one objective at one point. loss and norm (of the gradient) are means over batches."""

    loss: float
    norm: float
    unlearning: Estimate
    retaining: Estimate
    groups: dict[str, Part]
    layers: dict[str, Part]
    instances: list[Instance] = field(default_factory=list)
    note: str | None = None


@dataclass
class Effects:
    """All objectives at one point.

    step: optimizer steps taken, if any are known; risk: mean NLL per target token of both sets; risk_norm: norms of its gradients;
    batches: how many; averaging: "mean" or "ema" (the released code's).
    """

    space: str
    averaging: str
    batches: int
    risk: dict[str, float]
    risk_norm: dict[str, float]
    effects: dict[str, Effect]
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is not a finite number becomes None."""
        return plain(self)


def plain(x: Any) -> Any:
    """`x` (dataclasses, mappings, lists, numbers) as JSON values; NaN and infinities become None."""
    if is_dataclass(x) and not isinstance(x, type):
        return plain(asdict(x))
    if isinstance(x, Mapping):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def measure(
    model: nn.Module,
    terms: Mapping[str, Sequence[Term]],
    batches: Batches,
    *,
    reference: Reference | None = None,
    space: str = "adapter",
    update: Window | None = None,
    instances: int = 0,
    repro: bool = False,
    reduce: Callable[[Tensor], Any] | None = None,
    step: int | None = None,
) -> Effects:
    """Effects of several objectives on the same batches; every gradient is swept once per batch.

    Weights, buffers, ``.grad``, requires_grad, training flags and random states are afterwards as before.

    Args:
        terms: label -> the terms of its objective. Their own gradient names do not matter.
        batches: ``{"forget": batch, "retain": batch}`` each; what an objective reads of other sets too.
        space: gradients by the "adapter", or by the frozen weights under it ("base"; the output embeddings excepted).
        update: a window of the run; its whole update (rule, smoothing) is measured too, under the label "update". Adapter space only;
            its state is left alone.
        instances: values of every token of so many forget rows, or of four times as many sequences; one backward each.
        repro: the released code's estimator: moving averages (0.6 old, 0.4 new) of the gradients over batches, so that the
            result depends on their order. Default: each batch by itself, plain mean.
        reduce: sums a tensor over ranks in place; the batches are then the ranks' shares.

    Raises:
        UserError: no batch, a reserved label, nothing to differentiate by, or rows without targets.
    """
    _check(terms, batches, space, update)
    nll = registry.get("objective", "nll")
    named = [Term(FORGET, "forget", nll), Term(RETAIN, "retain", nll)]
    named += [Term(k, t.batch, t.objective, t.weight, t.hyper) for k, ts in terms.items() for t in ts]
    with undisturbed(model):
        rule = (registry.get("rule", "sum"), {})
        window = Window(model, named, rule, reference=reference, reduce=reduce)
        over = window.space if space == "adapter" else Space.under_adapters(model)
        if not over:
            raise UserError("space base: no frozen weight lies under an adapter here")
        found = _swept(window, over, [FORGET, RETAIN, *terms], batches, update, repro)
        where = places(model, over)
        out = {label: found.effect(label, where) for label in found.labels[2:]}
        if instances > 0:
            per_instance = PerInstance(model, over, (found.average(FORGET), found.average(RETAIN)), reference)
            for label, effect in out.items():
                effect.instances, why = per_instance.of([t for t in named if t.gradient == label], batches, instances)
                effect.note = effect.note or why
    return Effects(
        space=space,
        averaging="ema" if repro else "mean",
        batches=len(batches),
        risk={"forget": found.loss(FORGET), "retain": found.loss(RETAIN)},
        risk_norm={"forget": found.norm(FORGET), "retain": found.norm(RETAIN)},
        effects=out,
        step=step,
    )


def _check(terms: Mapping[str, Any], batches: Batches, space: str, update: Window | None) -> None:
    if not batches:
        raise UserError("effects need at least one batch")
    if taken := sorted({FORGET, RETAIN, UPDATE} & set(terms)):
        raise UserError(f"an objective cannot be labelled {', '.join(taken)}: that name means something else here")
    if space not in ("adapter", "base"):
        raise UserError(f"space={space!r} is not one of adapter, base")
    if update is not None and space != "adapter":
        raise UserError("the update of a run moves its adapter: measure it in space adapter")


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """The adapter differentiable (also a loaded, frozen one), nothing dropped at random; everything comes back as it was."""
    with ExitStack() as stack:
        if not Space.trainable(model):
            names = list(getattr(model, "active_adapters", None) or [])
            mine = [
                (n, p)
                for n, p in model.named_parameters()
                if any(belongs(n, a) for a in names) and p.is_floating_point()
            ]
            stack.enter_context(Space(mine).differentiable())
        # Activation checkpointing works in training mode only, so that mode stays where nothing is random.
        if dropouts(model) or not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            training = [m for m in model.modules() if m.training]
            stack.callback(lambda: [setattr(m, "training", True) for m in training])
            for m in training:
                m.training = False
        device = next(model.parameters()).device
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        yield


def _swept(
    window: Window, over: Space, labels: list[str], batches: Batches, update: Window | None, repro: bool
) -> _Sums:
    """The gradients of all labels, and the whole update where a window of the run is given, over the batches."""
    found = _Sums(over, [*labels, *([UPDATE] if update is not None else [])], repro)
    for batch in batches:
        counts = window.counts([batch])
        for label in labels:
            found.add(label, *window.sweep(label, [batch], counts, over))
        if update is not None:
            found.add(UPDATE, *_update(update, batch))
        found.close()
    return found


def _update(window: Window, batch: Mapping[str, Any]) -> tuple[Vec, float]:
    """(update direction, sum of losses) of one window, whose state stays as it is."""
    state, rng = window.rule_state, window.rng.get_state()
    window.rule_state = copy.deepcopy(state)
    try:
        found = window.step([batch])
    finally:
        window.rule_state = state
        window.rng.set_state(rng)
    return found.update, sum(found.values.values())


class _Sums:
    """Gradients of all labels over the batches: products of each batch, and running averages. Holds two vectors per label."""

    def __init__(self, space: Space, labels: Sequence[str], repro: bool) -> None:
        self.space, self.labels, self.repro, self.n = space, list(labels), repro, 0
        self.now: dict[str, Vec] = {}
        self.mean: dict[str, Vec] = {}
        self.losses: dict[str, list[float]] = {k: [] for k in labels}
        self.norms: dict[str, list[float]] = {k: [] for k in labels}
        self.products: dict[tuple[str, str], list[Tensor]] = {}  # (risk, label) -> per batch, (parameters,) float64

    def add(self, label: str, v: Vec, loss: float) -> None:
        self.losses[label].append(loss)
        self.norms[label].append(float(self.space.norm(v)))
        if self.repro:
            old = self.mean.get(label)
            self.mean[label] = v if old is None else (old * _KEEP).add_(v, _NEW)
        else:
            self.now[label] = v

    def close(self) -> None:
        """All labels of a batch are there: take the products, then let the batch's own vectors go."""
        self.n += 1
        if self.repro:
            if self.n % _REPORT == _REPORT - 1:
                self._take(self.mean)
            return
        self._take(self.now)
        for label, v in self.now.items():
            if label in self.mean:
                self.mean[label].add_(v)
            else:
                self.mean[label] = v  # the sum, until `average` divides it
        self.now = {}

    def _take(self, vectors: Mapping[str, Vec]) -> None:
        for risk in (FORGET, RETAIN):
            for label in self.labels[2:]:
                self.products.setdefault((risk, label), []).append(products(vectors[risk], vectors[label]))

    def average(self, label: str) -> Vec:
        return self.mean[label] if self.repro else self.mean[label] / self.n

    def loss(self, label: str) -> float:
        return sum(self.losses[label]) / self.n

    def norm(self, label: str) -> float:
        return sum(self.norms[label]) / self.n

    def effect(self, label: str, where: Sequence[str]) -> Effect:
        pooled = {r: products(self.average(r), self.average(label)) for r in (FORGET, RETAIN)}  # (parameters,)
        each = {r: self.products.get((r, label), []) for r in pooled}
        # Rows whose mean is the value: every batch, or the one product of the moving averages.
        rows = {r: torch.stack([pooled[r]] if self.repro else each[r]) for r in pooled}

        def estimate(risk: str) -> Estimate:
            totals = [float(x.sum()) for x in each[risk]]
            value, se = _mean_se(rows[risk].sum(1))
            return Estimate(value, se, None if self.repro else float(pooled[risk].sum()), totals)

        def parts(names: Sequence[str]) -> dict[str, Part]:
            out = {}
            for name in sorted(set(names), key=_order):
                mine = [i for i, n in enumerate(names) if n == name]
                both = [_mean_se(rows[r][:, mine].sum(1)) for r in (FORGET, RETAIN)]
                out[name] = Part(*both[0], *both[1])
            return out

        n_blocks = 1 + max((int(w) for w in where if w.isdigit()), default=0)
        groups = [group_of(w, n_blocks) for w in where]
        lost = not all(math.isfinite(x) for x in self.norms[label] + self.losses[label])
        return Effect(
            loss=self.loss(label),
            norm=self.norm(label),
            unlearning=estimate(FORGET),
            retaining=estimate(RETAIN),
            groups=parts(groups),
            layers=parts(where),
            note="its loss or gradient is not finite here" if lost else None,
        )


def _mean_se(x: Tensor) -> tuple[float, float | None]:
    """Mean and its standard error; x (n,)."""
    return float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else None


# --- where a parameter lies -------------------------------------------------------------------------------------------


def places(model: nn.Module, space: Space) -> list[str]:
    """Per parameter: the number of its block as text, "input_embedding", "head" or "other"."""
    inner: Any = causal_lm(model)
    at: dict[int, str] = {}
    for name, module in (("input_embedding", inner.get_input_embeddings()), ("head", inner.get_output_embeddings())):
        for p in module.parameters() if module is not None else ():
            at.setdefault(id(p), name)
    for i, block in enumerate(blocks(model)):
        for p in block.parameters():
            at[id(p)] = str(i)
    return [at.get(id(p), "other") for p in space.params]


def _order(name: str) -> tuple[int, int]:
    """From the input to the output."""
    if name.isdigit():
        return 1, int(name)
    return (GROUPS.index(name), 0) if name in GROUPS else (len(GROUPS), 0)
