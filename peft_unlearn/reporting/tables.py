"""Numbers for people: one description of the table, drawn by rich on a terminal and as Markdown in documents.

The README's table is made from a committed report by `markdown`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]

METRICS = {
    "value_accuracy": "names the right value",
    "extraction_strength": "extraction strength",
    "probability": "probability of the answer",
    "rouge_l_recall": "ROUGE-L recall",
}
"""Metrics with a block of rows each, one row for every set that has them."""
WHOLE = {
    "forget/truth_ratio": "truth ratio, forget set",
    "forget/ks_distance": "distance to the twin (KS D)",
    "forget/forget_quality": "forget quality (KS p)",
    "model_utility": "model utility",
}
DASH = "–"  # as in evaluation.document, which stays unloaded until a table is made
_SUBJECTS: dict[str, str] = {"base": "base", "adapter": "with adapter", "retain_only": "retain-only twin"}


def subjects(report: Report) -> dict[str, str]:
    """Subject -> heading, base first, then adapters, then the twin; those that were not given are left out."""
    found = [s for s, values in report["subjects"].items() if values]
    order = sorted(found, key=lambda s: (s != "base", s == "retain_only"))
    return {s: str(_SUBJECTS.get(s) or s.removeprefix("adapter:")) for s in order}


def sets(report: Report, metric: str) -> list[str]:
    """Sets for which `metric` was asked, in the order of the report."""
    names: dict[str, None] = {}
    for values in report["subjects"].values():
        names |= {k.rpartition("/")[0]: None for k in values or {} if k.endswith(f"/{metric}")}
    return list(names)


def number(value: float | None) -> str:
    """`evaluation.document.number`: a share with three digits, a small p with its exponent, a dash for what has no number."""
    from . import document

    return document.number(value)


def blocks(report: Report) -> list[tuple[str, list[tuple[str, list[float | None]]]]]:
    """[(title, [(row label, value per subject)])], the whole table as values."""
    shown = subjects(report)
    values, n = report["subjects"], counts(report)
    out: list[tuple[str, list[tuple[str, list[float | None]]]]] = []
    for metric, title in METRICS.items():
        there = [
            s for s in sets(report, metric) if n.get(s) != 0
        ]  # a suite's sets that the data lack are among the reasons
        if rows := [(s, [values[x].get(f"{s}/{metric}") for x in shown]) for s in there]:
            out.append((title, rows))
    whole = [
        (title, [values[x].get(k) for x in shown]) for k, title in WHOLE.items() if any(k in values[x] for x in shown)
    ]
    return [*out, ("the suite as a whole", whole)] if whole else out


def reasons(report: Report) -> list[str]:
    """Why there are dashes: each reason once, with what it is about."""
    found: dict[str, list[str]] = {}
    shown = subjects(report)
    wanted = {f"{s}/{m}" for m in METRICS for s in sets(report, m)} | set(WHOLE)
    for subject, heading in shown.items():
        for key, value in report["subjects"][subject].items():
            if value is None and key in wanted:
                why = (report["details"].get(subject, {}).get(key) or {}).get("reason") or "no reason is given"
                found.setdefault(why, []).append(f"{heading} {key}")
    out = [
        f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}: {why}"
        for why, keys in found.items()
    ]
    for subject in (s for s, values in report["subjects"].items() if not values):
        why = report["details"].get(subject, {}).get("reason") or "this model was not given"
        out.append(f"{_SUBJECTS.get(subject, subject)}: {why}")
    return out


def counts(report: Report) -> dict[str, int]:
    """Set -> number of rows."""
    out: dict[str, int] = {}
    for found in report["details"].values():
        for key, detail in found.items():
            name, _, metric = key.rpartition("/")
            if name and metric in METRICS and isinstance(detail, Mapping):
                out[name] = max(out.get(name, 0), int(detail.get("n") or 0))
    return out


def _label(name: str, n: Mapping[str, int], first: bool) -> str:
    return f"{name} ({n[name]})" if first and name in n else name


def markdown(report: Report, metrics: Sequence[str] | None = None) -> str:
    """The report as a GitHub table: the numbers of `show`, a row per set and metric.

    metrics: only these blocks, by name of the metric (default all); the figures over the suite as a whole always stand last.
    """
    titles = None if metrics is None else {METRICS[m] for m in metrics} | {"the suite as a whole"}
    lines = ["| | " + " | ".join(subjects(report).values()) + " |", "|---|" + "---:|" * len(subjects(report))]
    n, first = counts(report), True
    for title, rows in blocks(report):
        if titles is not None and title not in titles:
            continue
        if title != "the suite as a whole":
            lines.append(f"| **{title}** |" + " |" * len(subjects(report)))
        lines += [f"| {_label(name, n, first)} | " + " | ".join(map(number, values)) + " |" for name, values in rows]
        first = False
    notes = [f"\n{DASH} {why}  " for why in reasons(report)]
    return "\n".join(lines + notes) + "\n"


def _console() -> Any:
    from rich.console import Console

    return Console()


def show(report: Report, console: Any = None) -> None:
    """Print a report as tables to standard output: a row per set, a column per model; reasons of dashes beneath."""
    from rich import box
    from rich.table import Table

    console = console or _console()
    headings = subjects(report)
    table = Table(box=box.SIMPLE_HEAD, title=f"suite {report['suite']}", title_style="bold", pad_edge=False)
    table.add_column("set (rows)")
    for name in headings.values():
        table.add_column(name, justify="right", no_wrap=len(headings) <= 4)
    n, first = counts(report), True
    for title, rows in blocks(report):
        if not first:
            table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for name, values in rows:
            cells = [f"[dim]{DASH}[/dim]" if v is None else number(v) for v in values]
            table.add_row(f"  {_label(name, n, first)}", *cells)
        first = False
    console.print(table)
    for why in reasons(report):
        console.print(f"{DASH} {why}", style="dim", markup=False, highlight=False)


def show_methods(found: Sequence[Mapping[str, Any]], console: Any = None) -> None:
    """Print methods (`registry.Method.as_json`): a table per kind, hyper-parameters with their defaults."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = console or _console()
    if not found:
        console.print("There is no method of this kind yet.")
    for kind in dict.fromkeys(m["kind"] for m in found):
        table = Table(box=box.SIMPLE_HEAD, title=kind, title_style="bold", title_justify="left", pad_edge=False)
        for heading in ("name", "what it does", "hyper-parameters", "source"):
            table.add_column(heading, no_wrap=heading == "name")
        for m in (m for m in found if m["kind"] == kind):
            params = "\n".join(f"{k} = {p['default']}" for k, p in (m.get("params") or {}).items())
            source = m.get("source") or {}
            cited = f"{source.get('paper', '')} ({source.get('year', '')})\n{source.get('url', '')}" if source else ""
            table.add_row(m["name"], escape(m.get("summary") or ""), escape(params), escape(cited))
        console.print(table)


