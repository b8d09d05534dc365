"""Tiny bases and adapters; those of tests/folder and the mixtures of experts of tests/tuners among them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "folder"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tuners"))
from stacks import adapter_dir, base_dir, moe_dir  # noqa: F401
