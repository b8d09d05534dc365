"""What can be said of an adapter in words: one paragraph of verdict, and what was not measured.

Every sentence is made from stored numbers by fixed rules; a number that is missing takes its sentence with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .text import interval, named, number, percent

# the first that is there speaks
MEASURES = ("extraction_strength", "value_accuracy", "accuracy", "rouge_l_recall", "probability")
FORGETS, KEEPS, DISTINCT = 0.9, 0.95, 0.05
MEANING = {
    "extraction_strength": "Extraction strength, the part of an answer that follows by itself,",
    "value_accuracy": "The share of answers that name the right value", "probability": "The probability of the right answer",
    "rouge_l_recall": "ROUGE-L recall of the right answer", "accuracy": "The share of images whose class is named right",
}  # fmt: skip


@dataclass
class Evidence:
    """What is known of one adapter. Any of it but the name may be missing.

    folder: as the user named it, for commands.   scale, scale_measured: now, and when the suite's numbers were taken.
    evaluation: eval.json with its blocks "attacks" and "calibration".   theirs: what of it was not measured by this installation: the
    suite, the calibration, attacks by name.   about: (label, text) lines on method, data and versions.
    """

    name: str
    folder: str
    adapter_id: str = ""
    base: str = ""
    scale: float = 1.0
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    forget_sha256: str = ""
    about: Sequence[tuple[str, str]] = ()
    recipe: str = ""
    theirs: Sequence[str] = ()

    @property
    def scale_measured(self) -> float:
        found = self.evaluation.get("scale", self.scale)
        found = next(iter(found.values()), self.scale) if isinstance(found, Mapping) else found
        return float(found)

    def value(self, subject: str, key: str | None) -> float | None:
        found = (self.evaluation.get("subjects") or {}).get(subject) or {}
        return None if key is None else found.get(key)

    def detail(self, subject: str, key: str | None) -> Mapping[str, Any]:
        found = ((self.evaluation.get("details") or {}).get(subject) or {}).get(key)
        return found if isinstance(found, Mapping) else {}

    def shown(self, subject: str, key: str | None) -> str:
        """Value with interval, as text."""
        return number(self.value(subject, key)) + interval(self.detail(subject, key).get("ci95"))

    def key(self, role: str) -> str | None:
        """The key by which forgetting ("forget") or keeping ("retain") is judged: the suite's own set first."""
        found = [k for k, v in ((self.evaluation.get("subjects") or {}).get("adapter") or {}).items() if v is not None]
        for metric in MEASURES:
            exact = [k for k in found if k == f"{role}/{metric}"]
            near = [k for k in found if k.startswith(role) and k.endswith(f"/{metric}")]
            if exact or near:
                return (exact or near)[0]
        return None

    def blocks(self, name: str) -> Mapping[str, Any] | None:
        found = self.evaluation.get(name)
        return found if isinstance(found, Mapping) and found else None


# -- the verdict ------------------------------------------------------------------------------------------------------


def verdict(e: Evidence, spread: Mapping[str, Sequence[float]] | None = None) -> str:
    """One paragraph: conditions, what is forgotten, what it cost, what brings it back, how near the retain model is.

    spread: of further retain models, trained with other seeds, "p": their forget quality against the first.
    """
    p = (spread or {}).get("p", ())
    return " ".join((_conditions(e), *_forgotten(e), *_kept(e), *_against_retain_model(e, p), *_back(e)))


def _conditions(e: Evidence) -> str:
    if e.key("forget") is None:
        return f"{e.name}: no evaluation is stored with this adapter, so nothing can be said of what it forgets."
    n = [f"{e.detail('adapter', k).get('n')} {role}" for role in ("forget", "retain") if (k := e.key(role))]
    conditions = [
        f"suite {e.evaluation.get('suite')}: {' and '.join(n)} rows",
        f"base {e.base}",
        f"scale {e.scale_measured:.3g}",
    ]
    conditions += [] if e.seed is None else [f"one training run, seed {e.seed}"]
    conditions += ["numbers of its author, not measured here"] if "suite" in e.theirs else []
    text = f"{e.name} ({', '.join(conditions)}), for whoever leaves it on:"
    if abs(e.scale_measured - e.scale) > 1e-9:
        text = (
            f"These numbers were taken at scale {e.scale_measured:.3g}; the adapter now has scale {e.scale:.3g}. {text}"
        )
    return text


def share_forgotten(e: Evidence) -> float | None:
    """How much of the way from the base to the retain model (else to 0) the adapter goes on the forget set; None where it is unknown."""
    base, now, floor = (e.value(s, e.key("forget")) for s in ("base", "adapter", "retain_only"))
    if base is None or now is None:
        return None
    floor = floor if floor is not None and floor < base else 0.0
    return (base - now) / (base - floor) if base > floor else 0.0


def _forgotten(e: Evidence) -> list[str]:
    key = e.key("forget")
    base, now, retain_model = (e.value(s, key) for s in ("base", "adapter", "retain_only"))
    if key is None or base is None or now is None:
        return []
    share = share_forgotten(e) or 0.0
    word = "it forgets" if share >= FORGETS else "it forgets in part" if share >= 0.5 else "it hardly forgets"
    text = f"{word}. {MEANING.get(key.rpartition('/')[2], named(key).capitalize())} on the forget set goes from {number(base)} "
    text += f"to {e.shown('adapter', key)}"
    out = [
        text + (f"; a model that never saw that set has {number(retain_model)}." if retain_model is not None else ".")
    ]
    seen = e.detail("retain_only", key).get("ci95")
    if retain_model is not None and now < (seen[0] if seen else retain_model) - 0.02:
        out.append("That is less than such a model has: it does more than not know, which may itself be seen.")
    answers = [k for k in _sets(e, "forget", "value_accuracy") if e.value("adapter", k) is not None]
    if answers and key.rpartition("/")[2] != "value_accuracy":
        parts = []
        for k in answers:
            n, value = int(e.detail("adapter", k).get("n") or 0), e.value("adapter", k) or 0.0
            bound = f" (0 of {n}, so at most {percent(3 / n)})" if value == 0 and n else ""
            parts.append(f"{percent(value)}{bound} in the {named(k.partition('/')[0])} set")
        out.append(f"Asked freely, it still names the right value this often: {', '.join(parts)}.")
    return out


