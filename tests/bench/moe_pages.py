"""The tables of docs/methods/uoe.md from docs/methods/uoe.json; `moe_table.py --write` calls it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Runs = list[dict[str, Any]]
MARK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)
OF = {
    "npo per-layer": "NPO, one expert per block, frozen (domains-npo)",
    "npo per-layer w5": "NPO, one expert per block, frozen, retain weight 5",
    "npo top1": "NPO, one expert, frozen (domains-top1)",
    "npo top3": "NPO, three experts, frozen (domains-top3)",
    "npo random": "NPO, random expert, frozen (domains-random-expert, drawn per seed)",
    "npo lora-all": "NPO, LoRA everywhere, retain weight 1 (domains-lora-all)",
    "npo lora-all w5": "NPO, LoRA everywhere, retain weight 5",
    "npo target-parameters": "NPO, LoRA in all experts (domains-target-parameters)",
    "npo routers-only": "NPO, routers only (domains-routers-only)",
    "uoe npo": "UOE on NPO: one expert, router, anchor (domains-uoe-npo)",
    "uoe npo, block 2": "UOE on NPO, the top expert of block 2",
    "uoe npo, router 3e-4": "UOE on NPO, router rate 3e-4",
    "uoe npo, keep 10": "UOE on NPO, with router_keep 10",
    "uoe npo w5": "UOE on NPO, retain weight 5",
    "uoe npo random": "UOE on NPO, random expert",
    "uoe npo per-layer": "NPO, one expert per block, routers and anchors, all 3e-3",
    "uoe npo per-layer, 1e-3 routers": "NPO, one expert per block, routers 1e-3 and anchors",
    "ga top1": "ascent, one expert, frozen",
    "ga random": "ascent, random expert, frozen",
    "ga lora-all": "ascent, LoRA everywhere",
    "uoe ga": "UOE on ascent: one expert, router, anchor (domains-uoe-ga)",
}


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and range: .970 (.961-.978)."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean, low, high = (f"{v:.{digits}f}" for v in (sum(known) / len(known), min(known), max(known)))
    return mean if low == high else f"{mean} ({low}–{high})"


def hits(rows: Runs) -> str:
    """Steps to the first look at or below 5 %, and how many runs got there."""
    found = [r["hit"]["step"] for r in rows if r["hit"]]
    if not found:
        return f"never ({rows[0]['end']['step']})"
    steps = f"{min(found)}–{max(found)}" if min(found) < max(found) else str(found[0])
    return steps if len(found) == len(rows) else f"{steps}, {len(found)} of {len(rows)}"


def both(row: dict[str, Any]) -> float:
    """Share of the forget facts that are right, over both phrasings and all entities (320 questions)."""
    return (row["forget"] + row["forget_other"] + 2 * row["forget_unseen"]) / 4


def at_hit(rows: Runs) -> str:
    return spread([r["hit"]["retain_unseen"] for r in rows if r["hit"]])


def slots(rows: Runs, name: str) -> str:
    columns = zip(*(r["overlap"][name] for r in rows), strict=True)
    return " ".join(f"{sum(c) / len(c):.2f}" for c in columns)


def table(results: dict[str, Any], base: str, domain: str = "chem") -> str:
    runs: dict[str, Runs] = {}
    refused: dict[str, int] = {}
    for key, row in sorted(results["runs"].items(), key=lambda kv: int(kv[0].rsplit("|", 1)[1])):
        where, variant, what, _ = key.split("|")
        if where == base and what == domain and "failed" in row:
            refused[variant] = refused.get(variant, 0) + 1
        elif where == base and what == domain:
            runs.setdefault(variant, []).append(row)
    out = [
        "| variant | seeds | trained | steps to hit | CPU s to hit | R at hit | F at the end | R at the end (step) "
        "| people / code / lang / geo | overlap, retain | overlap, forget |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in [v for v in OF if v in runs]:
        rows = runs[variant]
        ends = [r["end"] for r in rows]
        kept = [sum(e["by_domain"][d] for e in ends) / len(ends) for d in ("people", "code", "lang", "geo")]
        cpu = [r["hit"]["cpu"] for r in rows if r["hit"]]
        steps = sorted({e["step"] for e in ends})
        last = str(steps[0]) if len(steps) == 1 else f"{steps[0]}–{steps[-1]}"
        seeds = f"{len(rows)}, {refused[variant]} refused" if variant in refused else str(len(rows))
        out.append(
            f"| {OF[variant]} | {seeds} | {rows[0]['trainable']:,} | {hits(rows)} | {spread(cpu, 1)} | {at_hit(rows)} "
            f"| {spread([both(e) for e in ends])} | {spread([e['retain_unseen'] for e in ends])} ({last}) "
            f"| {' / '.join(f'{v:.2f}' for v in kept)} | {slots(rows, 'retain')} | {slots(rows, 'forget')} |"
        )
    return "\n".join(out) + "\n"


def accepted(results: dict[str, Any]) -> str:
    out = [
        "| variant | forget domain | seeds | F shown | F all | R at the end | steps to hit |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in ("npo per-layer", "npo top1"):
        for domain in ("chem", "lang", "geo"):
            rows = [
                r
                for k, r in sorted(results["runs"].items())
                if k.startswith(f"domains|{variant}|{domain}|") and "end" in r
            ]
            if rows:
                ends = [r["end"] for r in rows]
                out.append(
                    f"| {OF[variant]} | {domain} | {len(rows)} | {spread([e['forget'] for e in ends])} | {spread([both(e) for e in ends])} "
                    f"| {spread([e['retain_unseen'] for e in ends])} | {hits(rows)} |"
                )
    return "\n".join(out) + "\n"


def attribution(results: dict[str, Any]) -> str:
    out = [
        "| base | domain | planted found | top expert (block, id) | its affinity | its lift | lifts of the four blocks' tops "
        "| halves: same top / six best / rank | blocks warned about |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for base, by in results["attribution"].items():
        for domain, a in sorted(by.items()):
            k, e = a["top1"]
            s = a["stability"]
            out.append(
                f"| {base} | {domain} | {a['planted_found']} of 4 | {k}, {e} | {a['affinity'][k]:.2f} | {a['top1_lift']:.1f} "
                f"| {' '.join(f'{x:.1f}' for x in a['lift'])} | {s['same_top']:.2f} / {s['top6_overlap']:.2f} / {s['spearman']:.2f} "
                f"| {a['warnings']} |"
            )
    return "\n".join(out) + "\n"


def verdicts(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, measured, bound, held) for every number that issue and page promise."""
    found, natural = results["attribution"]["domains"], results["attribution"]["domains-natural"]
    planted = sum(a["planted_found"] for a in found.values())
    low, high = min(a["top1_lift"] for a in found.values()), max(a["top1_lift"] for a in natural.values())
    warned = sum(a["warnings"] > 0 for a in natural.values())
    out = [
        ("planted expert has the highest affinity of its block", f"{planted} of 20", ">= 18", planted >= 18),
        ("lift of the raw top expert, seeded base, lowest of five domains", f"{low:.1f}", ">= 3", low >= 3),
        ("the same, natural control, highest of five domains", f"{high:.1f}", "< 3", high < 3),
        ("natural control: domains with a warning", f"{warned} of 5", "5", warned == 5),
    ]

    def ends(variant: str, domains: Sequence[str]) -> Runs:
        heads = tuple(f"domains|{variant}|{d}|" for d in domains)
        return [r["end"] for k, r in results["runs"].items() if k.startswith(heads) and "end" in r]

    for variant, least in (("npo per-layer", 0.93), ("npo top1", 0.90)):
        rows = ends(variant, ("chem", "lang", "geo"))
        f, r, a = (max(e["forget"] for e in rows), min(e["retain_unseen"] for e in rows), max(map(both, rows)))
        out += [
            (f"{OF[variant]}: F shown, worst of {len(rows)} runs", f"{f:.3f}", "<= 0.05", f <= 0.05),
            (f"{OF[variant]}: F all, worst of {len(rows)} runs", f"{a:.3f}", "<= 0.05", a <= 0.05),
            (f"{OF[variant]}: R, worst of {len(rows)} runs", f"{r:.3f}", f">= {least:.2f}", r >= least),
        ]
    for variant in ("npo random", "ga random"):
        rows = ends(variant, ("chem",))
        f = min(e["forget"] for e in rows)
        out.append((f"{OF[variant]}: F shown, lowest of {len(rows)} seeds", f"{f:.3f}", ">= 0.40", f >= 0.40))
    return out


def checks(results: dict[str, Any]) -> str:
    lines = [
        f"| {what} | {value} | {bound} | {'yes' if held else '**no**'} |"
        for what, value, bound, held in verdicts(results)
    ]
    return "\n".join(["| check | measured | bound | held |", "|---|---|---|---|", *lines]) + "\n"


def write(page: Path, results: dict[str, Any]) -> None:
    made = {
        "checks": checks(results),
        "attribution": attribution(results),
        "accepted": accepted(results),
        "seeded": table(results, "domains"),
        "natural": table(results, "domains-natural"),
    }
    text = page.read_text(encoding="utf-8")
    page.write_text(MARK.sub(lambda m: m[1] + made[m[2]] + m[3], text), encoding="utf-8")
