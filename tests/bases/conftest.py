"""The builders of the embedded models lie beside what they build and are no package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "adapters" / "bases" / "build"))
