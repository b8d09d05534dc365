"""A base model with one or several forget adapters on it, each checked against the base that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, nearest
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.card import add_tags
from ..folder.device import placed
from ..folder.digest import digest_checkpoint
from ..folder.dtype import dtype_of
from ..folder.fetch import resolve_adapter
from ..folder.manifest import Probes
from ..folder.merge_record import RECORD, read_record
from ..folder.quantized import RECORD as QUANTIZED
from ..folder.quantized import name_of, options_of, trained_on
from ..folder.read import AdapterFolder, read_adapter
from ..tuners.names import scalings
from .attach import attach, freeze
from .fits import check_base, check_dependencies, check_tokenizer, dependents
from .names import Adapters, Scales, names_of, scales_of
from .removal import RemovalReport, take_off, take_one_off
from .stackfile import is_stack, load


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
        # Name -> the factors of its layers, each with the value it has at scale 1 (alpha/r, rank-stabilized included).
        self._unit = {n: [(s, float(s[n])) for _, s in scalings(model) if n in s] for n in adapters}
        self._tokenizer: Any = None
        if fused:
            from .fused import fuse

            fuse(model)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None,
        adapters: Adapters,
        scales: Scales = None,
        dtype: str | torch.dtype = torch.float32,
        fused: bool = True,
        device: str | None = None,
    ) -> ForgetModel:
        """Load the base and put `adapters` on it, all active and frozen.

        Args:
            base: a folder, a Hub id, ``embedded:NAME``, or None for the one the first adapter's manifest names.
            adapters: folders, Hub ids or ``id@commit``, in stacking order: those that others were trained on top of come
                first. A mapping names them. LoRA and expert adapters may stand together.
            scales: one per adapter; by default each manifest's own.
            dtype: of the base, in floating point; "auto": quantized as it was for the training, else see `folder.dtype.fast_dtype`.
            fused: compute the LoRA adapters of a layer together (`stack.fused`), not one by one.
            device: default see `folder.device`: the accelerator where there is one.

        Raises:
            UserError: an adapter that is damaged, was trained on other weights, with another tokenizer, in another order
                or on top of one that is missing, or that does not fit the base's shapes.
        """
        folders = {name: read_adapter(resolve_adapter(ref)) for name, ref in names_of(adapters).items()}
        return cls._of(folders, base, scales, dtype, fused, device=device)

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
        stack = load(path)
        folders, ref = stack.folders(), stack.base
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
        scales: Scales,
        dtype: str | torch.dtype,
        fused: bool,
        digest: str | None = None,
        device: str | None = None,
    ) -> ForgetModel:
        wanted = scales_of(folders, scales)
        check_dependencies(folders, wanted)
        first = next(iter(folders.values())).manifest.base
        base_dir = resolve_base(first.ref, override=base, revision=first.revision)
        digest = digest or digest_checkpoint(base_dir)
        for folder in folders.values():
            check_base(folder, base_dir, digest)
            check_tokenizer(folder.path, base_dir)
        fits = next(iter(folders.values())).manifest.targets
        held = held_as_trained(folders) if dtype == "auto" else None
        options, kind = held or ({}, dtype_of(dtype, base_dir) if isinstance(dtype, str) else dtype)
        model = attach(placed(load_base(base_dir, kind, fits, options), device), folders)
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

    @property
    def dtype(self) -> str:
        """What the base is computed in: float32, bfloat16 or float16."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")  # the base's come first

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
        """Set the scale of adapter `name`: 1 is as trained, 0 is off, negative is the opposite."""
        self._known(name)
        if not isinstance(value, int | float) or not torch.isfinite(torch.tensor(float(value))):
            raise UserError(f"scale of {name!r}: expected a finite number, found {value!r}.")
        if not self._unit[name] and value != 1:
            kind = self.adapters[name].config.get("peft_type")
            raise UserError(f"{name!r} is of type {kind}, which has no scale to set; it runs at 1.")
        for scaling, unit in self._unit[name]:
            scaling[name] = unit * float(value)
        self._scales[name] = float(value)

    def scales(self) -> dict[str, float]:
        """Name -> scale as set last."""
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
        if name is None or (list(self.adapters) == [name]):
            probes = next((probes_on(self.model, a) for a in self.adapters.values()), None)
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
        self._tokenizer = self.tokenizer  # stays the one it was
        report = take_one_off(self.model, self.base_dir, gone)
        for each in gone:
            for table in (self.adapters, self._scales, self._unit):
                del table[each]
        return report

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise UserError(f"There is no adapter {name!r}.{nearest(name, self.adapters)}")


