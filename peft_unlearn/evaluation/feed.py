"""What a metric is given: its parameters by name, from what was read, generated and provided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .measured import Ragged, Unmeasured
from .metrics.likelihood import truth_log_ratio
from .provider import PREFIXES, provider_of

if TYPE_CHECKING:
    from .shapes import Measured, SetPlan


def feed(
    name: str,
    s: SetPlan,
    m: Measured,
    select: NDArray[np.int64],
    reference: Measured | None,
    base: Measured | None = None,
) -> Any:
    """What a metric's parameter of that name is given; Unmeasured where the rows or the subjects do not have it."""
    if s.spec.name in m.too_long:
        raise Unmeasured(m.too_long[s.spec.name])
    if provider_of(name) is not None:
        values = m.extra.get(name, {}).get(s.spec.name, Unmeasured(f"{name} was not measured for this subject"))
        if isinstance(values, Unmeasured):
            raise values
        return _taken(values, select)
    if name not in INPUTS and (prefix := next((p for p in PREFIXES if name.startswith(p)), None)):
        bare = name.removeprefix(prefix)
        if prefix == "against_":
            return feed(bare, other := _against(s), m, np.arange(len(other.rows)), reference, base)
        other = reference if prefix == "reference_" else base
        if other is None:
            which = "retain-only model" if prefix == "reference_" else "base"
            raise Unmeasured(f"there is no {which} to compare with")
        return feed(bare, s, _same_rows(other, m), select, reference, base)
    answer = [s.answer[i] for i in select]
    if name in ("right_logp", "wrong_logp", "log_ratio", "reference_log_ratio"):
        if "perturbed" in s.missing:
            raise Unmeasured(s.missing["perturbed"])
        if name == "reference_log_ratio":
            if reference is None:
                raise Unmeasured("there is no retain-only model to compare with")
            m = _same_rows(reference, m)
        right = m.mean_logp[s.right]
        wrong = Ragged.of([m.mean_logp[w] for w in s.wrong])
        return {"right_logp": right, "wrong_logp": wrong}.get(name, truth_log_ratio(right, wrong))
    if name == "logp":
        return m.forced.logp.take(answer)
    if name == "correct":
        return m.forced.correct.take(answer)
    if name in ("logp_mean", "logp_std"):
        return getattr(m.forced, name).take(answer)
    if name == "role":
        return s.spec.role
    key = {"generation": "generation", "value": "value"}.get(name)
    if key in s.missing:
        raise Unmeasured(s.missing[key])
    if name == "generation":
        return [m.said[s.asks[i]] for i in select]
    if name == "value":
        return [str(s.rows[i]["value"]) for i in select]
    if name == "answer":
        return [s.answers[i] for i in select]
    if name == "rows":
        return [s.rows[i] for i in select]
    raise TypeError(f"no metric can be fed {name!r}; known: {', '.join(INPUTS)}")


def _same_rows(other: Measured, m: Measured) -> Measured:
    """Whoever brings a reading from elsewhere must have read the same pairs; else rows would be compared with strangers."""
    if len(other.mean_logp) != len(m.mean_logp):
        raise Unmeasured(
            f"the model to compare with was read on {len(other.mean_logp)} texts and this one on {len(m.mean_logp)}: other rows"
        )
    return other


def _taken(values: Any, select: NDArray[np.int64]) -> Any:
    if isinstance(values, Ragged):
        return values.take(select)
    return values[select] if isinstance(values, np.ndarray) else [values[i] for i in select]


def _against(s: SetPlan) -> SetPlan:
    if s.spec.against is None:
        raise Unmeasured("the suite names no set to compare this one with (key 'against')")
    if s.against is None or not s.against.rows:
        why = "" if s.against is None or s.against.absent is None else f": {s.against.absent}"
        raise Unmeasured(f"there are no {s.spec.against} rows to compare with{why}")
    return s.against


INPUTS = {
    "logp": "Ragged, token log-probabilities of each row's answer, EOS included",
    "correct": "Ragged, 1.0 / 0.0 arg-max right, EOS left out",
    "generation": "list[str], the greedy answers",
    "answer": "list[str], the right answers",
    "value": "list[str], what a right answer must contain",
    "right_logp": "(rows,) mean token log-probability of the paraphrased answer, or of the answer where there is none",
    "wrong_logp": "Ragged, mean token log-probabilities of each row's wrong answers",
    "log_ratio": "(rows,) log truth ratio, likelihood.truth_log_ratio",
    "reference_log_ratio": "(rows,) the same of the retain-only model",
    "logp_mean": "Ragged, mean of log p over the vocabulary under p at each target of the answer",
    "logp_std": "Ragged, its standard deviation",
    "rows": "list[dict], the rows themselves",
    "role": "forget, retain or holdout",
}
