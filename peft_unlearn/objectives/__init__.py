"""Forget and retain losses. One function each: ``fn(p: Pass, *, hyper...) -> (n_units,)``, unreduced, minimized."""

from . import bounded, classification, distillation, entropy, likelihood, preference, representation, routing

__all__ = [
    "bounded",
    "classification",
    "distillation",
    "entropy",
    "likelihood",
    "preference",
    "representation",
    "routing",
]
