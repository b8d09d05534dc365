"""One report on adapters, from what is stored with them: a verdict first, then pictures, numbers, attacks and conditions.

Everything is taken from eval.json-shaped results; whatever of them is missing is said, with the command that measures it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import document as doc
from . import pictures
from .document import DASH, interval, number, percent
from .verdict import FORGETS, KEEPS, TOLD_APART, Evidence, attack_bars, missing, titled, verdict

TITLES = {
    "value_accuracy": "answers that name the right value", "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization", "probability": "probability of the answer",
    "rouge_l_recall": "ROUGE-L recall", "truth_ratio": "truth ratio", "forget_quality": "forget quality (KS p)",
    "forget_quality_log10_p": "forget quality (log10 p)", "ks_distance": "distance to the retain-only model (KS D)",
}  # fmt: skip

SAME = 0.005  # numbers of one base, read by other versions or in other batches
WORDS = (
    f"Words: forgets = at least {percent(FORGETS)} of the way from the base to the retain-only model (to 0 where there is none), in "
    f"part = half of it; keeps = at least {percent(KEEPS)} of the base's value; told apart = p under {TOLD_APART:g}. An adapter "
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
    for subject, label, e in [
        ("base", "base", first),
        *(("adapter", e.name, e) for e in group),
        ("retain_only", "retain-only model", first),
    ]:
        y, x = e.value(subject, forget), e.value(subject, utility)
        if y is not None and x is not None:
            ci_y, ci_x = (e.detail(subject, k).get("ci95") for k in (forget, utility))
            found.append(
                {
                    "label": label,
                    "kind": subject,
                    "x": x,
                    "y": 1 - y,
                    "x95": ci_x,
                    "y95": None if ci_y is None else [1 - ci_y[1], 1 - ci_y[0]],
                }
            )
    return (found, utility, forget) if forget and any(p["kind"] == "adapter" for p in found) else None


def table(group: Sequence[Evidence]) -> doc.Table:
    """Every number with its interval: a row per set and metric, a column per model."""
    first = group[0]
    columns = [
        ("base", "base", first),
        *(("adapter", e.name if len(group) > 1 else "with adapter", e) for e in group),
        ("retain_only", "retain-only", first),
    ]
    columns = [c for c in columns if (c[2].evaluation.get("subjects") or {}).get(c[0])]
    keys = list(dict.fromkeys(k for s, _, e in columns for k in e.evaluation["subjects"][s]))
    rows: list[list[str]] = []
    for metric in dict.fromkeys(k.rpartition("/")[2] for k in keys if "/" in k):
        rows.append([TITLES.get(metric, pictures.named(metric))])
        for k in (k for k in keys if k.endswith(f"/{metric}")):
            n = max(int(e.detail(s, k).get("n") or 0) for s, _, e in columns)
            rows.append([f"{pictures.named(k.rpartition('/')[0])} ({n})", *(e.shown(s, k) for s, _, e in columns)])
    whole = [k for k in keys if "/" not in k]
    if whole:
        rows.append(["the suite as a whole"])
        rows += [[pictures.named(k), *(e.shown(s, k) for s, _, e in columns)] for k in whole]
    return doc.Table(["set (rows)", *(c[1] for c in columns)], rows)


def reasons(group: Sequence[Evidence]) -> list[str]:
    """Why there are dashes, each reason once."""
    out: dict[str, list[str]] = {}
    for e in group:
        for subject in ("base", "adapter", "retain_only"):
            values = (e.evaluation.get("subjects") or {}).get(subject)
            who = e.name if subject == "adapter" else subject.replace("_", "-")
            for key in [k for k, v in (values or {}).items() if v is None]:
                out.setdefault(str(e.detail(subject, key).get("reason") or "no reason is given"), []).append(
                    f"{who} {titled(key)}"
                )
    return [
        f"{DASH} {', '.join(dict.fromkeys(who[:3]))}{f' and {len(who) - 3} more' if len(who) > 3 else ''}: {why}"
        for why, who in out.items()
    ]


# -- the document -----------------------------------------------------------------------------------------------------


def parts(
    evidence: Sequence[Evidence],
    samples: doc.Table | None = None,
    spread: Mapping[str, Sequence[float]] | None = None,
    notes: Sequence[str] = (),
) -> list[doc.Part]:
    """The report. samples: answers side by side; spread: as in `verdict`; notes: further conditions, e.g. why there are no samples."""
    out: list[doc.Part] = [doc.Text(verdict(e, spread), "verdict") for e in evidence]
    out.append(doc.Text(WORDS, "note"))
    lost = [f"{e.name}: {m}" if len(evidence) > 1 else m for e in evidence for m in missing(e)]
    if lost or notes:
        out += [doc.Heading("Not measured, or to be kept in mind"), doc.Items([*lost, *notes])]
    for k, group in enumerate(groups(evidence)):
        found = points(group)
        if found is None:
            continue
        own = " of " + ", ".join(e.name for e in group) if len(groups(evidence)) > 1 else ""
        out.append(doc.Heading(f"Forgetting against usefulness{own}"))
        others = list((spread or {}).get(found[1], ())) if any(p["kind"] == "retain_only" for p in found[0]) else []
        caption = f"Bars: 95 % intervals over rows. {_seeds(others, found[1])}"
        drawn = pictures.plane(*found, others)
        out.append(doc.Picture(drawn, "Forgetting against usefulness", f"plane{k or ''}", caption))
    for e in evidence:
        bars, measure = attack_bars(e)
        own = f" ({e.name})" if len(evidence) > 1 else ""
        if bars:
            drawn = doc.Picture(pictures.attacks(bars, measure), "Recovery by attack", f"attacks-{e.name}", RECOVERY)
            out += [doc.Heading(f"What brings it back{own}"), drawn]
            out.append(_attack_table(e))
        if block := e.blocks("calibration"):
            out += [
                doc.Heading(f"Calibration{own}"),
                doc.Picture(pictures.calibration(block), "Calibration curve", f"calibration-{e.name}", _dial(block)),
            ]
    if samples is not None:
        out += [doc.Heading("What they say"), samples]
    for group in groups(evidence):
        if any(e.evaluation.get("subjects") for e in group):
            out += [
                doc.Heading(
                    "Numbers"
                    + (f" (suite {group[0].evaluation.get('suite')})" if group[0].evaluation.get("suite") else "")
                ),
                table(group),
            ]
            out.append(
                doc.Text(
                    "In brackets: 95 % bootstrap intervals over rows. p values and distances are of whole sets.", "note"
                )
            )
            out += [doc.Items(why)] if (why := reasons(group)) else []
    for e in evidence:
        lines = "\n".join(f"{label}: {text}" for label, text in e.about)
        out += [doc.Heading("Method, data, versions" + (f" ({e.name})" if len(evidence) > 1 else "")), doc.Lines(lines)]
        out += [doc.Lines(e.recipe.strip())] if e.recipe else []
    return out


def _seeds(others: Sequence[float], utility: str) -> str:
    if not others:
        return (
            "The retain-only model is one training run: how far one of another seed would lie from it is not on record."
        )
    return (
        f"The retain-only model is one training run; {len(others)} others, of other seeds, have a {pictures.named(utility)} of "
        f"{number(min(others))} to {number(max(others))} (green ticks, at its height: how much they forget was not recorded in this unit)."
    )


def _dial(block: Mapping[str, Any]) -> str:
    if block.get("scale") is None:
        return f"No scale will do: {block.get('reason')}."
    text = (
        f"Scale {block['scale']:.3g} forgets most of those that keep {percent(block['floor'])} of the base's retain "
        f"{pictures.named(block['metric'])} ({block['how']})."
    )
    if block.get("baked"):
        text += " It is baked into lora_alpha: what is called scale 1 elsewhere here is that one."
    return text + ("" if block.get("monotone") else " The curves do not only fall, so a finer search was not possible.")


def _attack_table(e: Evidence) -> doc.Table:
    rows = []
    for label, one in ((e.blocks("attacks") or {}).get("attacks") or {}).items():
        for measure, r in ((one.get("recovery") or {}).get("adapter") or {}).items():
            cells = []
            for subject in ("adapter", "retain_only"):
                seen = (one.get("subjects") or {}).get(subject)
                cells.append(
                    DASH
                    if not seen
                    else f"{number((seen.get('before') or {}).get(measure))} to {number((seen.get('after') or {}).get(measure))}"
                )
            rows.append(
                [
                    f"{label}, {pictures.named(measure)}",
                    *cells,
                    number(r.get("value")) + interval(r.get("ci95")),
                    str(one.get("n", "")),
                ]
            )
    return doc.Table(["attack", "adapter", "retain-only", "recovery", "rows"], rows)
