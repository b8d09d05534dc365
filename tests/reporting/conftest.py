"""The adapters of tests/analysis, made in seconds, are used here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "analysis"))
