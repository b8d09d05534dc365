"""Which entries of which weights may move: what a selection method finds and a sparse adapter trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from ..folder.atomic import write_bytes
from ..folder.safetensors_io import ordered

FORMAT = "peft_unlearn.selection/1"


@dataclass(frozen=True)
class Selection:
    """Chosen entries, parameter by parameter.

    indices: name of the base's parameter (no PEFT prefix) -> sorted, unique, row-major flat positions, int64, (k,).
    shapes: the same names -> the parameter's shape.
    about: how they were found (method, hyper-parameters, ratio, budget, digests of base and data), plain JSON.
    """

    indices: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Chosen entries in all."""
        return sum(i.numel() for i in self.indices.values())

    @property
    def density(self) -> float:
        """Share of the entries of the named parameters."""
        return self.count / max(1, sum(torch.Size(s).numel() for s in self.shapes.values()))

    def check_origin(self, base: str, data: Mapping[str, str]) -> None:
        """Refuse a base, or data, other than those that the selection was made with; what it did not read may be any.

        Args:
            base: digest of the base (`folder.digest.digest_checkpoint`). data: set -> sha256 of its rows (`ForgetRetain.sha256`).

        Raises:
            UserError: everything that differs, with what to do.
        """
        made, read = self.about.get("base", {}), self.about.get("data", {})
        other = [f"the {n} rows are others" for n in self.about.get("rows", {}) if n in read and data.get(n) != read[n]]
        if made.get("digest", base) != base:
            other.insert(0, f"the base has the digest {base[:12]}, that one {made['digest'][:12]}")
        if other:
            raise UserError(
                f"the selection ({self.about.get('method')}, of {made.get('ref')}) was made with something else: "
                f"{'; '.join(other)}. Scores of other weights or rows say nothing here: make one with `peft-unlearn attribute`"
            )

    def save(self, path: str | Path) -> Path:
        """One safetensors file: int32 positions where they fit, shapes and `about` in its header."""
        from safetensors.torch import save

        fits = {n: torch.Size(s).numel() < 2**31 for n, s in self.shapes.items()}
        tensors = {n: i.to(torch.int32 if fits[n] else torch.int64).contiguous() for n, i in self.indices.items()}
        header = {"shapes": {n: list(s) for n, s in self.shapes.items()}, "about": dict(self.about)}
        write_bytes(
            Path(path), ordered(save(tensors, {"format": FORMAT, "selection": json.dumps(header, sort_keys=True)}))
        )
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> Selection:
        """Raises UserError for a file that is none, or whose positions do not lie in their parameters in rising order."""
        try:
            with safe_open(str(path), "pt") as f:
                meta = f.metadata() or {}
                if meta.get("format") != FORMAT:
                    raise UserError(f"{path} is no selection ({FORMAT}); `peft-unlearn attribute` writes one")
                header = json.loads(meta["selection"])
                indices = {n: f.get_tensor(n).to(torch.int64) for n in f.keys()}  # noqa: SIM118
            shapes = {n: tuple(int(d) for d in s) for n, s in header["shapes"].items()}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{path} cannot be read as a selection: {e}") from e
        if set(indices) != set(shapes):
            raise UserError(f"{path}: positions and shapes name different parameters")
        for name, i in indices.items():
            size = torch.Size(shapes[name]).numel()
            if i.dim() != 1 or bool((i[1:] <= i[:-1]).any()) or (i.numel() and (int(i[0]) < 0 or int(i[-1]) >= size)):
                raise UserError(f"{path}: positions of {name} are not rising numbers below {size}")
        return Selection(indices, shapes, header["about"])
