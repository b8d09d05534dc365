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
