"""Named gradients of one optimizer step: rules that combine them, smoothing, averaging, automatic learning rate."""

from . import average, rules, smooth, step_size

__all__ = ["average", "rules", "smooth", "step_size"]