def size(n_bytes: int) -> str:
    """Bytes for people: 1.3 MB."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def show_plan(plan: Any, console: Any = None) -> None:
    """Print what a recipe would cost."""
    from rich import box
    from rich.table import Table

    console = console or _console()
    table = Table(box=box.SIMPLE, show_header=False, title=f"plan for {plan.base}", title_style="bold", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    share = 100 * plan.trainable / max(1, plan.base_parameters)
    table.add_row("base", f"{plan.base_parameters:,} parameters, never changed")
    table.add_row(
        "trained", f"{plan.trainable:,} parameters ({share:.2f} % of the base) in {len(plan.adapted)} modules"
    )
    table.add_row("adapted", ", ".join(_leaves(plan.adapted)))
    table.add_row(
        "rows", ", ".join(f"{s} {n:,} (longest {plan.tokens_longest[s]} tokens)" for s, n in plan.rows.items())
    )
    table.add_row("run", f"{plan.steps:,} steps of {plan.rows_per_step:,} anchor rows")
    table.add_section()
    table.add_row("base in memory", size(plan.base_bytes))
    table.add_row("adapter", size(plan.adapter_bytes))
    table.add_row("gradients", size(plan.gradient_bytes))
    table.add_row("optimizer", size(plan.optimizer_bytes))
    table.add_row("activations", f"about {size(plan.activation_bytes)}")
    if plan.host_copy_bytes:
        table.add_row(
            "host copy", f"{size(plan.host_copy_bytes)}: smoothing shifts the base's weights and puts them back"
        )
    table.add_row("[bold]together[/bold]", f"[bold]about {size(plan.total_bytes)}[/bold]")
    console.print(table)


def _leaves(names: Sequence[str]) -> list[str]:
    counted: dict[str, int] = {}
    for n in names:
        leaf = n.rpartition(".")[2]
        counted[leaf] = counted.get(leaf, 0) + 1
    return [f"{leaf} x{k}" for leaf, k in sorted(counted.items())]
