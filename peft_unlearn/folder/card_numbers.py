"""The card's table: what was measured of base, adapter, merged and quantized forms, attacked adapter and retain model.

A row nobody measured says how to measure it; a value that is absent says why. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from .eval_json import usable
from .markdown import code, inline, table

# What is shown, of what the evaluation holds: up to three of the forget set, two of what is to be kept, then summaries.
_FORGET = (
    "value_accuracy",
    "extraction_strength",
    "accuracy",
    "mia_efficacy",
    "rouge_l_recall",
    "verbatim",
    "probability",
)
_RETAIN = ("retain/value_accuracy", "retain/accuracy", "retain/rouge_l_recall", "retain/probability",
           "general/value_accuracy", "general/accuracy", "general/probability", "test/accuracy")  # fmt: skip
_WHOLE = ("model_utility", "forget/forget_quality")
_NAMES = {"base": "base model", "adapter": "**with this adapter**", "retain_only": "retain model"}
QUANTIZED = {"bf16": "merged, bfloat16", "int8": "merged, int8", "int4": "merged, int4"}


def columns(evaluation: dict[str, Any] | None) -> list[str]:
    """The metrics that the card shows, in order: of the forget set, of what is to be kept, summaries."""
    known = _measured(evaluation or {})
    forget = [m for m in (f"forget/{f}" for f in _FORGET) if m in known][:3]
    keep = [
        next((m for m in _RETAIN if m in known and m.startswith(group)), "")
        for group in ("retain/", "general/", "test/")
    ]
    chosen = [*forget, *(m for m in keep if m), *(m for m in _WHOLE if m in known)]
    return chosen or known[:6]


def _measured(evaluation: dict[str, Any]) -> list[str]:
    """Every metric that was measured, the adapter's first; where attacks alone were run, what these measured."""
    subjects = evaluation.get("subjects") or {}
    known = dict.fromkeys(m for name in ("adapter", *subjects) for m in subjects.get(name) or {})
    return list(known or dict.fromkeys(f"forget/{m}" for r in _attacks(evaluation) for m in _of_adapter(r, "after")))


def _of_adapter(attack: dict[str, Any], when: str) -> dict[str, Any]:
    """The adapter's values before or after an attack."""
    return ((attack.get("subjects") or {}).get("adapter") or {}).get(when) or {}


def numbers(evaluation: dict[str, Any] | None, adapter_id: str | None) -> list[str]:
    """The section's lines."""
    evaluation, wrong = usable(evaluation, adapter_id)
    if not columns(evaluation):
        measure = "Not measured. Run `peft-unlearn eval FOLDER`, then `peft-unlearn card FOLDER --write`."
        return [*(f"Not shown: {inline(why)}" for why in wrong), *([] if wrong else [measure]), ""]
    shown = columns(evaluation)
    attacks = _attacks(evaluation)
    notes = [f"not shown: {inline(why)}" for why in wrong]
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
    found = {label: record for label, record in whole.get("attacks", whole).items() if isinstance(record, dict)}
    return [{"attack": label.partition(":")[0], **record, "label": label} for label, record in found.items()]


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
        none = ": there is none for this base" * (name == "retain_only")
        why = none if evaluation.get("subjects") else ": `peft-unlearn eval FOLDER`"
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
    after = {f"forget/{m}": value for m, value in _of_adapter(record, "after").items()}
    cells = [_value(after[m]) if m in after else "" for m in shown]
    if not after:
        why = (record.get("reasons") or {}).get("adapter") or "no value was stored"
        return [inline(label), f"not measured: {inline(why)}", *[""] * (len(shown) - 1)]
    share = (record.get("recovery") or {}).get("adapter") or {}
    measure = next((m for m in _FORGET if (share.get(m) or {}).get("value") is not None), None)
    if measure is None:
        reasons = [s["reason"] for s in share.values() if isinstance(s, dict) and s.get("reason")]
        notes.extend(f"{inline(label)}, recovered: {inline(r)}" for r in reasons[:1])
    recovered = share[measure] if measure is not None else {}
    return [inline(label), *cells, _value(recovered.get("value"), recovered.get("ci95"))]


def _unmeasured(label: str, attack: str, shown: list[str]) -> list[str]:
    return [label, f"not measured: `peft-unlearn attack FOLDER {attack}`", *[""] * (len(shown) - 1)]


def _explained(evaluation: dict[str, Any], attacks: list[dict[str, Any]], notes: list[str]) -> list[str]:
    """What the table's numbers are, as one paragraph; below it why values are absent."""
    lines = [_suite(evaluation)]
    if (scale := evaluation.get("scale")) is not None:
        lines.append(f"Measured at scale {inline(scale)}.")
    lines += _settings_of_attacks(attacks)
    found = evaluation.get("calibration")
    if isinstance(found, dict) and "scale" in found:
        lines.append(f"Calibration of the scale chose {_value(found['scale'])}." if found["scale"] is not None
                     else "Calibration found no scale that keeps the retain set.")  # fmt: skip
    return [" ".join(lines), *(["", *(f"- {n}" for n in dict.fromkeys(notes))] if notes else []), ""]


def _suite(evaluation: dict[str, Any]) -> str:
    suite = evaluation.get("suite")
    details = (evaluation.get("details") or {}).get("adapter") or {}
    counts: dict[str, int] = {}
    for metric, about in details.items():
        if isinstance(about, dict) and isinstance(about.get("n"), int):
            counts.setdefault(metric.partition("/")[0], about["n"])
    rows = ", ".join(f"{inline(k)} {v}" for k, v in counts.items() if k in ("forget", "retain", "general"))
    head = (f"Suite {code(suite, cell=False)}" if suite else "Numbers") + (f" (rows: {rows})" if rows else "")
    return f"{head}, measured by the author of this adapter; in parentheses 95 % intervals by bootstrap over rows."


def _settings_of_attacks(attacks: list[dict[str, Any]]) -> list[str]:
    """Attacks on the same rows from the same start share a sentence."""
    alike: dict[str, list[str]] = {}
    for record in attacks:
        settings = ", ".join(f"{k} {v}" for k, v in (record.get("settings") or {}).items() if v is not None)
        now = _of_adapter(record, "before")
        before = next((f"{m.replace('_', ' ')} {_value(now[m])}" for m in _FORGET if m in now), None)
        where = f"{inline(record.get('n', '?'))} rows that the attacker did not see"
        where += f", where the adapter stands at {before} before the attack" if before else ""
        name = code(record["label"], cell=False)
        alike.setdefault(where, []).append(f"{name} ({inline(settings)})" if settings else name)
    lines = [f"On {where}: {', '.join(names)}." for where, names in alike.items()]
    recovered = "Recovered: (after − before) / (base − before); 1 is as if nothing had been forgotten."
    return [*lines, recovered] if attacks else []


def headline(evaluation: dict[str, Any] | None, adapter_id: str | None) -> list[tuple[str, float]]:
    """(metric, value) of the adapter for the front matter's model-index."""
    evaluation, _ = usable(evaluation, adapter_id)
    values = ((evaluation.get("subjects") or {}).get("adapter")) or {}
    return [(m, float(values[m])) for m in columns(evaluation) if isinstance(values.get(m), int | float)]
