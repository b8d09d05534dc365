"""What training does where: computes only, writes nothing. `effect` holds the G-effect, `weights` which weights may move."""

from . import weights

__all__ = ["weights"]
