"""`attribute`: which weights of a base a selection method would let move on a bundle, saved for a sparse adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data.collate import padding_id
from ..data.load import load_data
from ..errors import Errors, UserError
from ..folder.base import base_reference, load_base, load_tokenizer, resolve_base
from ..folder.device import placed
from ..folder.digest import digest_checkpoint
from ..folder.dtype import dtype_of
from ..folder.results import check_place, write_file, writing
from ..folder.yaml_io import parse_yaml
from ..progress import Progress
from ..reporting.document import Lines, Part, Picture
from ..reporting.result import Result
from ..reporting.selection import selection_picture, selection_text
from ..reporting.text import json_text
from ..tuners.linear import ALL_LINEAR
from ..tuners.selection import Selection
from .weights import check, select

NAME = "selection"


@dataclass
class Attribution(Result):
    """A selection and where in the network it lies.

    where: block ("-" outside of any) -> kind of module -> how many entries were chosen, of how many.
    files: where `write` put it.
    """

    selection: Selection
    where: dict[str, dict[str, tuple[int, int]]]
    files: list[Path] = field(default_factory=list)
    title = "Chosen weights"

    def to_dict(self) -> dict[str, Any]:
        where = {b: {k: {"chosen": c, "of": n} for k, (c, n) in kinds.items()} for b, kinds in self.where.items()}
        about = {"format": 1, **self.selection.about, "count": self.selection.count, "density": self.selection.density}
        return {**about, "where": where, "files": [p.name for p in self.files]}

    def __str__(self) -> str:
        return "\n".join([selection_text(self.to_dict()), *map(str, self.files)])

    def parts(self) -> list[Part]:
        found = self.to_dict()
        return [Lines(selection_text(found)), Picture(selection_picture(found), "where the chosen weights lie", NAME)]

    def write(self, out: str | Path) -> list[Path]:
        """selection.safetensors, .json and .png in the folder `out`; returns their paths."""
        places = check_out(out)
        self.files = places
        with writing(places[0]):
            places[0].parent.mkdir(parents=True, exist_ok=True)
            self.selection.save(places[0])
        write_file(places[1], json_text(self.to_dict()) + "\n")
        write_file(places[2], selection_picture(self.to_dict()))
        return places


def check_out(out: str | Path) -> list[Path]:
    """The files of a selection in the folder `out`; refuses, before any work, places where they would lie upon something else."""
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    tensors = check_place(folder / f"{NAME}.safetensors", is_selection)
    return [tensors, *(check_place(folder / f"{NAME}{kind}") for kind in (".json", ".png"))]


def is_selection(path: Path) -> bool:
    try:
        Selection.load(path)
    except UserError:
        return False
    return True


def hyper_of(sets: Sequence[str]) -> dict[str, Any]:
    """Hyper-parameters of ``["gamma=1e-3", ..]``; values are YAML."""
    errors, out = Errors(), {}
    for text in sets:
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            errors.add(f"--set {text}: expected NAME=VALUE, e.g. gamma=1e-3")
            continue
        out[name.strip()] = parse_yaml(value, f"--set {text}")
    errors.raise_if_any("selection")
    return out


def attribute(
    base: str, data: str, *, method: str, ratio: float, hyper: Mapping[str, Any] | None = None, budget: str = "global", unit: str = "entry",
    target_modules: str | Sequence[str] = ALL_LINEAR, forget: str | None = None, n: int | None = None, seed: int = 0,
    dtype: str = "auto", accumulators: str = "float32", on_cpu: bool = False, progress: Progress | None = None,
) -> Attribution:  # fmt: skip
    """The weights of a base that a method would let move, given a bundle; both by name. Writes nothing.

    Args:
        ratio, hyper, budget, unit, target_modules, forget, seed: see `weights.select`.
        n: at most so many rows of each set, evenly spaced.
        dtype: the base is computed in it; auto: its own where this machine is fast in it.
        accumulators: dtype of the summed gradients, float32 or bfloat16. on_cpu: they lie in host memory.

    Raises:
        UserError: of `weights.select`; a base or data that cannot be read.
    """
    if accumulators not in ("float32", "bfloat16"):
        raise UserError(f"accumulators {accumulators!r}: expected float32 or bfloat16")
    check(method, hyper or {}, ratio, budget, unit)
    bundle, path = load_data(None, data), resolve_base(base)
    model, tokenizer = placed(load_base(path, dtype_of(dtype, path))), load_tokenizer(path)
    rows = {name: bundle.encode(name, tokenizer) for name in bundle.sets() if name in ("forget", "retain")}
    rows = {name: r if n is None or n >= len(r) else [r[i * len(r) // n] for i in range(n)] for name, r in rows.items()}
    reference = base_reference(base, path, digest_checkpoint(path))
    found = select(
        model, rows, method=method, ratio=ratio, hyper=hyper, target_modules=target_modules, budget=budget, unit=unit, forget=forget,  # type: ignore[arg-type]
        pad_id=padding_id(tokenizer), seed=seed, accumulators=getattr(torch, accumulators), device="cpu" if on_cpu else None,
        about=origin(reference.ref, reference.digest, bundle.sha256), progress=progress,
    )  # fmt: skip
    return Attribution(found, where(found))


def origin(ref: str, digest: str, data: Mapping[str, str]) -> dict[str, Any]:
    """What a selection records of the base and the data that it was made with, see `Selection.check_origin`."""
    return {"base": {"ref": ref, "digest": digest}, "data": dict(data)}


def where(found: Selection) -> dict[str, dict[str, tuple[int, int]]]:
    """block ("-" outside of any) -> kind of module -> (entries chosen, of how many), from the input to the output."""
    out: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in found.shapes.items():
        parts = name.removesuffix(".weight").split(".")
        block = next((p for p in parts if p.isdigit()), "-")
        kinds = out.setdefault(block, {})
        chosen, of = kinds.get(parts[-1], (0, 0))
        kinds[parts[-1]] = chosen + found.indices[name].numel(), of + torch.Size(shape).numel()
    return dict(sorted(out.items(), key=lambda x: (x[0] == "-", int(x[0]) if x[0].isdigit() else 0)))
