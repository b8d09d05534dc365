"""Forget and retain losses. One function each: ``fn(p: Pass, *, hyper...) -> (n_units,)``, unreduced, minimized."""

from . import distillation, likelihood, preference

__all__ = ["distillation", "likelihood", "preference"]
