"""`learn_sum`: a request that no vector was trained for, answered by a few scalars in front of vectors that there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.bundle import ForgetRetain
from ..data.collate import PairedRows, collate
from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.fetch import resolve_adapter
from ..folder.read import AdapterFolder, read_adapter
from ..forward import Reference
from ..merging.compose import Composition, compose
from ..merging.vectors import is_vector
from ..stack.attach import attach
from ..tuners.forget_vector.layer import ForgetVectorLayer
from .config import UnlearnConfig, require_sets
from .images import check_images, check_kind

MOST = 10
"""Scalars of one sum: the paper's pre-computed vectors of ten classes."""


class Coefficients(nn.Module):
    """Scalars (vectors,) in place of the scales of the vectors on a layer, each times the scale it has."""

    def __init__(self, layer: ForgetVectorLayer) -> None:
        super().__init__()
        self.names = list(layer.scaling)
        self.values = nn.Parameter(torch.zeros(len(self.names), device=layer.weight.device))
        layer.scaling = _Live(self, dict(layer.scaling))


class _Live(dict[str, Any]):
    """Adapter -> its scale times its scalar, as a tensor that gradients go back from."""

    def __init__(self, of: Coefficients, scales: dict[str, float]) -> None:
        super().__init__(scales)
        self.of = of

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name) * self.of.values[self.of.names.index(name)]


def learn_sum(
    parts: Sequence[str | Path],
    data: Any,
    out: str | Path,
    *,
    base: str | Path | None = None,
    steps: int = 60,
    learning_rate: float = 0.05,
    rows: int = 32,
    seed: int = 0,
    name: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> Composition:
    """Learn one scalar for each of `parts`, forget vectors of one base, on a request's data, and write their sum.

    The loss is that of the first part's own recipe, the model frozen, the scalars start at zero (SGD). Source: compositional unlearning
    of Sun et al., Forget Vectors at Play, https://arxiv.org/abs/2412.16780.

    Args:
        data: the request: a bundle, or what `ForgetRetain.load` takes, e.g. ``embedded:digits?forget=3,5``.
        rows: forget rows of a step; retain rows join them as in the first part's recipe.

    Raises:
        UserError: no forget vectors, more than `MOST`, data that do not fit; or every scalar ends at zero.
    """
    folders = _vectors(parts)
    bundle, first = ForgetRetain.load(data), folders[0].manifest
    model = load_base(base_dir := resolve_base(first.base.ref, override=base, revision=first.base.revision))
    check_kind(model, bundle)
    model = attach(model, {f"v{i}": f for i, f in enumerate(folders)})
    layer = next(m for m in model.modules() if isinstance(m, ForgetVectorLayer))
    for i, folder in enumerate(folders):
        layer.scaling[f"v{i}"] *= float(folder.manifest.scale)
    model.coefficients = scalars = Coefficients(layer)
    recipe: Mapping[str, Any] = folders[0].recipe
    spec = recipe.get("data")
    share = spec.get("per_anchor", 1) if isinstance(spec, Mapping) else 1
    config = UnlearnConfig(output_dir=str(out), terms=dict(recipe["terms"]), per_anchor=share, seed=seed)
    require_sets(config, bundle)
    sets = {n: bundle.encode(n, load_tokenizer(base_dir)) for n in config.sets}
    check_images(model.get_base_model(), sets)
    _descend(
        model, scalars.values, config, PairedRows(sets, "forget", share, seed), steps, learning_rate, rows, progress
    )
    weights = scalars.values.detach().tolist()
    return compose(
        list(zip([f.path for f in folders], weights, strict=True)), out, base=base, name=name,
        learned={"data": bundle.describe(config.sets), "steps": steps, "learning_rate": learning_rate, "rows": rows, "seed": seed},
    )  # fmt: skip


def _vectors(parts: Sequence[str | Path]) -> list[AdapterFolder]:
    folders = [read_adapter(resolve_adapter(p)) for p in parts]
    if odd := next((f for f in folders if not is_vector(f)), None):
        raise UserError(
            f"{odd.path}: coefficients are learned in front of forget vectors, and this is {odd.config.get('peft_type')}"
        )
    if not 1 <= len(folders) <= MOST:
        raise UserError(f"compose --learn: from 1 to {MOST} forget vectors, not {len(folders)}")
    if len(digests := {f.manifest.base.digest for f in folders}) > 1:
        raise UserError(f"compose --learn: these vectors stand on {len(digests)} different bases")
    if not isinstance(folders[0].recipe.get("terms"), Mapping):
        raise UserError(
            f"{folders[0].path}: its recipe names no terms (is it a sum itself?); put a trained vector first"
        )
    return folders


def _descend(
    model: Any, values: nn.Parameter, config: UnlearnConfig, pairs: PairedRows, steps: int, rate: float, rows: int,
    progress: Callable[[str, int, int], None] | None,
) -> None:  # fmt: skip
    """SGD on the scalars by the window's own gradients."""
    for n, p in model.named_parameters():
        p.requires_grad_(n.startswith("coefficients"))
    window, device = config.window(model, Reference()), values.device
    for step in range(steps):
        items = [pairs[step * rows + i] for i in range(rows)]
        batch = {n: {k: v.to(device) for k, v in b.items()} for n, b in collate(items, 0).items()}
        (update,) = window.step([batch]).update.tensors
        with torch.no_grad():
            values.sub_(rate * update)
        if progress is not None:
            progress("learning coefficients", step + 1, steps)
