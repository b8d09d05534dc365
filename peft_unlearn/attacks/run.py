"""Attacks on several subjects, and how much of what was forgotten each brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Errors, UserError, nearest
from ..evaluation.measured import Array, Unmeasured
from ..evaluation.score import Subject
from ..folder.manifest import path_like
from ..folder.versions import installed_versions
from ..registry import Method, get, methods
from .case import Case, Outcome, Rows, split

if TYPE_CHECKING:
    from ..evaluation.plan import Progress

FORMAT = 1
SMALLEST_GAP = 0.02  # a base that much above the unlearned model has nothing to be recovered
SHOWN = 20


@dataclass(frozen=True)
class Wanted:
    """One attack with its settings. label: its key in the result; the same attack may be wanted with several settings."""

    label: str
    method: Method
    settings: dict[str, Any]


def wanted(requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Wanted]:
    """Attacks by name with their hyper-parameters, defaults filled in.

    A single value stands for a list of one. A label is the attack's name, the values of the settings that have no
    default (``quantize:int8``), and those in which several requests for it differ. Raises `UserError` with every unknown attack,
    unknown or wrong hyper-parameter, and double request at once.
    """
    errors = Errors()
    found: list[tuple[Method, dict[str, Any]]] = []
    for name, given in requests:
        try:
            method = get("attack", name)
        except UserError as problem:
            errors.absorb(problem)
            continue
        hyper = {
            k: [v] if k in method.params and method.params[k].type == "list" and not isinstance(v, (list, tuple)) else v
            for k, v in given.items()
        }
        for complaint in method.check(hyper):
            errors.add(complaint)
        found.append((method, method.resolve(hyper)))
    out: dict[str, Wanted] = {}
    for method, settings in found:
        others = [s for m, s in found if m.name == method.name]
        differ = [k for k in settings if method.params[k].required or any(s[k] != settings[k] for s in others)]
        label = ":".join([method.name, *(str(settings[k]) for k in differ)])
        if label in out:
            errors.add(f"attack {label!r} is asked for twice")
        out[label] = Wanted(label, method, settings)
    if not found and not errors.messages:
        errors.add("name at least one." + nearest("", [m.name for m in methods("attack")]))
    errors.raise_if_any("attacks")
    return list(out.values())


def run_attacks(
    subjects: Mapping[str, Subject | None],
    attacks: Sequence[Wanted],
    data: Any,
    tokenizer: Any,
    *,
    shown: int = SHOWN,
    n: int | None = None,
    seed: int = 0,
    template: str | None = None,
    checkpoints: Mapping[str, Any] | None = None,
    adapter_id: str | None = None,
    base: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run every attack on every subject.

    Args:
        subjects: as for `score`; "base" and "retain_only" are the ends of the scale, every other one is unlearned.
            None: the subject is not there, its blocks are null. Each is entered once, in order.
        shown: forget rows that attackers see; the facts of all others are scored (`case.split`).
        n: at most so many of the scored rows.
        checkpoints: subject -> folder its base was loaded from.

    Returns:
        The JSON of an attack block: ``{"format", "attacks": {label: {"attack", "settings", "n", "subjects",
        "recovery", "about"}}, "rows", "adapter_id", "base", "versions"}``.

    Raises:
        UserError: no forget row is left to be scored.
    """
    rows, seen = _rows(data, shown, n, seed)
    outcomes: dict[str, dict[str, Outcome | str]] = {w.label: {} for w in attacks}
    for name, subject in subjects.items():
        if subject is None:
            continue
        with subject() as model:
            case = Case(
                name, tokenizer, data, rows, seen, lambda model=model: nullcontext(model),
                template=template or getattr(data, "template", "qa"), seed=seed, progress=progress,
                checkpoint=(checkpoints or {}).get(name),
            )  # fmt: skip
            for w in attacks:
                try:
                    outcomes[w.label][name] = w.method.fn(case, **w.settings)
                except Unmeasured as why:
                    outcomes[w.label][name] = str(why)
    absent = [name for name, subject in subjects.items() if subject is None]
    return {
        "format": FORMAT,
        "attacks": {w.label: _block(w, outcomes[w.label], absent, len(rows)) for w in attacks},
        "rows": {"scored": len(rows), "shown": len(seen), "seed": seed},
        "adapter_id": adapter_id,
        "base": base,
        "versions": installed_versions(),
    }


