"""Versions of the packages that decide a result."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("peft-unlearn", "torch", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Package -> version, "source" for what is not installed as a package."""
    out = {}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "source"
    return out
