"""Attacks: ways to get back what a forget adapter makes a model forget, each with the same attack on the retain-only
model beside it.

Importing the room registers the attacks. It is light: torch and peft are imported where they are used.
"""

import importlib
import importlib.util

_MODULES = ("relearn", "quantize", "benign", "strip", "jailbreak", "gcg", "suffix", "probe")

for _name in _MODULES:
    if importlib.util.find_spec(f"{__name__}.{_name}") is not None:
        importlib.import_module(f"{__name__}.{_name}")
