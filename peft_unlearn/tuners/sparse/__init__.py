"""Chosen entries of the base's weights get trained values added: an exact element-wise adapter of any parameter."""

import peft as _peft  # noqa: F401  first of all: importing it registers this package, which must not be half imported then

from .config import SparseConfig
from .export import export_stock
from .model import SparseModel

__all__ = ["SparseConfig", "SparseModel", "export_stock"]
