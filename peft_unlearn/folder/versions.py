"""Versions of the packages that decide a result."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

TRAINING = ("peft-unlearn", "torch", "transformers", "peft", "accelerate", "safetensors")
MEASURING = ("peft-unlearn", "torch", "transformers", "peft", "numpy", "scipy", "rouge-score")


def versions(packages: Iterable[str] = TRAINING, missing: str | None = "source") -> dict[str, str]:
    """Package -> version; what is not installed as a package is called `missing`, or left out where that is None."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if missing is not None:
                found[package] = missing
    return found


installed_versions = partial(versions, MEASURING, None)