def _sets(e: Evidence, role: str, metric: str) -> list[str]:
    found = (e.evaluation.get("subjects") or {}).get("adapter") or {}
    return [k for k in found if k.startswith(role) and k.endswith(f"/{metric}")]


def _kept(e: Evidence) -> list[str]:
    key = e.key("retain")
    base, now = e.value("base", key), e.value("adapter", key)
    if key is None or not base or now is None:
        return []
    share = now / base
    word = "It keeps the" if share >= KEEPS else "It keeps most of the" if share >= 0.8 else "It damages the"
    text = f"{word} retain set: {named(key)} {e.shown('adapter', key)}, {percent(share)} of the base's {number(base)}"
    utility = e.value("base", "model_utility"), e.value("adapter", "model_utility")
    if None not in utility:
        text += f"; model utility goes from {number(utility[0])} to {number(utility[1])}"
    return [f"{text}."]


def _against_retain_model(e: Evidence, spread: Sequence[float]) -> list[str]:
    p, d = e.value("adapter", "forget/forget_quality"), e.value("adapter", "forget/ks_distance")
    if p is None:
        return []
    word = "cannot be told from" if p >= DISTINCT else "can be told from"
    text = (
        f"Its truth ratios {word} the retain model's (forget quality p = {number(p)}"
        + (f", KS D = {number(d)}" if d is not None else "")
        + ")"
    )
    if spread:
        text += (
            f"; {len(spread)} further retain models, of other seeds, have p = {number(min(spread))} to "
            f"{number(max(spread))} against it"
        )
    return [text + "."]


def _back(e: Evidence) -> list[str]:
    bars, measure = attack_bars(e)
    tried = [b for b in bars if b["adapter"] is not None and b["attack"] != "strip"]
    off = ["Whoever holds the base can take the adapter off, and has all of it back."] if e.key("forget") else []
    if not tried:
        return off
    worst = max(tried, key=lambda b: b["adapter"][0])
    value, low, high = worst["adapter"]
    beside = worst["retain_only"]
    text = (
        f"Of {len(tried)} attacks {worst['name']} brings back most: "
        f"{percent(value)}{'' if low is None or high is None else f' [{percent(low)}, {percent(high)}]'} of the lost {named(measure)}"
    )
    text += (
        f" (the same attack on the retain model: {percent(beside[0])})."
        if beside
        else " (the retain model was not attacked, so there is nothing to compare with)."
    )
    return [text, *off]


def missing(e: Evidence) -> list[str]:
    """What was not measured, and by which command it is."""
    out = []
    if e.key("forget") is None:
        out.append(f"No evaluation is stored: peft-unlearn eval {e.folder}")
    elif e.value("retain_only", e.key("forget")) is None:
        out.append(
            "No retain model was measured, so it is not known what forgetting would look like: peft-unlearn eval with --retain-model."
        )
    if e.theirs:
        out.append(
            f"Numbers of the author, which came with the adapter and were not measured by this installation: {', '.join(e.theirs)}. "
            f"To measure them: peft-unlearn eval, attack or calibrate {e.folder}"
        )
    if abs(e.scale_measured - e.scale) > 1e-9:
        out.append(f"The numbers are of another scale than the adapter has now: peft-unlearn eval {e.folder}")
    if e.blocks("attacks") is None:
        out.append(
            f"No attack was tried, so it is not known what brings the answers back: peft-unlearn attack {e.folder} "
            f"--relearn 20 --quantize int8,int4 --jailbreak templates --strip"
        )
    elif (at := (e.blocks("attacks") or {}).get("scale", {}).get("adapter")) is not None and abs(at - e.scale) > 1e-9:
        out.append(
            f"The attacks were run at scale {at:.3g}, the adapter now has scale {e.scale:.3g}: run peft-unlearn attack {e.folder} again."
        )
    if e.blocks("calibration") is None:
        out.append(
            f"It was not calibrated, so its forgetting is not comparable at equal retention: peft-unlearn calibrate {e.folder}"
        )
    if e.seed is not None:
        out.append(
            "One training run is judged; how much another seed would change is not in these intervals, which are over rows."
        )
    return out


def attack_bars(e: Evidence) -> tuple[list[dict[str, Any]], str]:
    """(bars for `pictures.attacks`, the measure they are of): the first measure that some attack could recover."""
    found = (e.blocks("attacks") or {}).get("attacks") or {}
    measures = [
        m
        for one in found.values()
        for m, r in ((one.get("recovery") or {}).get("adapter") or {}).items()
        if r.get("value") is not None
    ]
    if not measures:
        return [], ""
    measure = next((m for m in ("value_accuracy", *MEASURES) if m in measures), measures[0])

    def bar(one: Mapping[str, Any], subject: str) -> tuple[float, float | None, float | None] | None:
        r = ((one.get("recovery") or {}).get(subject) or {}).get(measure) or {}
        low, high = r.get("ci95") or (None, None)
        return None if r.get("value") is None else (r["value"], low, high)

    return [
        {"name": label, "attack": one.get("attack", label), "adapter": bar(one, "adapter"), "retain_only": bar(one, "retain_only")}
        for label, one in found.items()
    ], measure  # fmt: skip
