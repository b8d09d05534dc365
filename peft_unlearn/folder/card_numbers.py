"""The card's table: what was measured of base, adapter, merged and quantized forms, attacked adapter and retain-only model.

A row nobody measured says how to measure it; a value that could not be had says why. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from .markdown import code, inline, table

# What is shown, of what the evaluation holds: up to three of the forget set, two of what is to be kept, then summaries.
_FORGET = ("value_accuracy", "extraction_strength", "accuracy", "rouge_l_recall", "verbatim", "probability")
_RETAIN = ("retain/value_accuracy", "retain/accuracy", "retain/rouge_l_recall", "retain/probability",
           "general/value_accuracy", "general/accuracy", "general/probability")  # fmt: skip
_WHOLE = ("model_utility", "forget/forget_quality")
_NAMES = {"base": "base model", "adapter": "**with this adapter**", "retain_only": "retain-only model"}
QUANTIZED = {"bf16": "merged, bfloat16", "int8": "merged, int8", "int4": "merged, int4"}


def columns(evaluation: dict[str, Any] | None) -> list[str]:
    """The metrics that the card shows, in order."""
    subjects = (evaluation or {}).get("subjects") or {}
    known = list(dict.fromkeys(m for name in ("adapter", *subjects) for m in subjects.get(name) or {}))
    if not known:  # attacks alone were run
        found = [
            ((r.get("subjects") or {}).get("adapter") or {}).get("after") or {} for r in _attacks(evaluation or {})
        ]
        known = [f"forget/{m}" for m in dict.fromkeys(m for after in found for m in after)]
    forget = [m for m in (f"forget/{f}" for f in _FORGET) if m in known][:3]
    keep = [m for m in _RETAIN if m in known]
    keep = [*[m for m in keep if m.startswith("retain/")][:1], *[m for m in keep if m.startswith("general/")][:1]]
    chosen = [*forget, *keep, *(m for m in _WHOLE if m in known)]
    return chosen or known[:6]


def numbers(evaluation: dict[str, Any] | None, adapter_id: str | None) -> list[str]:
    """The section's lines."""
    if not evaluation or not columns(evaluation):
        return ["Not measured. Run `peft-unlearn eval FOLDER`, then `peft-unlearn card FOLDER --write`.", ""]
    measured_of = evaluation.get("adapter_id")
    if measured_of and adapter_id and measured_of != adapter_id:
        return [
            "The stored numbers belong to another adapter, so they are not shown: run `peft-unlearn eval FOLDER`.",
            "",
        ]
    shown = columns(evaluation)
    attacks = _attacks(evaluation)
    notes: list[str] = []
    rows = [_subject(evaluation, "base", shown, notes), _subject(evaluation, "adapter", shown, notes)]
    for form, label in QUANTIZED.items():
        found = [r for r in attacks if r.get("attack") == "quantize" and _setting(r, "format") == form]
        rows += [_attacked(label, r, shown, notes) for r in found] or [_unmeasured(label, f"--quantize {form}", shown)]
    found = [r for r in attacks if r.get("attack") == "relearn"]
    rows += [_attacked("relearned", r, shown, notes) for r in found] or [
        _unmeasured("relearned", "--relearn 20", shown)
    ]
    other = [r for r in attacks if r.get("attack") not in ("quantize", "relearn")]
    rows += [_attacked(f"attack: {r['label']}", r, shown, notes) for r in other]
    rows.append(_subject(evaluation, "retain_only", shown, notes))
    head = ["", *(_heading(m, evaluation) for m in shown), *(["recovered"] if attacks else [])]
    width = len(head)
    lines = [*table(head, [[*row, *[""] * (width - len(row))] for row in rows]), ""]
    return [*lines, *_explained(evaluation, attacks, notes)]


