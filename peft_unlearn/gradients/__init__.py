"""Named gradients of one optimizer step, and the rules that combine them."""

from . import rules

__all__ = ["rules"]
