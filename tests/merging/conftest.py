"""The tiny bases and adapters of tests/stack."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "folder"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tuners"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stack"))
from stacks import adapter_dir, base_dir, moe_dir  # noqa: F401
