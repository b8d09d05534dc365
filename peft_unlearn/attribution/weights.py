"""Which weights may move: scores of every entry of the base's own weights, and the selection of the highest.

A method is a function of what its parameters are called; `inputs.INPUTS` says what there is. It gives scores of one weight, higher = rather
chosen, -inf = never: one for each entry, or for each group of entries (an axis of length 1: all along it stand or fall together).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

import torch
from torch import Tensor

from .. import registry
from ..errors import UserError
from ..forward import Reference
from ..gradients.terms import Term
from ..progress import Progress
from ..registry import Method, Range, Source, selection
from ..tuners.linear import ALL_LINEAR
from ..tuners.selection import Selection
from .inputs import GRADIENTS, Found, needed_by
from .radix import largest
from .streamed import Rows, adapter_weights, eligible, gradients, input_norms, scored

DENSE = 0.1  # beyond this density a LoRA of usual rank is smaller and keeps more

_WAGLE = Source("WAGLE: Strategic Weight Attribution for LLM Unlearning", "https://arxiv.org/abs/2410.17509", 2024)
_SNIP = Source(
    "SNIP: Single-shot Network Pruning based on Connection Sensitivity", "https://arxiv.org/abs/1810.02340", 2019
)
_WANDA = Source(
    "A Simple and Effective Pruning Approach for Large Language Models", "https://arxiv.org/abs/2306.11695", 2024
)
_EMSO = Source("Get Confused Cautiously (EMSO)", "https://arxiv.org/abs/2408.04983", 2024)
_SURE = Source(
    "Catastrophic Failure of LLM Unlearning via Quantization (SURE)", "https://arxiv.org/abs/2410.16454", 2025
)
_OURS = Source("peft-unlearn: docs/selection.md", "https://github.com/peft-unlearn/peft-unlearn", 2026)


@selection("wagle", source=_WAGLE)
def wagle(
    weight: Tensor, forget_grad: Tensor, retain_grad: Tensor, weight_rms: float, retain_grad_rms: float, *,
    gamma: Annotated[float, Range(0, None, open_low=True)] | None = None,
) -> Tensor:  # fmt: skip
    """|(theta - g_r / gamma) g_f|: what taking the weight away would do to forgetting once the retain loss is back at its minimum.

    The closed form of a bi-level problem whose lower level has the diagonal Hessian gamma I. For a large gamma it is `snip`, for a small
    one |g_r g_f|. Gradients are means over target tokens, so that gamma does not depend on how many rows there are; the released code
    (OPTML-Group/WAGLE, gamma 1e-6) adds up the means of N batches, which is gamma / N here.

    Args:
        gamma: null: rms(g_r) / rms(theta), where both terms are of one size.
    """
    scale = gamma if gamma is not None else retain_grad_rms / (weight_rms or 1.0)
    return ((weight - retain_grad / (scale or 1.0)) * forget_grad).abs()


@selection("snip", source=_SNIP)
def snip(weight: Tensor, forget_grad: Tensor) -> Tensor:
    """|theta g_f|: how much the forget loss changes, to first order, when the weight is set to zero."""
    return (weight * forget_grad).abs()


@selection("gradient", source=_WAGLE)
def gradient(forget_grad: Tensor) -> Tensor:
    """|g_f|: where the forget loss is steepest."""
    return forget_grad.abs()


@selection("magnitude", source=_WAGLE)
def magnitude(weight: Tensor) -> Tensor:
    """|theta|: the largest weights, whatever the data."""
    return weight.abs()


@selection("wanda", source=_WANDA)
def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|theta| times the norm of the input feature that it is multiplied with, over the forget set."""
    return weight.abs() * input_norm


