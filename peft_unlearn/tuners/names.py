"""Which parts of a model with adapters on it are those of one adapter. Imports neither torch nor peft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def belongs(parameter: str, adapter: str) -> bool:
    """Whether the parameter of this name is the adapter's: PEFT keeps each under ``..<factor>.<adapter>[.weight]``."""
    return f".{adapter}." in f"{parameter}."


def scalings(model: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """(module name, adapter -> the factor of its delta there) of every adapter layer; setting a value takes effect."""
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            yield name, scaling
