"""One number over several, by our own definitions.

open-unlearning's paper ranks methods by harmonic means whose exact maps are not public and not in its code; tables that were
recomputed by others order the methods differently. So these are named and defined here, and are not the paper's columns: read
the parts beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ...registry import metric
from ..measured import Unmeasured
from .sources import OPEN_UNLEARNING, TOFU

OVER = {"forget": "higher"}


def harmonic_mean(values: Iterable[float]) -> float:
    """n / sum(1 / value); 0 where a value is 0. Raises Unmeasured without values and ValueError for a negative one."""
    found = np.array(list(values), dtype=np.float64)
    if not len(found):
        raise Unmeasured("the suite names no parts")
    if np.any(found < 0):
        raise ValueError(f"a harmonic mean is for values >= 0, got {found.tolist()}")
    return 0.0 if np.any(found == 0) else float(len(found) / np.sum(1.0 / found))


def closeness(value: float, reference: float) -> float:
    """s = max(0, 1 - |a - r| / max(r, 1 - r)) for a, r in [0, 1]: 1 = the retain model's value, 0 = as far from it as
    can be. Our own map."""
    return max(0.0, 1.0 - abs(value - reference) / max(reference, 1.0 - reference))


@metric("model_utility", source=TOFU, better={"retain": "higher"})
def model_utility(parts: Mapping[str, float]) -> float:
    """Harmonic mean of the suite's parts; one part that is 0 makes it 0.

    parts: name -> value in [0, 1]; which ones is the suite's choice (TOFU: probability, ROUGE and truth ratio on
    three sets).
    Raises Unmeasured without parts and ValueError for a negative one.
    """
    return harmonic_mean(parts.values())


@metric("mem_score", source=OPEN_UNLEARNING, title="memorization score", better=OVER, faithful="reconstructed")
def mem_score(parts: Mapping[str, float]) -> float:
    """Harmonic mean of 1 - part over measures of memorization in [0, 1]; 1 = nothing is left, 0 = one part is whole.

    Ours: not divided by the base's own value.
    """
    return harmonic_mean(1.0 - v for v in parts.values())


@metric("priv_score", source=OPEN_UNLEARNING, title="privacy score", better=OVER, faithful="reconstructed")
def priv_score(parts: Mapping[str, float], reference_parts: Mapping[str, float]) -> float:
    """Harmonic mean of `closeness` to the retain model over AUCs of membership attacks; 1 = as that model."""
    return harmonic_mean(closeness(v, reference_parts[key]) for key, v in parts.items())


@metric(
    "utility_score", source=OPEN_UNLEARNING, better={"retain": "higher"}, reference="base", faithful="reconstructed"
)
def utility_score(parts: Mapping[str, float], base_parts: Mapping[str, float]) -> float:
    """Harmonic mean of part / the base's own, at most 1 each; 1 = as useful as the base.

    Raises Unmeasured where the base's own part is 0.
    """
    if useless := [key for key in parts if base_parts[key] <= 0]:
        raise Unmeasured(f"the base's own {useless[0]} is 0: nothing is relative to it")
    return harmonic_mean(min(1.0, v / base_parts[key]) for key, v in parts.items())


@metric(
    "overall_score", source=OPEN_UNLEARNING, better=OVER, reference="retain_only and base", faithful="reconstructed"
)
def overall_score(parts: Mapping[str, float]) -> float:
    """Harmonic mean of memorization, privacy and utility scores: 0 where one of them is 0."""
    return harmonic_mean(parts.values())