@selection("random", source=_WAGLE)
def random(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Every entry with equal chance: the control that any other method has to beat."""
    return torch.rand(weight.shape, generator=generator)


@selection("emso", source=_EMSO, faithful="reconstructed")
def emso(
    entropy_grad: Tensor, ascent_grad: Tensor, *, contrast: Literal["product", "agreeing", "difference"] = "product"
) -> Tensor:
    """EMSO-style, reconstructed: entries where maximizing the entropy and gradient ascent pull strongly and in one direction.

    The paper describes its contrastive gradient metric in words, and there is no code: a the gradient of the negative entropy, b that
    of gradient ascent, both on the forget set alone.

    Args:
        contrast: "product": a b, never where it is not positive; "agreeing": |a| where the signs agree, never elsewhere; "difference":
            |a| - |b|.
    """
    if contrast == "difference":
        return entropy_grad.abs() - ascent_grad.abs()
    agree = entropy_grad.sign() * ascent_grad.sign() > 0
    return torch.where(agree, entropy_grad * ascent_grad if contrast == "product" else entropy_grad.abs(), -torch.inf)


@selection("contrast_retain", source=_OURS, forget="neg_entropy", faithful="own")
def contrast_retain(forget_grad: Tensor, retain_grad: Tensor, retain_grad_mean: float) -> Tensor:
    """|g_f| / (|g_r| + mean |g_r|): steep for the forget set, flat for the retain set. Ours; unlike EMSO it needs retain rows."""
    return forget_grad.abs() / (retain_grad.abs() + (retain_grad_mean or 1.0))


@selection("sure", source=_SURE)
def sure(forget_grad: Tensor, input_axis: int) -> Tensor:
    """Norm of the forget gradient of every output row (neuron): whole rows are chosen, the paper's 90th percentile is ratio 0.1."""
    return forget_grad.norm(dim=input_axis, keepdim=True)


# --- the selection ----------------------------------------------------------------------------------------------------

Budget = Literal["global", "module"]
Unit = Literal["entry", "row", "column", "module"]


def select(
    model: Any,
    data: Mapping[str, Rows],
    *,
    method: str,
    ratio: float,
    hyper: Mapping[str, Any] | None = None,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    budget: Budget = "global",
    unit: Unit = "entry",
    space: Literal["base", "adapter"] = "base",
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
        unit: what is chosen as a whole, and what the share is of: single entries, or output rows, input columns (by the sum of their
            scores) or modules (by the mean; `about` holds them all as `scores`).
        space: of the base's weights, or of the trainable adapter's own ("adapter"), which must not be fresh.
        forget: the objective of `forget_grad`: terms, or a name; default the method's own.
        reference: what such an objective compares with; None: the model itself.
        size: rows of a micro-batch.
        accumulators, device: dtype and place of the summed gradients; default float32 where the model is.
        about: what else the selection records (digests of base and data).

    Raises:
        UserError: no such method, a ratio outside (0, 1] or one that chooses nothing, a set that the method reads is absent.
    """
    chosen = check(method, hyper or {}, ratio, budget, unit)
    values = chosen.resolve(hyper or {})
    params = eligible(model, target_modules) if space == "base" else adapter_weights(model, chosen.name != "random")
    needed = needed_by(chosen)
    terms = {what: _terms(what, chosen, forget) for what in GRADIENTS if what in needed}
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
        found = Found(model, params, grads, norms, seed, device or next(iter(params.values())).device)
        scores = {n: partial(_score, chosen, values, found, n, unit) for n in params}
        with torch.no_grad():
            indices = _chosen(scores, params, ratio, budget)
            about = {
                **(about or {}),
                **({"scores": {n: float(s()) for n, s in scores.items()}} if unit == "module" else {}),
            }
    record = {
        "method": chosen.name, "hyper": values, "ratio": ratio, "budget": budget, "unit": unit, "seed": seed,
        "rows": {n: len(data[n]) for n in sorted(wanted)},
        "terms": {w: {t.objective.name: {**t.hyper, "weight": t.weight, "batch": t.batch} for t in ts} for w, ts in terms.items()},
        "overall": found.stated, **(about or {}),
    }  # fmt: skip
    out = Selection(indices, {n: tuple(p.shape) for n, p in params.items()}, record)
    _warn(out)
    return out


def check(name: str, hyper: Mapping[str, Any], ratio: float, budget: str, unit: str) -> Method:
    """The method of that name, if it and the rest of what `select` takes are right; else everything wrong with them at once."""
    method = registry.get("selection", name)
    wrong = method.check(hyper)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        wrong.append(f"ratio {ratio!r} must lie in (0, 1]: the share of the entries that may move")
    if budget not in ("global", "module"):
        wrong.append(f"budget {budget!r} is not one of global, module")
    if unit not in get_args(Unit):
        wrong.append(f"unit {unit!r} is not one of {', '.join(get_args(Unit))}")
    if wrong:
        raise UserError("selection: " + "; ".join(wrong))
    return method


def _terms(what: str, method: Method, forget: Sequence[Term] | str | None) -> list[Term]:
    name, batch = GRADIENTS[what]
    if name is None and forget is not None and not isinstance(forget, str):
        return list(forget)
    objective = registry.get("objective", name or str(forget or method.extra["forget"]))
    if wrong := objective.check({}):
        raise UserError(f"selection {method.name}: {'; '.join(wrong)}")
    return [Term(what, batch, objective, 1.0, objective.resolve({}))]


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    first, *rest = parts
    for other in rest:
        for name, g in first.items():
            g.add_(other[name])
    return first


def _score(method: Method, hyper: Mapping[str, Any], found: Found, name: str, unit: str = "entry") -> Tensor:
    score = method.fn(*(found.feed(i, name) for i in method.inputs), **hyper)
    if bool(score.isnan().any()):
        raise UserError(
            f"selection {method.name} gave scores of {name} that are not numbers: its inputs are too large, or the base holds NaN"
        )
    if unit == "entry":
        return score
    whole = torch.where(score == -torch.inf, 0.0, score).expand(found.params[name].shape)
    if unit == "module":
        return whole.mean().view([1] * whole.dim())
    inputs = found.axes[name]
    outputs = 2 * whole.dim() - 3 - inputs  # the other one of the last two
    return whole.sum(inputs if unit == "row" else outputs, keepdim=True)


def _chosen(
    scores: Mapping[str, Callable[[], Tensor]], params: Mapping[str, Tensor], ratio: float, budget: str
) -> dict[str, Tensor]:
    """Flat positions in each weight, rising, int64 on the CPU."""

    def wanted(n: int) -> int:
        if (k := math.floor(ratio * n + 1e-9)) < 1:
            raise UserError(f"selection: ratio {ratio:g} of the {n} entries (or rows) of {where} is less than one")
        return k

    out = {}
    for names in [list(scores)] if budget == "global" else [[n] for n in scores]:
        where = names[0] if len(names) == 1 else "all these weights"
        for name, taken in largest({x: scores[x] for x in names}, wanted):
            whole = taken.expand(params[name].shape)  # an axis of length 1 stands for all along it
            out[name] = whole.reshape(-1).nonzero().squeeze(1).cpu()
    if not any(len(i) for i in out.values()):
        raise UserError("selection: nothing was chosen, no entry may move by this method on these data")
    return out


def _warn(found: Selection) -> None:
    if found.density <= DENSE or found.about["unit"] != "entry":
        return
    shapes = list(found.shapes.values())
    entries = sum(math.prod(s[:-2]) * (s[-2] + s[-1]) for s in shapes)
    rank = max(1, 8 * found.count // (4 * entries))
    warnings.warn(
        f"{found.density:.0%} of the entries were chosen: stored sparsely they take {8 * found.count:,} bytes, as much as a LoRA of rank "
        f"{rank}; below {DENSE:.0%} a sparse adapter is the smaller one",
        stacklevel=3,
    )
