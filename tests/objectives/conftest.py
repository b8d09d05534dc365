"""The tiny mixture-of-experts models of tests/tuners are used here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tuners"))
