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


SETS = {
    "forget": "trained wordings", "wordings": "other wordings", "reversed": "reversed, not trained",
    "neighbors": "other countries, never trained on", "general": "general questions", "code": "code that parses",
}  # fmt: skip
OF_A_FILE = {
    "forget": "as asked in the file", "wordings": "other wordings, none of them trained",
    "reversed": "reversed, in a wording that is trained",
    "neighbors": "others of the relation, half of them never trained on", "general": "general questions", "code": "code that parses",
}  # fmt: skip


def real_table(run: dict, names: dict[str, str]) -> str:
    """A run of docs/real.json as the pages show it."""
    lines = ["| set (rows) | base | with adapter |", "|---|---:|---:|"]
    for name, text in names.items():
        metric = "python_parses" if name == "code" else "value_accuracy"
        base, adapter = (run["judged"][s][f"{name}/{metric}"] for s in ("base", "adapter"))
        lines.append(f"| {text} ({run['rows'][name]}) | {base:.2f} | {adapter:.2f} |")
    return "\n".join(lines)


def test_the_real_models_tables_are_the_measured_ones():
    one, *files = json.loads((ROOT / "docs" / "real.json").read_text())["runs"]
    assert files
    page = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
    assert real_table(one, SETS) in page and real_table(files[0], OF_A_FILE) in README
    for run in files:
        assert real_table(run, OF_A_FILE) in page, run["request"]
