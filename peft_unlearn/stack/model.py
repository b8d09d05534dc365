"""A base model with one or several forget adapters on it, each checked against the base that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, nearest
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.card import add_tags
from ..folder.digest import digest_checkpoint
from ..folder.fetch import is_hub_id, resolve_adapter, split_reference
from ..folder.read import AdapterFolder, read_adapter
from .attach import attach, detach, freeze, kind_of
from .fits import check_base, check_dependencies, check_tokenizer, dependents
from .removal import RemovalReport, take_off, take_one_off

__all__ = ["ForgetModel", "attach", "check_base", "freeze"]

Adapters = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


class ForgetModel:
    """Use `ForgetModel.from_pretrained` or `ForgetModel.from_stack`.

    model: the peft model; base_dir: the folder of the base's files; adapters: name -> AdapterFolder, in stacking order;
    base_digest: of the files in base_dir.
    """

    def __init__(
        self, model: Any, base_dir: Path, adapters: dict[str, AdapterFolder], base_digest: str, fused: bool = True
    ) -> None:
        self.model = model
        self.base_dir = base_dir
        self.adapters = adapters
        self.base_digest = base_digest
        self._scales = dict.fromkeys(adapters, 1.0)
        self._unit = {name: _scalings(model, name) for name in adapters}
        self._tokenizer: Any = None
        if fused:
            from .fused import fuse

            fuse(model)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None,
        adapters: Adapters,
        scales: Sequence[float] | Mapping[str, float] | None = None,
        dtype: str | torch.dtype = torch.float32,
        fused: bool = True,
    ) -> ForgetModel:
        """Load the base and put `adapters` on it, all active and frozen.

        Args:
            base: a folder, a Hub id, ``embedded:NAME``, or None for the one the first adapter's manifest names.
            adapters: folders, Hub ids or ``id@commit``, in stacking order: those that others were trained on top of come
                first. A mapping names them. LoRA and expert adapters may stand together.
            scales: one per adapter; by default each manifest's own.
            fused: compute the LoRA adapters of a layer together (`stack.fused`), not one by one.

        Raises:
            UserError: an adapter that is damaged, was trained on other weights, with another tokenizer, in another order
                or on top of one that is missing, or that does not fit the base's shapes.
        """
        folders = {name: read_adapter(resolve_adapter(ref)) for name, ref in names_of(adapters).items()}
        return cls._of(folders, base, scales, dtype, fused)

    @classmethod
    def from_stack(
        cls,
        path: str | Path,
        base: str | Path | None = None,
        dtype: str | torch.dtype = torch.float32,
        fused: bool = True,
    ) -> ForgetModel:
        """The active adapters of a stack file (`stack.stackfile`), each at the scale written there.

        Raises:
            UserError: as `from_pretrained`; and for an adapter that is not the one that was added to the file.
        """
        from .stackfile import load

        stack = load(path)
        folders = stack.folders()
        if not folders:
            raise UserError(f"{path}: no adapter of this stack is active; the base itself is what it describes.")
        ref = stack.base
        found = resolve_base(ref.ref, override=base, revision=ref.revision)
        digest = digest_checkpoint(found)
        if digest != ref.digest:
            raise UserError(
                f"{path}: the stack stands on the base {ref.ref} with digest {ref.digest[:12]}, and {found} has digest "
                f"{digest[:12]}: other weights. Give the right base with --base."
            )
        return cls._of(folders, found, stack.scales(), dtype, fused, digest)

    @classmethod
    def _of(
        cls,
        folders: dict[str, AdapterFolder],
        base: str | Path | None,
        scales: Sequence[float] | Mapping[str, float] | None,
        dtype: str | torch.dtype,
        fused: bool,
        digest: str | None = None,
    ) -> ForgetModel:
        wanted = scales_of(folders, scales)
        check_dependencies(folders, wanted)
        first = next(iter(folders.values())).manifest.base
        base_dir = resolve_base(first.ref, override=base, revision=first.revision)
        digest = digest or digest_checkpoint(base_dir)
        for folder in folders.values():
            check_base(folder, base_dir, digest)
            check_tokenizer(folder.path, base_dir)
        model = attach(load_base(base_dir, dtype), folders)
        add_tags(model)
        stack = cls(model, base_dir, folders, digest, fused)
        for name, value in wanted.items():
            stack.scale(name, value)
        return stack

    @property
    def tokenizer(self) -> Any:
        """The first adapter's tokenizer, else the base's."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(*(a.path for a in self.adapters.values()), self.base_dir)
        return self._tokenizer

    def active(self) -> list[str]:
        """Names of the adapters that take part in the forward now."""
        status = self.model.get_model_status()
        return list(status.active_adapters) if status.enabled is True else []

    def chain(self, name: str) -> list[str]:
        """`name` with every adapter it was trained on top of, in stacking order: what has to be active to judge it."""
        self._known(name)
        ids = set(self.adapters[name].manifest.depends_on)
        for other in reversed(self.adapters.values()):
            if other.adapter_id in ids:
                ids |= set(other.manifest.depends_on)
        return [n for n, f in self.adapters.items() if n == name or f.adapter_id in ids]

    @contextmanager
    def disabled(self) -> Iterator[Any]:
        """The base alone, bit for bit, for the length of the block."""
        with self.model.disable_adapter():
            yield self.model
        freeze(self.model)  # PEFT makes active adapters trainable when it switches them on again

    def scale(self, name: str, value: float) -> None:
        """Set the strength of adapter `name`: 1 is as trained, 0 is off, negative is the opposite."""
        self._known(name)
        if not isinstance(value, int | float) or not torch.isfinite(torch.tensor(float(value))):
            raise UserError(f"scale of {name!r}: expected a finite number, found {value!r}.")
        if not self._unit[name] and value != 1:
            raise UserError(
                f"{name!r} is of type {kind_of(self.adapters[name].config)}, which has no strength to set; it runs at 1."
            )
        for layer, unit in self._unit[name]:
            layer.scaling[name] = unit * float(value)
        self._scales[name] = float(value)

    def scales(self) -> dict[str, float]:
        """Name -> strength as set last."""
        return dict(self._scales)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def remove(self, name: str | None = None, cascade: bool = False) -> RemovalReport:
        """Take adapters off for good and prove it.

        Without `name` all of them (`removal.take_off`); `.model` is then the plain base. With it that one alone: the others
        go on as if it had never been there (`removal.take_one_off`).

        Raises:
            UserError: others were trained on top of `name`, and `cascade`, which takes those off too, was not asked for.
        """
        probes = next((a.manifest.probes for a in self.adapters.values()), None)
        if name is None or (list(self.adapters) == [name]):
            tokenizer = None if probes is None else self.tokenizer
            self.model, report = take_off(self.model, self.base_dir, probes, tokenizer)
            self.adapters, self._scales, self._unit = {}, {}, {}
            return report
        self._known(name)
        above = dependents(self.adapters, [name])
        if above and not cascade:
            raise UserError(
                f"{', '.join(above)} {'was' if len(above) == 1 else 'were'} trained on top of {name!r} and would answer "
                "otherwise without it. Take those off first, or all together (cascade)."
            )
        gone = [*reversed(above), name]
        if len(gone) == len(self.adapters):
            return self.remove()
        tokenizer = self.tokenizer
        report = take_one_off(self.model, self.base_dir, gone, detach)
        for each in gone:
            for table in (self.adapters, self._scales, self._unit):
                del table[each]
        self._tokenizer = tokenizer
        return report

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise UserError(f"There is no adapter {name!r}.{nearest(name, self.adapters)}")


