"""Which function builds which embedded models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UserError, nearest
from .build import build
from .build_domains import build_domains

BUILDERS: dict[str, Callable[..., dict[str, dict[str, Any]]]] = {"people": build, "domains": build_domains}


def builder(name: str) -> Callable[..., dict[str, dict[str, Any]]]:
    """The function that builds the embedded models of that data set; `UserError` if there is none."""
    if name not in BUILDERS:
        raise UserError(f"There are no embedded models {name!r} to build.{nearest(name, BUILDERS)}")
    return BUILDERS[name]
