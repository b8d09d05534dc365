"""Which weights may move: scores of every entry of the base's own weights, and the selection of the highest.

A method is a function of what its parameters are called; `INPUTS` says what there is. It gives scores of one weight, higher = rather
chosen, -inf = never: one for each entry, or for each group of entries (an axis of length 1: all along it stand or fall together).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor

from .. import registry
from ..errors import UserError
from ..forward import Reference
from ..gradients.terms import Term
from ..progress import Progress
from ..registry import Method, Source, selection
from ..tuners.linear import ALL_LINEAR
from ..tuners.selection import Selection
from . import radix
from .streamed import Rows, eligible, gradients, input_axis, input_norms, scored

DENSE = 0.1  # beyond this density a LoRA of usual rank is smaller and keeps more

_WAGLE = Source("WAGLE: Strategic Weight Attribution for LLM Unlearning", "https://arxiv.org/abs/2410.17509", 2024)


@selection("random", source=_WAGLE)
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Every entry with equal chance: the control that any other method has to beat."""
    return torch.rand(weight.shape, generator=generator)


@selection("magnitude", source=_WAGLE)
def magnitude(weight: Tensor) -> Tensor:
    """|theta|: the largest weights, whatever the data."""
    return weight.abs()


# --- what methods are fed ---------------------------------------------------------------------------------------------

# input -> (objective, batch); None: the one that the caller or the method names
_GRADIENTS: dict[str, tuple[str | None, str]] = {
    "forget_grad": (None, "forget"),
    "retain_grad": ("nll", "retain"),
    "entropy_grad": ("neg_entropy", "forget"),
    "ascent_grad": ("ga", "forget"),
}
_STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {"rms": lambda x: (x * x).sum(), "mean": lambda x: x.abs().sum()}
INPUTS = ("weight", *_GRADIENTS, "input_norm", "input_axis", "generator")
# and of `weight` and the gradients, over all weights together: x_rms, the root of their mean square; x_mean, of |x|
Budget = Literal["global", "module"]


@dataclass
class _Found:
    """What a method is given for each weight, and about all of them together; all on the device of the accumulators."""

    model: Any
    params: Mapping[str, torch.nn.Parameter]
    grads: Mapping[str, Mapping[str, Tensor]]
    norms: Mapping[str, Tensor]
    seed: int
    device: Any
    _about: dict[str, float] = field(default_factory=dict)

    @cached_property
    def axes(self) -> dict[str, int]:
        return input_axis(self.model, self.params)

    def tensor(self, what: str, name: str) -> Tensor:
        """`weight` or a gradient of one weight, float32."""
        x = self.params[name].detach() if what == "weight" else self.grads[what][name]
        return x.to(self.device, torch.float32)

    def feed(self, what: str, name: str) -> Any:
        if what == "generator":
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if what == "input_axis":
            return self.axes[name]
        if what == "input_norm":
            shape = [1] * self.params[name].dim()
            shape[self.axes[name]] = -1
            return self.norms[name].to(self.device).view(shape)
        of, _, statistic = what.rpartition("_")
        return self.overall(of, statistic) if statistic in _STATISTICS else self.tensor(what, name)

    def overall(self, of: str, statistic: str) -> float:
        key = f"{of}_{statistic}"
        if key not in self._about:
            parts = (_STATISTICS[statistic](self.tensor(of, n).double()) for n in self.params)
            mean = float(sum(map(float, parts))) / sum(p.numel() for p in self.params.values())
            self._about[key] = math.sqrt(mean) if statistic == "rms" else mean
        return self._about[key]


def _needed(method: Method) -> set[str]:
    """Inputs of a method without their statistics' endings; TypeError for one that nothing here is called."""
    found = set()
    for name in method.inputs:
        of, _, statistic = name.rpartition("_")
        found.add(of if statistic in _STATISTICS and of in ("weight", *_GRADIENTS) else name)
    if unknown := found - set(INPUTS):
        raise TypeError(f"selection {method.name} cannot be fed {sorted(unknown)}; known: {', '.join(INPUTS)}")
    return found


