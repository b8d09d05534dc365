"""What a forget vector's folder adds to the position embeddings of its base, for merging; see `tuners.delta` for low-rank adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...folder.read import WEIGHTS, AdapterFolder
from ...folder.safetensors_io import checkpoint_tensors
from .layer import at_patches, no_positions
from .model import first_convolution, position_embeddings


def vector_of(folder: AdapterFolder) -> tuple[str, Tensor]:
    """(name in the file, the vector (channels, height, width) float32) of a forget vector's folder.

    Raises:
        UserError: the file holds something else.
    """
    from safetensors.torch import load_file

    held = load_file(str(folder.path / WEIGHTS))
    if len(held) != 1:
        raise UserError(f"{folder.path}: holds {len(held)} tensors, and a forget vector is one")
    ((name, vector),) = held.items()
    if list(vector.shape) != folder.config.get("shape"):
        raise UserError(
            f"{folder.path}: its vector has shape {list(vector.shape)}, and its configuration says {folder.config.get('shape')}"
        )
    return name, vector.float()


@dataclass(frozen=True)
class AdaptedPositions:
    """The one adapted parameter, (1, tokens, width): to a merge a stack of one."""

    weight: str
    fused: bool = True


class VectorDeltas:
    """The delta of one forget vector; as `Deltas`, but a matrix itself and no product.

    model: the base, on the meta device if you like; then `base` is the folder of its files, of which one weight is read.

    Raises:
        UserError: a base without position embeddings on its patches, or of images of another shape.
    """

    def __init__(self, folder: AdapterFolder, model: nn.Module, base: Path) -> None:
        _, vector = vector_of(folder)
        path = first_convolution(model)
        if (found := position_embeddings(model, path)) is None:
            raise UserError(f"{folder.path}: {no_positions()}")
        place, ahead = found
        name = next(n for n, p in model.named_parameters() if p is place)
        conv: Any = model.get_submodule(path)
        self.weight, self.shape = name, tuple(place.shape)
        self.adapted = {name: AdaptedPositions(name)}
        if vector.shape[0] != conv.in_channels:
            raise UserError(
                f"{folder.path}: its vector has {vector.shape[0]} channels, and the base reads {conv.in_channels}"
            )
        added = at_patches(conv, _weight(conv, f"{path}.weight", base), vector, ahead)
        if added.shape != place.shape:
            raise UserError(
                f"{folder.path}: its vector covers {added.shape[1] - ahead} patches and the base has embeddings for "
                f"{place.shape[1] - ahead}"
            )
        self.delta = added[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapted)

    def __contains__(self, weight: object) -> bool:
        return weight in self.adapted

    def product(self, weight: str, expert: int | None = None) -> tuple[Tensor, None]:
        """(the delta (tokens, width), None), float32."""
        return self.delta, None

    def touched(self, weight: str) -> list[int]:
        return [0] if self.delta.any() else []


def _weight(conv: Any, name: str, base: Path) -> Tensor:
    """The convolution's weight, float32: the model's own, or from the files where the model holds none."""
    if conv.weight.device.type != "meta":
        return conv.weight.detach().float()
    entry = checkpoint_tensors(base).get(name)
    if entry is None or tuple(entry.shape) != tuple(conv.weight.shape):
        raise UserError(
            f"{base}: its files hold no {name} as the model has it. Merge with --in-memory, which builds the model."
        )
    return torch.as_tensor(entry.tensor()).float()
