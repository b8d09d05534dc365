"""One report on adapters, from what is stored with them: a verdict first, then pictures, numbers, attacks and conditions.

Everything is taken from eval.json-shaped results; whatever of them is missing is said, with the command that measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import pictures
from .calibrate import caption
from .calibrate import picture as calibration_picture
from .document import Heading, Items, Lines, Part, Picture, Text
from .tables import Column, Table, numbers
from .text import DASH, absent, interval, named, number, percent, reasons
from .verdict import DISTINCT, FORGETS, KEEPS, Evidence, attack_bars, missing, verdict

SAME = 0.005  # numbers of one base, read by other versions or in other batches
WORDS = (
    f"Words: forgets = at least {percent(FORGETS)} of the way from the base to the retain model (to 0 where there is none), in "
    f"part = half of it; keeps = at least {percent(KEEPS)} of the base's value; told apart = p under {DISTINCT:g}. An adapter "
    "suppresses: the base's weights still hold what they held."
)
RECOVERY = (
    "Recovery = (after - before) / (base - before). The green bars are what the same attack does where nothing was there to come "
    "back; lines are 95 % intervals."
)


def groups(evidence: Sequence[Evidence]) -> list[list[Evidence]]:
    """Adapters whose numbers stand beside each other: one suite, base and forget set, and the same numbers for that base."""
    out: list[list[Evidence]] = []
    for e in evidence:
        beside = next((g for g in out if _alike(g[0], e)), None)
        out.append([e]) if beside is None else beside.append(e)
    return out


def _alike(a: Evidence, b: Evidence) -> bool:
    if (a.evaluation.get("suite"), a.base, a.forget_sha256) != (b.evaluation.get("suite"), b.base, b.forget_sha256):
        return False
    bases = [(e.evaluation.get("subjects") or {}).get("base") or {} for e in (a, b)]
    pairs = [(bases[0][k], bases[1][k]) for k in bases[0].keys() & bases[1].keys()]
    return bool(bases[0]) == bool(bases[1]) and all(
        x is y or (None not in (x, y) and abs(x - y) < SAME * max(1, abs(x))) for x, y in pairs
    )


def points(group: Sequence[Evidence]) -> tuple[list[dict[str, Any]], str, str] | None:
    """Points of the frontier, (label, kind, x, y, intervals), and the names of its axes."""
    first = group[0]
    forget, utility = first.key("forget"), "model_utility"
    if first.value("adapter", utility) is None:
        utility = first.key("retain") or ""
    found = []
    for label, e, subject in _columns(group):
        y, x = e.value(subject, forget), e.value(subject, utility)
        if y is not None and x is not None:
            ci_y, ci_x = (e.detail(subject, k).get("ci95") for k in (forget, utility))
            flipped = None if ci_y is None else [1 - ci_y[1], 1 - ci_y[0]]
            found.append({"label": label, "kind": subject, "x": x, "y": 1 - y, "x95": ci_x, "y95": flipped})
    return (found, utility, forget) if forget and any(p["kind"] == "adapter" for p in found) else None


def _columns(group: Sequence[Evidence]) -> list[tuple[str, Evidence, str]]:
    """(name, whose evaluation, subject): the base, every adapter, the retain model."""
    return [
        ("base", group[0], "base"),
        *((e.name, e, "adapter") for e in group),
        ("retain model", group[0], "retain_only"),
    ]


def table(group: Sequence[Evidence]) -> Table:
    """Every number with its interval: a row per set and metric, a column per model."""
    columns: list[Column] = []
    for label, e, subject in _columns(group):
        if (e.evaluation.get("subjects") or {}).get(subject):
            columns.append(
                ("with adapter" if subject == "adapter" and len(group) == 1 else label, e.evaluation, subject)
            )
    return numbers(columns)


# -- the document -----------------------------------------------------------------------------------------------------


def parts(
    evidence: Sequence[Evidence], samples: Table | None = None, spread: Mapping[str, Sequence[float]] | None = None,
    notes: Sequence[str] = (),
) -> list[Part]:  # fmt: skip
    """The report. samples: answers side by side; spread: as in `verdict`; notes: further conditions, e.g. why there are no samples."""
    several, together = len(evidence) > 1, groups(evidence)
    lost = [f"{e.name}: {m}" if several else m for e in evidence for m in missing(e)]
    return [
        *(Text(verdict(e, spread), "verdict") for e in evidence), Text(WORDS, "note"),
        *([Heading("Not measured, or to be kept in mind"), Items([*lost, *notes])] if lost or notes else []),
        *(part for k, group in enumerate(together) for part in _plane(k, group, len(together) > 1, spread or {})),
        *(part for e in evidence for part in _own_pictures(e, f" ({e.name})" if several else "")),
        *([Heading("What the models answer"), samples] if samples is not None else []),
        *(part for group in together for part in _numbers(group)),
        *(part for e in evidence for part in _about(e, f" ({e.name})" if several else "")),
    ]  # fmt: skip


def _plane(k: int, group: Sequence[Evidence], several: bool, spread: Mapping[str, Sequence[float]]) -> list[Part]:
    found = points(group)
    if found is None:
        return []
    own = " of " + ", ".join(e.name for e in group) if several else ""
    others = list(spread.get(found[1], ())) if any(p["kind"] == "retain_only" for p in found[0]) else []
    caption = f"Bars: 95 % intervals over rows. {_seeds(others, found[1])}"
    drawn = Picture(pictures.plane(*found, others), "Forgetting against usefulness", f"plane{k or ''}", caption)
    return [Heading(f"Forgetting against usefulness{own}"), drawn]


def _own_pictures(e: Evidence, own: str) -> list[Part]:
    out: list[Part] = []
    bars, measure = attack_bars(e)
    if bars:
        drawn = Picture(pictures.attacks(bars, measure), "Recovery by attack", f"attacks-{e.name}", RECOVERY)
        out += [Heading(f"What brings it back{own}"), drawn, _attack_table(e)]
    if (block := e.blocks("calibration")) and "curve" in block:
        drawn = Picture(calibration_picture(block), "Calibration curve", f"calibration-{e.name}", caption(block))
        out += [Heading(f"Calibration{own}"), drawn]
    return out


def _numbers(group: Sequence[Evidence]) -> list[Part]:
    if not any(e.evaluation.get("subjects") for e in group):
        return []
    suite = group[0].evaluation.get("suite")
    about = "In brackets: 95 % bootstrap intervals over rows. p values and distances are of whole sets."
    why = reasons(lack for e in group for lack in absent(e.evaluation, {"adapter": e.name}))
    return [
        Heading(f"Numbers (suite {suite})" if suite else "Numbers"), table(group), Text(about, "note"),
        *([Items(why)] if why else []),
    ]  # fmt: skip


def _about(e: Evidence, own: str) -> list[Part]:
    lines = Lines("\n".join(f"{label}: {text}" for label, text in e.about))
    return [Heading(f"Method, data, versions{own}"), lines, *([Lines(e.recipe.strip())] if e.recipe else [])]


def _seeds(others: Sequence[float], utility: str) -> str:
    one = "The retain model is one training run"
    if not others:
        return f"{one}: how far one of another seed would lie from it is not on record."
    return (
        f"{one}; {len(others)} others, of other seeds, have a {named(utility)} of {number(min(others))} to {number(max(others))} "
        "(green ticks, at its height: how much they forget was not recorded in this unit)."
    )


def _attack_table(e: Evidence) -> Table:
    rows = []
    for label, one in ((e.blocks("attacks") or {}).get("attacks") or {}).items():
        seen = [(one.get("subjects") or {}).get(subject) for subject in ("adapter", "retain_only")]
        for measure, r in ((one.get("recovery") or {}).get("adapter") or {}).items():
            ends = [[(s.get(at) or {}).get(measure) for at in ("before", "after")] if s else None for s in seen]
            cells = [" to ".join(map(number, two)) if two else DASH for two in ends]
            recovery = number(r.get("value")) + interval(r.get("ci95"))
            rows.append([f"{label}, {named(measure)}", *cells, recovery, str(one.get("n", ""))])
    return Table(["attack", "adapter", "retain model", "recovery", "rows"], rows)