def select(
    model: Any,
    data: Mapping[str, Rows],
    *,
    method: str,
    ratio: float,
    hyper: Mapping[str, Any] | None = None,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    budget: Budget = "global",
    forget: Sequence[Term] | str | None = None,
    reference: Reference | None = None,
    pad_id: int = 0,
    size: int = 16,
    seed: int = 0,
    accumulators: torch.dtype = torch.float32,
    device: Any = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Selection:
    """The entries of the base's weights that a method would let move; the model is afterwards as it was.

    Args:
        data: encoded rows, ``{"forget": rows, "retain": rows}``, as far as the method reads them.
        ratio: share of the entries that is chosen, (0, 1]: floor(ratio * n), ties in favor of the earlier one. Methods that score whole
            rows choose that share of the rows.
        hyper: hyper-parameters of the method.
        target_modules: of which weights; see `streamed.eligible`.
        budget: the share of all weights together ("global"), or of each ("module").
        forget: the objective of `forget_grad`: terms, or a name; default the method's own.
        reference: what such an objective compares with; None: the model itself.
        size: rows of a micro-batch.
        accumulators, device: dtype and place of the summed gradients; default float32 where the model is.
        about: what else the selection records (digests of base and data).

    Raises:
        UserError: no such method, a ratio outside (0, 1] or one that chooses nothing, a set that the method reads is absent.
    """
    chosen = registry.get("selection", method)
    _check(chosen, hyper or {}, ratio, budget)
    values = chosen.resolve(hyper or {})
    params = eligible(model, target_modules)
    needed = _needed(chosen)
    terms = {what: _terms(what, chosen, forget) for what in _GRADIENTS if what in needed}
    wanted = {t.batch for ts in terms.values() for t in ts} | ({"forget"} if "input_norm" in needed else set())
    if absent := sorted(name for name in wanted if not data.get(name)):
        raise UserError(f"selection {method} reads the {' and the '.join(absent)} set, and the data have none")
    with scored(model, params):
        common = {"pad_id": pad_id, "size": size, "progress": progress}
        grads = {
            what: _summed([
                gradients(model, params, data[t.batch], t, dtype=accumulators, device=device, reference=reference, **common) for t in ts
            ])
            for what, ts in terms.items()
        }  # fmt: skip
        norms = input_norms(model, params, data["forget"], **common) if "input_norm" in needed else {}
        found = _Found(model, params, grads, norms, seed, device or next(iter(params.values())).device)
        scores = {n: partial(_score, chosen, values, found, n) for n in params}
        with torch.no_grad():
            picked = _picked(scores, ratio, budget, method)
            indices = {n: _entries(picked[n], scores[n]().shape, params[n].shape) for n in params}
    record = {
        "method": chosen.name, "hyper": values, "ratio": ratio, "budget": budget, "seed": seed,
        "rows": {n: len(data[n]) for n in sorted(wanted)},
        "terms": {w: {t.objective.name: {**t.hyper, "weight": t.weight, "batch": t.batch} for t in ts} for w, ts in terms.items()},
        "overall": found._about, **(about or {}),
    }  # fmt: skip
    out = Selection(indices, {n: tuple(p.shape) for n, p in params.items()}, record)
    _warn(out)
    return out


def _check(method: Method, hyper: Mapping[str, Any], ratio: float, budget: str) -> None:
    wrong = method.check(hyper)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        wrong.append(f"ratio {ratio!r} must lie in (0, 1]: the share of the entries that may move")
    if budget not in ("global", "module"):
        wrong.append(f"budget {budget!r} is not one of global, module")
    if wrong:
        raise UserError("selection: " + "; ".join(wrong))


def _terms(what: str, method: Method, forget: Sequence[Term] | str | None) -> list[Term]:
    name, batch = _GRADIENTS[what]
    if name is None and not isinstance(forget, str | None):
        return list(forget)
    objective = registry.get("objective", name or forget or method.extra["forget"])
    if wrong := objective.check({}):
        raise UserError(f"selection {method.name}: {'; '.join(wrong)}")
    return [Term(what, batch, objective, 1.0, objective.resolve({}))]


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *rest = parts
    for other in rest:
        for name, g in first.items():
            g.add_(other[name])
    return first


def _score(method: Method, hyper: Mapping[str, Any], found: _Found, name: str) -> Tensor:
    return method.fn(*(found.feed(i, name) for i in method.inputs), **hyper)


def _picked(scores: Mapping[str, Callable[[], Tensor]], ratio: float, budget: str, method: str) -> dict[str, Tensor]:
    groups = [list(scores)] if budget == "global" else [[n] for n in scores]
    out = {}
    for names in groups:
        n = sum(scores[x]().numel() for x in names)
        if (k := math.floor(ratio * n)) < 1:
            raise UserError(
                f"ratio {ratio:g} of the {n} places in {names[0] if len(names) == 1 else 'all weights'} is less than one"
            )
        out |= radix.positions({x: scores[x] for x in names}, k)
    if not any(len(i) for i in out.values()):
        raise UserError(f"selection {method} chose nothing: no entry may move by its rule on these data")
    return out


def _entries(places: Tensor, scored_shape: torch.Size, shape: torch.Size) -> Tensor:
    """Flat positions in a weight of flat positions in its scores, whose axes of length 1 stand for whole axes of the weight."""
    if scored_shape == shape:
        return places
    mask = torch.zeros(scored_shape.numel(), dtype=torch.bool)
    mask[places] = True
    return mask.view(scored_shape).expand(shape).reshape(-1).nonzero().squeeze(1)


def _warn(found: Selection) -> None:
    if found.density <= DENSE:
        return
    shapes = list(found.shapes.values())
    entries = sum(math.prod(s[:-2]) * (s[-2] + s[-1]) for s in shapes)
    rank = max(1, 8 * found.count // (4 * entries))
    warnings.warn(
        f"{found.density:.0%} of the entries were chosen: stored sparsely they take {8 * found.count:,} bytes, as much as a LoRA of rank "
        f"{rank}; below {DENSE:.0%} a sparse adapter is the smaller one",
        stacklevel=3,
    )
