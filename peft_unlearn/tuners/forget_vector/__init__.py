"""One vector added to the input of an image classifier, whose weights stay as they are (Forget Vector)."""

import peft as _peft  # noqa: F401  first of all, as in `expert_lora`

from .config import ForgetVectorConfig
from .model import ForgetVectorModel

__all__ = ["ForgetVectorConfig", "ForgetVectorModel"]
