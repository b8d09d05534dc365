"""The README's table is the one that the demo printed. Its examples run in tests/test_doc_examples.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_is_the_demos():
    """Regenerated from the committed JSON by the function that the demo prints with."""
    from peft_unlearn.reporting.tables import report_markdown

    demo = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    between = re.search(r"<!-- demo:begin -->\n(.*?)<!-- demo:end -->", README, re.S)
    assert between is not None
    assert between[1].strip() == report_markdown(demo["report"], ["value_accuracy"]).strip()


def real_table() -> str:
    """The run of docs/real.json as the pages show it."""
    (run,) = json.loads((ROOT / "docs" / "real.json").read_text())["runs"]
    names = {
        "forget": "trained wordings", "wordings": "other wordings", "reversed": "reversed, not trained",
        "neighbors": "other countries, never trained on", "general": "general questions", "code": "code that parses",
    }  # fmt: skip
    lines = ["| set (rows) | base | with adapter |", "|---|---:|---:|"]
    for name, text in names.items():
        metric = "python_parses" if name == "code" else "value_accuracy"
        base, adapter = (run["judged"][s][f"{name}/{metric}"] for s in ("base", "adapter"))
        lines.append(f"| {text} ({run['rows'][name]}) | {base:.2f} | {adapter:.2f} |")
    return "\n".join(lines)


def test_the_real_models_table_is_the_measured_one():
    for page in ("README.md", "docs/your-model.md"):
        assert real_table() in (ROOT / page).read_text(encoding="utf-8"), page