def _attacks(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    whole = evaluation.get("attacks")
    if not isinstance(whole, dict):
        return []
    inside = whole.get("attacks", whole)
    return [
        {"attack": label.partition(":")[0], **record, "label": label}
        for label, record in inside.items()
        if isinstance(record, dict)
    ]


def _setting(record: dict[str, Any], name: str) -> Any:
    return (record.get("settings") or {}).get(name)


def _heading(metric: str, evaluation: dict[str, Any]) -> str:
    group, _, name = metric.partition("/")
    better = (((evaluation.get("metrics") or {}).get(name or group) or {}).get("better")) or {}
    side = better.get(group) or better.get("retain") if isinstance(better, dict) else None
    return inline(metric.replace("/", ": ").replace("_", " ")) + {"lower": " ↓", "higher": " ↑"}.get(str(side), "")


def _value(value: Any, interval: Any = None) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    text = f"{value:.3g}"
    if isinstance(interval, list) and len(interval) == 2 and all(isinstance(x, int | float) for x in interval):
        text += f" ({interval[0]:.3g} to {interval[1]:.3g})"
    return text


def _subject(evaluation: dict[str, Any], name: str, shown: list[str], notes: list[str]) -> list[str]:
    values = (evaluation.get("subjects") or {}).get(name)
    if not values:
        why = (
            ": `peft-unlearn eval FOLDER`"
            if not evaluation.get("subjects")
            else ": there is none for this base" * (name == "retain_only")
        )
        return [_NAMES[name], f"not measured{why}"]
    details = (evaluation.get("details") or {}).get(name) or {}
    cells = []
    for metric in shown:
        about = details.get(metric) or {}
        cells.append(_value(values.get(metric), about.get("ci95")))
        if values.get(metric) is None and about.get("reason"):
            notes.append(f"{inline(name)}, {inline(metric)}: {inline(about['reason'])}")
    return [_NAMES[name], *cells]


def _attacked(label: str, record: dict[str, Any], shown: list[str], notes: list[str]) -> list[str]:
    """Attacks score part of the forget set and nothing else: their other cells stay empty."""
    found = (record.get("subjects") or {}).get("adapter") or {}
    after = found.get("after") or {}
    cells = [_value(after[m.removeprefix("forget/")]) if m.removeprefix("forget/") in after and m.startswith("forget/")
             else "" for m in shown]  # fmt: skip
    if not after:
        why = (record.get("reasons") or {}).get("adapter") or "no value was stored"
        return [inline(label), f"not measured: {inline(why)}", *[""] * (len(shown) - 1)]
    share = ((record.get("recovery") or {}).get("adapter")) or {}
    measure = next((m for m in _FORGET if (share.get(m) or {}).get("value") is not None), None)
    if measure is None:
        reasons = [s["reason"] for s in share.values() if isinstance(s, dict) and s.get("reason")]
        notes.extend(f"{inline(label)}, recovered: {inline(r)}" for r in reasons[:1])
    return [
        inline(label),
        *cells,
        "–" if measure is None else _value(share[measure]["value"], share[measure].get("ci95")),
    ]


def _unmeasured(label: str, attack: str, shown: list[str]) -> list[str]:
    return [label, f"not measured: `peft-unlearn attack FOLDER {attack}`", *[""] * (len(shown) - 1)]


def _explained(evaluation: dict[str, Any], attacks: list[dict[str, Any]], notes: list[str]) -> list[str]:
    suite = evaluation.get("suite")
    details = (evaluation.get("details") or {}).get("adapter") or {}
    counts: dict[str, int] = {}
    for metric, about in details.items():
        if isinstance(about, dict) and isinstance(about.get("n"), int):
            counts.setdefault(metric.partition("/")[0], about["n"])
    rows = ", ".join(f"{inline(k)} {v}" for k, v in counts.items() if k in ("forget", "retain", "general"))
    lines = [(f"Suite {code(suite, cell=False)}" if suite else "Numbers") + (f" (rows: {rows})" if rows else "")
             + "; in parentheses 95 % intervals by bootstrap over rows."]  # fmt: skip
    if (scale := evaluation.get("scale")) is not None:
        lines.append(f"Measured at scale {inline(scale)}.")
    alike: dict[str, list[str]] = {}  # attacks on the same rows from the same start share a sentence
    for record in attacks:
        settings = ", ".join(f"{k} {v}" for k, v in (record.get("settings") or {}).items() if v is not None)
        now = ((record.get("subjects") or {}).get("adapter") or {}).get("before") or {}
        before = next((f"{m.replace('_', ' ')} {_value(now[m])}" for m in _FORGET if m in now), None)
        where = f"{inline(record.get('n', '?'))} rows that the attacker did not see"
        where += f", where the adapter stands at {before} before the attack" if before else ""
        name = code(record["label"], cell=False)
        alike.setdefault(where, []).append(f"{name} ({inline(settings)})" if settings else name)
    lines += [f"On {where}: {', '.join(names)}." for where, names in alike.items()]
    if attacks:
        lines.append("Recovered: (after − before) / (base − before); 1 is as if nothing had been forgotten.")
    found = evaluation.get("calibration")
    if isinstance(found, dict) and "scale" in found:
        chosen = found["scale"]
        lines.append(f"Calibration of the scale chose {_value(chosen)}." if chosen is not None
                     else "Calibration found no scale that keeps the retain set.")  # fmt: skip
    return [" ".join(lines), *(["", *(f"- {n}" for n in dict.fromkeys(notes))] if notes else []), ""]


def headline(evaluation: dict[str, Any] | None, adapter_id: str | None) -> list[tuple[str, float]]:
    """(metric, value) of the adapter for the front matter's model-index."""
    if not evaluation or (evaluation.get("adapter_id") or adapter_id) != adapter_id:
        return []
    values = ((evaluation.get("subjects") or {}).get("adapter")) or {}
    return [(m, float(values[m])) for m in columns(evaluation) if isinstance(values.get(m), int | float)]