def names_of(adapters: Adapters, alone: str = "default") -> dict[str, str | Path]:
    """Name -> folder or Hub id: a mapping's keys, else the folders' names; one adapter alone is called `alone`."""
    if isinstance(adapters, Mapping):
        named = {str(k): v for k, v in adapters.items()}
    else:
        paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        named = {}
        for path in paths:
            # PEFT uses the name as a module name: no dots. One adapter alone is PEFT's "default".
            stem = re.sub(r"[^A-Za-z0-9_-]", "_", _last(path)) if len(paths) > 1 else alone
            name, k = stem, 2
            while name in named:
                name, k = f"{stem}_{k}", k + 1
            named[name] = path
    if not named:
        raise UserError("No adapter was given.")
    for name in named:
        if name == "__base__" or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise UserError(f"The adapter name {name!r} cannot be used: letters, digits, _ and - only.")
    return named


def _last(ref: str | Path) -> str:
    text = split_reference(str(ref))[0] if is_hub_id(ref) else str(ref)
    return Path(text).expanduser().resolve().name


def scales_of(
    folders: dict[str, AdapterFolder], scales: Sequence[float] | Mapping[str, float] | None
) -> dict[str, float]:
    out = {name: float(f.manifest.scale) for name, f in folders.items()}
    if isinstance(scales, Mapping):
        for name in scales:
            if name not in out:
                raise UserError(f"scales: there is no adapter {name!r}.{nearest(str(name), out)}")
        out.update(scales)
    elif scales is not None:
        if len(scales) != len(out):
            raise UserError(f"scales: {len(scales)} given for {len(out)} adapters.")
        out = dict(zip(out, scales, strict=True))
    return out


def _scalings(model: Any, adapter: str) -> list[tuple[Any, float]]:
    """Layers of `adapter`, each with the factor PEFT multiplies B A with at scale 1 (alpha/r, rank-stabilised included)."""
    found = []
    for module in model.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            found.append((module, float(scaling[adapter])))
    return found