def _rows(data: Any, shown: int, n: int | None, seed: int) -> tuple[Rows, Rows]:
    forget = data["forget"] if isinstance(data, Mapping) else data.forget
    rows, seen = split(forget, shown, seed)
    if not rows:
        raise UserError("data: the forget set has no row left to be scored")
    if n is not None:
        from ..evaluation.plan import evenly

        rows = [rows[i] for i in evenly(len(rows), n)]
    return rows, seen


def _block(w: Wanted, found: Mapping[str, Outcome | str], absent: Sequence[str], n: int) -> dict[str, Any]:
    """One attack's JSON."""
    reasons = {**dict.fromkeys(absent, "this model was not given")}
    reasons.update({name: o for name, o in found.items() if isinstance(o, str)})
    done = {name: o for name, o in found.items() if isinstance(o, Outcome)}
    base = done.get("base")
    unlearned = [name for name in (*found, *absent) if name != "base"]
    return {
        "attack": w.method.name,
        "settings": {k: Path(v).name if isinstance(v, str) and path_like(v) else v for k, v in w.settings.items()},
        "n": next((o.n for o in done.values()), n),
        "subjects": {
            **{name: {"before": _means(o.before), "after": _means(o.after)} for name, o in done.items()},
            **dict.fromkeys(reasons),
        },
        "recovery": {
            name: recovery(done[name], base, reasons.get("base")) if name in done else None for name in unlearned
        },
        "about": {name: o.about for name, o in done.items()},
        "reasons": reasons,
    }


def _means(values: Mapping[str, Array]) -> dict[str, float | None]:
    return {m: float(v.mean()) if len(v) and np.isfinite(v).all() else None for m, v in values.items()}


def recovery(outcome: Outcome, base: Outcome | None, why_no_base: str | None = None) -> dict[str, dict[str, Any]]:
    """(after - before) / (base - before) of the means over rows, per measure: {"value", "ci95", "reason"}.

    0 = the attack brought nothing back, 1 = as if nothing had been forgotten; above 1 and below 0 are possible. The
    interval is a percentile bootstrap over rows, before, after and base drawn together. Null where a row has no value,
    or where the base is not clearly above the unlearned model (a gap under `SMALLEST_GAP`, or one whose own interval
    reaches it is too small to be divided by).
    Source: Unlearn-Smooth's relearning evaluation (https://arxiv.org/abs/2502.05374), as a share.
    """
    out = {}
    for measure, before in outcome.before.items():
        try:
            if base is None or measure not in base.before:
                raise Unmeasured(f"the base was not measured: {why_no_base or 'it was not given'}")
            if measure not in outcome.after:
                raise Unmeasured("the attacked model has no such measure")
            value, ci = _ratio(before, outcome.after[measure], base.before[measure])
            out[measure] = {"value": value, "ci95": ci, "reason": None}
        except Unmeasured as why:
            out[measure] = {"value": None, "ci95": None, "reason": str(why)}
    return out


def _ratio(before: Array, after: Array, base: Array, resamples: int = 1000) -> tuple[float, list[float] | None]:
    """(value, interval), all three (rows,) of the same rows."""
    if not len(before) == len(after) == len(base):
        raise Unmeasured(f"before, after and base have {len(before)}, {len(after)} and {len(base)} rows")
    table = np.stack([after - before, base - before], 1)  # (rows, 2)
    n = len(table)
    if bad := int((~np.isfinite(table)).any(1).sum()):
        raise Unmeasured(f"{bad} of {n} rows have no value: the model's logits are NaN there")
    gain, gap = table.mean(0)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=resamples)  # (resamples, rows)
    drawn = counts @ table / n  # (resamples, 2)
    low = float(np.percentile(drawn[:, 1], 2.5))
    if gap < SMALLEST_GAP or low <= 0:
        raise Unmeasured(
            f"the base has only {gap:+.3f} more than the un-attacked model here: too small a gap to be recovered from"
        )
    if n < 2:
        return float(gain / gap), None
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = drawn[:, 0] / drawn[:, 1]
    shares = shares[np.isfinite(shares)]
    return float(gain / gap), [float(x) for x in np.percentile(shares, [2.5, 97.5])]
