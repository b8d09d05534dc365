"""A recipe with ``oneshot``: the method fills a fresh adapter, and the largest scale within a budget of disruption is worked into B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..attribution.moments import factors, square
from ..attribution.oneshot import Shot
from ..data.collate import padding_id
from ..errors import Errors, UserError
from ..gradients.parse import Chosen, parse_method
from ..progress import bars
from ..registry import get
from .config import encode_set
from .disruption import make_kl, within

KL, MOST = 0.05, 1e6
ROWS = 256  # of the retain set, on which the KL is measured
_OTHERS = ("rule", "smoothing", "step_size", "averaging", "selection", "stack", "train", "eval")


def understood(recipe: Mapping[str, Any], kind: str, errors: Errors) -> tuple[Chosen, float] | None:
    """((method, hyper-parameters), KL budget in nats a token of the retain set) of a recipe's ``oneshot``."""
    spec, budget = recipe.get("oneshot"), KL
    if isinstance(spec, Mapping) and len(spec) == 1 and isinstance(inner := next(iter(spec.values())), Mapping):
        budget = inner.get("kl", KL)
        spec = {next(iter(spec)): {k: v for k, v in inner.items() if k != "kl"}}
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        errors.add(f"oneshot: kl is a budget in nats a token, above 0, e.g. 0.05, not {budget!r}")
    chosen, _ = parse_method("oneshot", spec, errors)
    if chosen is not None and kind not in ("lora", "expert_lora"):
        errors.add(f"oneshot fills the factors of lora or expert_lora, and adapter.type is {kind}")
    if chosen is not None and (others := [k for k in _OTHERS if recipe.get(k)]):
        errors.add(f"oneshot trains nothing, so {', '.join(others)} would mean nothing: leave it out")
    return None if chosen is None else (chosen, budget)


def terms_of(spec: Any) -> dict[str, Any]:
    """What a one-shot recipe without terms takes gradients of, and keeps."""
    name = spec if isinstance(spec, str) else next(iter(spec))
    return {"forget": {get("oneshot", name).extra["forget"]: {}}, "retain": {"nll": {}}}


def fire(run: Any, trainer: Any, tokenizer: Any) -> dict[str, Any]:
    """Fill the trainer's adapter; what the manifest says of it. Raises `UserError` where no scale keeps the budget."""
    (method, hyper), budget = run.oneshot
    model = trainer.bare.eval()
    sets = [n for n in ("forget", "retain", "holdout") if run.data.rows(n)]
    rows = {n: encode_set(run.config, run.data, n, tokenizer) for n in sets}
    forget = [t for t in run.config.term_list if t.gradient == "forget"]
    with bars() as progress:
        shot = Shot(model, rows, forget, padding_id(tokenizer), run.config.train_batch_size, run.config.seed, progress)
        method.fn(shot, **hyper)
        size = float(sum(square(a, b) for _, a, b in factors(model))) ** 0.5
        if not 0 < size < float("inf"):
            raise UserError(f"oneshot {method.name}: the delta is {size:g}: these rows give it no direction")
        b = list(shot.side("B").values())
        _times(b, 1 / size)

        @contextmanager
        def at(scale: float) -> Iterator[Any]:
            kept = [p.detach().clone() for p in b]
            _times(b, scale)
            yield model
            for p, k in zip(b, kept, strict=True):
                p.data.copy_(k)

        measure, n = make_kl(model, tokenizer, run.data, "retain", ROWS, at)
        scale, seen = within(measure, budget, MOST, progress)
    if scale is None:
        raise UserError(f"oneshot {method.name}: no size of the delta keeps a KL of {budget:g} on the retain set")
    _times(b, scale)
    return {method.name: {**hyper, "kl": budget, "kl_found": seen[scale], "retain_rows": n, "delta": scale}}


@torch.no_grad()
def _times(params: list[Any], factor: float) -> None:
    for p in params:
        p.mul_(factor)
