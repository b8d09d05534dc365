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
    "UnlearnConfig": "training.config",
    "UnlearnTrainer": "training.trainer",
    "UserError": "errors",
    "attack": "attacks.attack",
    "attribute": "attribution.attribute",
    "averaging": "registry",
    "calibrate": "analysis.calibrate",
    "card": "sharing.card",
    "audit": "records.audit",
    "augment": "request.augment",
    "compare": "analysis.compare",
    "compose": "merging.compose",
    "effect": "analysis.effect_of_run",
    "evaluate": "evaluation.evaluate",
    "experts": "attribution.experts",
    "export": "sharing.export",
    "forget": "request.forget",
    "get_forget_model": "training.adapt",
    "interference": "analysis.interference",
    "make_score": "evaluation.quick",
    "merge": "analysis.merged",
    "methods": "registry",
    "metric": "registry",
    "objective": "registry",
    "plan": "training.cost",
    "pull": "sharing.publish",
    "push": "sharing.publish",
    "record": "records.record",
    "remove": "stack.model",
    "report": "analysis.evidence",
    "rule": "registry",
    "sanitize": "analysis.sanitize",
    "save_adapter": "training.save",
    "score": "evaluation.score",
    "selection": "registry",
    "smoothing": "registry",
    "step_size": "registry",
    "train": "training.train",
    "tune": "request.tune",
    "verify": "sharing.verify",
}
__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from .analysis.calibrate import calibrate as calibrate
    from .analysis.compare import compare as compare
    from .analysis.effect_of_run import effect as effect
    from .analysis.evidence import report as report
    from .analysis.interference import interference as interference
    from .analysis.merged import merge as merge
    from .analysis.sanitize import sanitize as sanitize
    from .attacks.attack import attack as attack
    from .attribution.attribute import attribute as attribute
    from .attribution.experts import experts as experts
    from .data.bundle import ForgetRetain as ForgetRetain
    from .errors import UserError as UserError
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.quick import make_score as make_score
    from .evaluation.score import score as score
    from .forward import Pass as Pass
    from .forward import Reference as Reference
    from .merging.compose import compose as compose
    from .records.audit import audit as audit
    from .records.record import record as record
    from .registry import Range as Range
    from .registry import Source as Source
    from .registry import averaging as averaging
    from .registry import methods as methods
    from .registry import metric as metric
    from .registry import objective as objective
    from .registry import rule as rule
    from .registry import selection as selection
    from .registry import smoothing as smoothing
    from .registry import step_size as step_size
    from .request.augment import augment as augment
    from .request.forget import forget as forget
    from .request.tune import tune as tune
    from .sharing.card import card as card
    from .sharing.export import export as export
    from .sharing.publish import pull as pull
    from .sharing.publish import push as push
    from .sharing.verify import verify as verify
    from .stack.model import ForgetModel as ForgetModel
    from .stack.model import remove as remove
    from .training.adapt import get_forget_model as get_forget_model
    from .training.config import UnlearnConfig as UnlearnConfig
    from .training.cost import plan as plan
    from .training.save import save_adapter as save_adapter
    from .training.train import train as train
    from .training.trainer import UnlearnTrainer as UnlearnTrainer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


_registration.install()
