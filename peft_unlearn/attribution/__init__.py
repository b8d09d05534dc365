"""What training does where: computes only, writes nothing. `effect` holds the G-effect, `weights` which weights may move."""

from . import oneshot, weights

__all__ = ["oneshot", "weights"]
