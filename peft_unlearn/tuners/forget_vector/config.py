"""`ForgetVectorConfig`: the shape of the vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.config import PeftConfig

from ...folder.schema import is_whole
from ..peft_type import FORGET_VECTOR, peft_type


@dataclass
class ForgetVectorConfig(PeftConfig):
    """One vector of the shape of an image, added to every input: ``f(x + scale * delta)``, the model frozen.

    Args:
        shape: (channels, height, width) of the images as the model gets them, after normalization and resizing. Default
            what the base's configuration says (``num_channels``, ``image_size``); ResNets have no size of their own.
        init_std: standard deviation of a random start; 0 starts at zero, which is the base exactly.

    Source: Sun et al., Forget Vectors at Play, https://arxiv.org/abs/2412.16780.

    Raises:
        ValueError: a shape or a deviation that is none.
    """

    shape: list[int] | None = field(default=None)
    init_std: float = field(default=0.0)

    # PEFT asks every config for this; the module is found by its place, never by a pattern.
    target_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(FORGET_VECTOR)
        given: Any = self.shape
        if given is not None:
            good = isinstance(given, Sequence) and len(given) == 3 and all(is_whole(n) and n > 0 for n in given)
            if not good:
                raise ValueError(f"ForgetVectorConfig: shape {given!r}: expected [channels, height, width]")
            self.shape = [int(n) for n in given]
        if not isinstance(self.init_std, int | float) or not 0 <= self.init_std < float("inf"):
            raise ValueError(f"ForgetVectorConfig: init_std {self.init_std!r}: expected a number from 0 on")
