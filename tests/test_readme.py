"""The README says what the code does: its example runs, its table is the one that the demo printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_example_runs(tmp_path, monkeypatch):
    """The first Python block, as it stands, with three steps instead of 120."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.S)
    assert block is not None
    code = block[1].replace("max_steps=120", "max_steps=3, use_cpu=True, disable_tqdm=True")
    assert "max_steps=3" in code
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    from peft_unlearn.folder.read import read_adapter

    folder = read_adapter(tmp_path / "my-adapter")
    assert folder.manifest.base.ref == "embedded:people"
    assert folder.recipe["train"]["max_steps"] == 3 and folder.recipe["terms"]["forget"]["npo"] == {"beta": 0.1}


def test_table_is_the_demos():
    """Regenerated from the committed JSON by the function that the demo prints with."""
    from peft_unlearn.reporting.tables import markdown

    told = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    between = re.search(r"<!-- demo:begin -->\n(.*?)<!-- demo:end -->", README, re.S)
    assert between is not None
    assert between[1].strip() == markdown(told["report"], ["value_accuracy"]).strip()
