"""Forget adapters: machine unlearning of language models as a PEFT plugin.

Names load on first use, so importing this package costs next to nothing and pulls in neither torch nor peft.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .tuners import registration as _registration

__version__ = "0.1.0"

_WHERE = {
    "ForgetModel": "stack.model",
    "ForgetRetain": "data.bundle",
    "Pass": "forward",
    "Range": "registry",
    "Reference": "forward",
    "Source": "registry",
    "UnlearnConfig": "config",
    "UnlearnTrainer": "trainer",
    "UserError": "errors",
    "compose": "stack.compose",
    "evaluate": "jobs",
    "get_forget_model": "adapt",
    "make_score": "evaluation.quick",
    "merge": "stack.merge",
    "methods": "registry",
    "metric": "registry",
    "objective": "registry",
    "remove": "stack.remove",
    "rule": "registry",
    "save_adapter": "jobs",
    "score": "evaluation.score",
    "train": "jobs",
    "verify": "sharing.verify",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from .adapt import get_forget_model as get_forget_model
    from .config import UnlearnConfig as UnlearnConfig
    from .data.bundle import ForgetRetain as ForgetRetain
    from .errors import UserError as UserError
    from .evaluation.quick import make_score as make_score
    from .evaluation.score import score as score
    from .forward import Pass as Pass
    from .forward import Reference as Reference
    from .jobs import evaluate as evaluate
    from .jobs import save_adapter as save_adapter
    from .jobs import train as train
    from .registry import Range as Range
    from .registry import Source as Source
    from .registry import methods as methods
    from .registry import metric as metric
    from .registry import objective as objective
    from .registry import rule as rule
    from .sharing.verify import verify as verify
    from .stack.compose import compose as compose
    from .stack.merge import merge as merge
    from .stack.model import ForgetModel as ForgetModel
    from .stack.remove import remove as remove
    from .trainer import UnlearnTrainer as UnlearnTrainer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


_registration.install()
