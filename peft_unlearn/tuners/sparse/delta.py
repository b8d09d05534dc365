"""What a sparse adapter's folder adds to each weight, for merging and composing; see `tuners.delta` for low-rank ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...folder.digest import base_tensors
from ...folder.read import CONFIG, AdapterFolder, read_json
from .config import SparseConfig
from .export import Entries, compact, read_entries


@dataclass(frozen=True)
class AdaptedEntries:
    """One adapted parameter."""

    weight: str
    entries: Entries

    @property
    def fused(self) -> bool:
        return len(self.entries.shape) == 3


class SparseDeltas:
    """The deltas of one adapter by the name of the parameter; as `Deltas`, but each is a matrix itself and no product.

    model: the base, on the meta device if you like; stock forms without a compact one need it, for the shapes.
    """

    def __init__(self, folder: AdapterFolder, model: nn.Module | None = None) -> None:
        self.folder = folder
        place = folder.compact or folder.path
        config = read_json(place / CONFIG) if folder.compact else folder.config
        known = None if model is None else base_tensors(model)

        def shape(name: str) -> tuple[int, ...]:
            if known is None or name not in known:
                raise UserError(f"{folder.path}: it adapts {name}, and there is no such weight in the base")
            return tuple(known[name].shape)

        self.entries, self.scale = read_entries(place, config, None if known is None else shape)
        self.adapted = {n: AdaptedEntries(n, e) for n, e in self.entries.items()}
        if known is not None and (odd := next((n for n, e in self.entries.items() if shape(n) != e.shape), None)):
            raise UserError(
                f"{folder.path}: {odd} is {list(shape(odd))} in the base, and the adapter's entries are of {list(self.entries[odd].shape)}"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.adapted)

    def __contains__(self, weight: object) -> bool:
        return weight in self.adapted

    def product(self, weight: str, expert: int | None = None) -> tuple[Tensor, None]:
        """(the delta (rows, columns), None), float32; of `expert` if it is a stack of them. No more than that is made."""
        e = self.entries[weight]
        shape, i, v = e.shape, e.positions, e.values
        if expert is not None:
            shape = shape[1:]
            size = torch.Size(shape).numel()
            inside = slice(*torch.searchsorted(i, torch.tensor([expert * size, (expert + 1) * size])).tolist())
            i, v = i[inside] - expert * size, v[inside]
        out = torch.zeros(torch.Size(shape).numel()).index_copy(0, i, v * self.scale)
        return out.view(shape[0], -1), None

    def touched(self, weight: str) -> list[int]:
        """The experts that have entries; [0] for a weight that is not a stack of experts."""
        e = self.entries[weight]
        if not self.adapted[weight].fused:
            return [0]
        return torch.unique(e.positions // torch.Size(e.shape[1:]).numel()).tolist()


def read_sparse(folder: AdapterFolder, base: nn.Module) -> tuple[SparseConfig, dict[str, Entries]]:
    """An adapter, ours or stock, for `base` (which may carry others): its config, and its values for `export.fill`.

    Raises:
        UserError: it is no sparse adapter, or does not fit `base`.
    """
    found = SparseDeltas(folder, base)
    config, _ = compact(found.entries, found.scale, folder.config.get("task_type"))
    return config, found.entries