def held_as_trained(folders: Mapping[str, AdapterFolder]) -> tuple[dict[str, Any], str] | None:
    """(options, dtype) of the quantized base that all of these were trained on; None where that was one in floating point.

    Raises:
        UserError: they were trained on several.
    """
    found = {name: trained_on(folder.manifest.method) for name, folder in folders.items()}
    first = next(iter(found.values()))
    if any(other != first for other in found.values()):
        said = "; ".join(
            f"{n}: {'floating point' if f is None else f'{name_of(f[0])}, {f[1]}'}" for n, f in found.items()
        )
        raise UserError(
            f"these adapters were trained on one base held in several ways ({said}); say what it is to be computed in here with --dtype "
            "float32 or bfloat16: the base's files, unquantized"
        )
    return first


def probes_on(model: Any, folder: AdapterFolder) -> Probes | None:
    """The manifest's probes that `model` should give: those of the quantized base where it is held like that, else the ones in float32."""
    held = trained_on(folder.manifest.method)
    if not (options := options_of(model)):
        return folder.manifest.probes
    if held is None or held[0] != options:
        return None
    rows = folder.manifest.method[QUANTIZED].get("probes")
    return None if rows is None else Probes(**rows)


def remove(
    what: str | Path | ForgetModel | Any, base: str | Path | None = None, name: str | None = None, cascade: bool = False
) -> RemovalReport:
    """Unload every adapter, or the one called `name`, and prove the result.

    Args:
        what: an adapter's folder or Hub id (loaded on `base`, by default its manifest's), a stack file, a `ForgetModel` (its
            `.model` becomes the plain base, or goes on without that one), or a PeftModel together with `base`.
        cascade: with `name` also those that were trained on top of it.

    Raises:
        UserError: input that cannot be loaded, a merged model, an adapter that others stand on; never a failed proof.
    """
    if isinstance(what, str | Path):
        _refuse_merged(Path(what).expanduser())
        if is_stack(what):
            what = ForgetModel.from_stack(what, base)
        elif name is not None:
            raise UserError(f"remove {what}: --name says which adapter of a stack file, and this is no stack file.")
        else:
            what = ForgetModel.from_pretrained(base, what)
    if isinstance(what, ForgetModel):
        return what.remove(name, cascade)
    if base is None:
        raise UserError("remove(model): say which files the base came from, with base=.")
    return take_off(what, resolve_base(None, override=base))[1]


def _refuse_merged(path: Path) -> None:
    """Raise the `UserError` that says what to do where `path` is a model into which adapters were merged."""
    record = read_record(path) if path.is_dir() else None
    if record is not None:
        base = record.get("base") or {}
        ref = str(base.get("ref", "its base")) + (f" at {base['revision']}" if base.get("revision") else "")
        ids = [str(a.get("adapter_id", ""))[:19] for a in record.get("adapters") or [] if isinstance(a, dict)]
        raise UserError(
            f"{path}: is a merged model ({RECORD}): {', '.join(ids) or 'its adapters'} {'are' if len(ids) > 1 else 'is'} in the "
            "rounded weights, and subtracting gives other bits than the base's. To be rid of it, delete this folder and load the "
            f"base again: {ref}, whose digest is {str(base.get('digest', 'unknown'))[:12]}."
        )
    if path.is_dir() and (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: is a whole model, not an adapter; there is nothing on it to take off. If an adapter was merged into it, "
            "delete it and load the base again."
        )
