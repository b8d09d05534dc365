"""The frozen adapters that a new one is trained on top of: from a recipe's ``stack``, or from a stack file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Errors, UserError
from ..folder.digest import digest_checkpoint
from ..folder.fetch import resolve_adapter
from ..folder.read import AdapterFolder, read_adapter
from ..folder.schema import is_number
from ..tuners.names import scalings
from .attach import attach
from .fits import check_base, check_dependencies, check_tokenizer, scales_below
from .names import names_of, scales_of
from .stackfile import load


@dataclass
class Below:
    """Name -> folder in stacking order, and name -> the scale each runs at."""

    folders: dict[str, AdapterFolder] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.folders)

    @property
    def ids(self) -> list[str]:
        """For the manifest's `depends_on`."""
        return [f.adapter_id for f in self.folders.values()]

    def rows(self) -> list[dict[str, Any]]:
        """For the recipe: adapters by id, which is all that a published file may say of them."""
        return [{"adapter": f.adapter_id, "scale": self.scales[n]} for n, f in self.folders.items()]

    def check(self, base_dir: Path) -> None:
        """Refuse adapters of another base or tokenizer."""
        digest = digest_checkpoint(base_dir) if self.folders else ""
        for folder in self.folders.values():
            check_base(folder, base_dir, digest)
            check_tokenizer(folder.path, base_dir)

    def put_on(self, base: Any) -> Any:
        """`base` as a PeftModel with these adapters active and frozen, at their scales; `base` itself if there are none."""
        if not self.folders:
            return base
        model = attach(base, self.folders)
        for _, scaling in scalings(model):
            for name in scaling.keys() & self.scales.keys():
                scaling[name] *= self.scales[name]
        return model


def read_below(spec: Any, stack_file: str | Path | None = None) -> Below:
    """The adapters of a recipe's ``stack`` (folders, Hub ids, adapter ids; or ``{adapter: .., scale: ..}``), lowest first.

    Args:
        stack_file: where adapter ids are looked up; alone, all its active adapters are meant.

    Raises:
        UserError: not a list of adapters; an id without a stack file that has it; adapters in another order than they were
            trained in, or damaged ones.
    """
    errors = Errors()
    rows: list[tuple[str, float | None]] = []
    if spec is not None and not isinstance(spec, list):
        errors.add(f"stack is a list of adapters, e.g. [out/first, me/second@COMMIT], not {spec!r}")
        spec = []
    for row in spec or []:
        ref, scale = (row.get("adapter"), row.get("scale")) if isinstance(row, Mapping) else (row, None)
        odd = sorted(set(row) - {"adapter", "scale"}) if isinstance(row, Mapping) else []
        if not isinstance(ref, str) or odd or not (scale is None or is_number(scale)):
            errors.add(f"stack: {row!r} is no adapter; give its folder, its id, or {{adapter: .., scale: ..}}")
        else:
            rows.append((ref, scale))
    errors.raise_if_any("recipe")
    if stack_file is not None:
        return _from_file(rows, stack_file)
    if hashed := [ref for ref, _ in rows if ref.startswith("sha256:")]:
        raise UserError(
            f"stack: the recipe knows {hashed[0][:19]} by its id alone; say which stack file has it with --stack FILE."
        )
    if not rows:
        return Below()
    named = names_of([ref for ref, _ in rows], "below")
    folders = {_below(n): read_adapter(resolve_adapter(ref)) for n, ref in named.items()}
    scales = scales_of(folders, {n: float(s) for n, (_, s) in zip(folders, rows, strict=True) if s is not None})
    check_dependencies(folders, scales)
    return Below(folders, scales)


def over(adapters: Mapping[str, AdapterFolder], given: Sequence[str | Path]) -> Below:
    """Adapters with those that were `given` as what they were trained on top of, lowest first. `scales` are of the latter alone: those of
    that training.

    Raises:
        UserError: one of the given that none of these adapters, nor another of the given, needs.
    """
    lower = {f"below_{i}": read_adapter(resolve_adapter(ref)) for i, ref in enumerate(given)}
    needed = {d for f in [*lower.values(), *adapters.values()] for d in f.manifest.depends_on}
    for folder in lower.values():
        if folder.adapter_id not in needed:
            raise UserError(
                f"{folder.path}: none of these adapters was trained on top of it; leave it out of --below, and name there what they were "
                "trained on"
            )
    trained = {adapter: scale for f in adapters.values() for adapter, scale in scales_below(f)}
    scales = {n: trained.get(f.adapter_id, float(f.manifest.scale)) for n, f in lower.items()}
    return Below({**lower, **adapters}, scales)


def _from_file(rows: list[tuple[str, float | None]], stack_file: str | Path) -> Below:
    stack = load(stack_file)
    folders = {_below(n): f for n, f in stack.folders().items()}
    scales = {_below(n): s for n, s in stack.scales().items()}
    if rows:
        if plain := [ref for ref, _ in rows if not ref.startswith("sha256:")]:
            raise UserError(
                f"stack: {plain[0]} stands in the recipe, and --stack {stack_file} was given; use one of them."
            )
        by_id = {f.adapter_id: n for n, f in folders.items()}
        if lost := [ref for ref, _ in rows if ref not in by_id]:
            raise UserError(f"{stack.path}: has no active adapter {lost[0][:19]}, which the recipe trains on top of.")
        chosen = [(by_id[ref], s) for ref, s in rows]
        folders = {n: folders[n] for n, _ in chosen}
        scales = {n: scales[n] if s is None else float(s) for n, s in chosen}
    check_dependencies(folders, scales)
    return Below(folders, scales)


def _below(name: str) -> str:
    return f"{name}_below" if name == "default" else name  # which is what the new one will be called
