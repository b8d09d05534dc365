"""Versions of the packages that decide a result."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("peft-unlearn", "torch", "transformers", "peft", "accelerate", "safetensors")
MEASURING = ("peft-unlearn", "torch", "transformers", "peft", "numpy", "scipy", "rouge-score")


def versions() -> dict[str, str]:
    """Package -> version, "source" for what is not installed as a package."""
    out = {}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "source"
    return out


def installed_versions() -> dict[str, str]:
    """Package -> version of what a measurement depends on; what is not installed is left out."""
    found = {}
    for package in MEASURING:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
