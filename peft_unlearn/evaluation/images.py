"""Reading images: what a suite of classes needs, one forward for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..data.images import ImageSets
from .measured import Ragged
from .provider import providers_asked
from .rows import evenly, rows_of
from .shapes import Plan, SetPlan, Suite
from .teacher import TeacherForced, evaluating, logp_and_correct

_WHY = "the rows are images, which have no text"
_ABSENT: dict[str, str] = {"generation": _WHY, "value": _WHY, "perturbed": _WHY}


def plan_images(suite: Suite, data: ImageSets, processor: Any, n: int | None = None) -> Plan:
    """What is to be read of a bundle of images: every row once for each set that holds it.

    processor: the base's image processor, for images that are not prepared. n: at most so many rows of each set, evenly spaced.
    """
    sets: dict[str, SetPlan] = {}
    encoded: list[Any] = []
    for name, spec in suite.sets.items():
        rows = rows_of(data, spec.source) or []
        rows = [rows[i] for i in evenly(len(rows), n)]
        plan = SetPlan(
            spec, rows, missing=dict(_ABSENT), absent=None if rows else f"the data has no set {spec.source!r}"
        )
        plan.answer = list(range(len(encoded), len(encoded) + len(rows)))
        encoded += data.encode(name, processor, rows=rows)
        sets[name] = plan
    for s in sets.values():
        s.against = sets.get(s.spec.against or "")
    return Plan(suite, processor, sets, [("", "")] * len(encoded), encoded, providers_asked(sets))


def read_images(
    model: Any, encoded: Sequence[Any], size: int = 256, progress: Callable[[int, int], None] | None = None
) -> TeacherForced:
    """Log-probability of each image's class, and whether it is the one that the model names; rows of one value."""
    import torch

    from ..data.collate import pad
    from ..forward import Pass

    device = next(model.parameters()).device
    found = [np.zeros((0, 2))]
    with torch.no_grad(), evaluating(model):
        for at in range(0, len(encoded), size):
            batch = {k: v.to(device) for k, v in pad(encoded[at : at + size], 0).items()}
            found.append(Pass(model, batch).map_logits(logp_and_correct).double().cpu().numpy())
            if progress is not None:
                progress(min(at + size, len(encoded)), len(encoded))
    columns, offsets = np.concatenate(found), np.arange(len(encoded) + 1)
    nothing = Ragged.of([[]] * len(encoded))
    logp, correct = (Ragged(columns[:, k], offsets) for k in (0, 1))
    return TeacherForced(logp, correct, columns[:, 1] == 1.0, nothing, nothing)
