"""Attacks as a table of text: before -> after of the first measure of each, and the recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text(block: Mapping[str, Any]) -> str:
    """Block "attacks" of eval.json as the command prints it."""
    lines = [
        f"{block['rows']['scored']} forget rows scored, {block['rows']['shown']} shown to attacks that learn; "
        "recovery: 0 = nothing came back, 1 = as the base"
        + (f"; computed in {block['dtype']}" if block.get("dtype") else "")
    ]
    for label, one in block["attacks"].items():
        settings = ", ".join(f"{k}={v}" for k, v in one["settings"].items())
        lines += ["", f"{label}  ({settings})" if settings else label]
        wide = max(map(len, one["subjects"]))
        for name, seen in one["subjects"].items():
            if seen is None:
                lines.append(f"  {name:<{wide}} -  {one['reasons'][name]}")
            elif measure := next(iter(seen["before"]), None):
                before, after = seen["before"][measure], seen["after"].get(measure)
                share = (one["recovery"].get(name) or {}).get(measure)
                lines.append(f"  {name:<{wide}} {measure} {_number(before)} -> {_number(after)}{_share(share)}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    if share["value"] is None:
        return f"   recovery -  ({share['reason']})"
    ci = share["ci95"]
    return f"   recovery {share['value']:.3f}" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")
