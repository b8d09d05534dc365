"""Sums of forget vectors: entry by entry, since what is added to an image adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..folder.read import AdapterFolder
from ..tuners.forget_vector.delta import vector_of
from ..tuners.peft_type import FORGET_VECTOR


def is_vector(folder: AdapterFolder) -> bool:
    return folder.config.get("peft_type") == FORGET_VECTOR


def vector_sum(given: Sequence[tuple[AdapterFolder, float]], rank: int | None) -> tuple[dict[str, Tensor], Any] | None:
    """(tensors, config) of the sum of weight times vector at its scale; None where no adapter is a forget vector.

    Raises:
        UserError: adapters of other types among them, other shapes, a rank, or a sum of zero.
    """
    kinds = [is_vector(f) for f, _ in given]
    if not any(kinds):
        return None
    if not all(kinds):
        raise UserError(
            f"compose: {given[kinds.index(False)][0].path} changes weights and {given[kinds.index(True)][0].path} the input: they have no "
            "sum. Stack them (peft-unlearn stack)."
        )
    if rank is not None:
        raise UserError("compose: forget vectors have no rank to be cut to; leave --rank out.")
    read = [vector_of(f) for f, _ in given]
    if len(shapes := {tuple(v.shape) for _, v in read}) > 1:
        raise UserError(
            f"compose: vectors of {len(shapes)} shapes ({', '.join(map(str, sorted(shapes)))}) have no sum."
        )
    total = sum(w * float(f.manifest.scale) * v for (f, w), (_, v) in zip(given, read, strict=True))
    assert isinstance(total, Tensor)
    if not total.any():
        raise UserError("compose: the sum is zero, which is the base itself; no adapter was written.")
    from ..tuners.forget_vector.config import ForgetVectorConfig

    return {read[0][0]: total.contiguous()}, ForgetVectorConfig(shape=list(total.shape))
