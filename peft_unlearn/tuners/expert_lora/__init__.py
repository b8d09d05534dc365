"""LoRA inside chosen experts of a mixture-of-experts model, and their export to stock PEFT."""

import peft as _peft  # noqa: F401  first of all: importing it registers this package, which must not be half imported then

from .blocks import MoeBlock, moe_blocks
from .config import ExpertLoraConfig
from .export import export_stock
from .model import ExpertLoraModel

__all__ = [
    "ExpertLoraConfig",
    "ExpertLoraModel",
    "MoeBlock",
    "export_stock",
    "moe_blocks",
]
