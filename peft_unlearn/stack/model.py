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
from ..folder.digest import digest_checkpoint
from ..folder.read import AdapterFolder, read_adapter
from .removal import RemovalReport, take_off

Adapters = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


class ForgetModel:
    """Use `ForgetModel.from_pretrained`.

    model: the peft model; base_dir: the folder of the base's files; adapters: name -> AdapterFolder, in stacking order;
    base_digest: of the files in base_dir.
    """

    def __init__(self, model: Any, base_dir: Path, adapters: dict[str, AdapterFolder], base_digest: str) -> None:
        self.model = model
        self.base_dir = base_dir
        self.adapters = adapters
        self.base_digest = base_digest
        self._scales = dict.fromkeys(adapters, 1.0)
        self._unit = {name: _scalings(model, name) for name in adapters}
        self._tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path | None,
        adapters: Adapters,
        scales: Sequence[float] | Mapping[str, float] | None = None,
        dtype: str | torch.dtype = torch.float32,
    ) -> ForgetModel:
        """Load the base and put `adapters` (folders; a mapping names them) on it, all active and frozen.

        base: a folder, a Hub id, ``embedded:NAME``, or None for the one the first adapter's manifest names.
        scales: one per adapter; by default each manifest's own. Refuses an adapter trained on other weights.
        """
        folders = {name: read_adapter(path) for name, path in _named(adapters).items()}
        first = next(iter(folders.values())).manifest.base
        base_dir = resolve_base(first.ref, override=base, revision=first.revision)
        digest = digest_checkpoint(base_dir)
        for folder in folders.values():
            check_base(folder, base_dir, digest)
        _check_dependencies(folders)
        wanted = _scales(folders, scales)
        model = attach(load_base(base_dir, dtype), folders)
        stack = cls(model, base_dir, folders, digest)
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

    @contextmanager
    def disabled(self) -> Iterator[Any]:
        """The base alone, bit for bit, for the length of the block."""
        with self.model.disable_adapter():
            yield self.model
        freeze(self.model)  # PEFT makes active adapters trainable when it switches them on again

    def scale(self, name: str, value: float) -> None:
        """Set the strength of adapter `name`: 1 is as trained, 0 is off, negative is the opposite."""
        if name not in self.adapters:
            raise UserError(f"There is no adapter {name!r}.{nearest(name, self.adapters)}")
        if not isinstance(value, int | float) or not torch.isfinite(torch.tensor(float(value))):
            raise UserError(f"scale of {name!r}: expected a finite number, found {value!r}.")
        layers = dict(self.model.named_modules())
        for at, unit in self._unit[name].items():
            layers[at].scaling[name] = unit * float(value)
        self._scales[name] = float(value)

    def scales(self) -> dict[str, float]:
        """Name -> strength as set last."""
        return dict(self._scales)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.generate(*args, **kwargs)

    def remove(self) -> RemovalReport:
        """Take every adapter off for good and prove it (`removal.take_off`); `.model` is then the plain base."""
        probes = next(iter(self.adapters.values())).manifest.probes
        self.model, report = take_off(self.model, self.base_dir, probes, None if probes is None else self.tokenizer)
        return report


def attach(base: Any, folders: dict[str, AdapterFolder]) -> Any:
    """`base` wrapped as a PeftModel with all of `folders` active, frozen, in evaluation mode. Ignores scales."""
    from peft import PeftModel

    kinds = {str(f.config["peft_type"]) for f in folders.values()}
    if len(kinds) > 1:
        raise UserError(f"Adapters of several PEFT types ({', '.join(sorted(kinds))}) cannot be active together yet.")
    model: Any = None
    for name, folder in folders.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder.path), adapter_name=name)
            else:
                model.load_adapter(str(folder.path), adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as e:
            raise UserError(f"{folder.path}: PEFT cannot put this adapter on the base ({_brief(e)}).") from None
    if len(folders) > 1:
        model.base_model.set_adapter(list(folders), inference_mode=True)
    freeze(model)
    return model.eval()


def freeze(model: Any) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def check_base(folder: AdapterFolder, base_dir: Path, digest: str) -> None:
    """Refuse `folder` on a base with other weights than it was trained on."""
    base = folder.manifest.base
    if base.digest != digest:
        raise UserError(
            f"{folder.path}: was trained on the base {base.ref} with digest {base.digest[:12]}, but {base_dir} "
            f"has digest "
            f"{digest[:12]}: other weights, on which this adapter means nothing. Give the right base with --base."
        )


def _named(adapters: Adapters) -> dict[str, str | Path]:
    if isinstance(adapters, Mapping):
        named = {str(k): v for k, v in adapters.items()}
    else:
        paths = [adapters] if isinstance(adapters, str | Path) else list(adapters)
        named = {}
        for path in paths:
            # PEFT uses the name as a module name: no dots. One adapter alone is PEFT's "default".
            stem = (
                re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).expanduser().resolve().name) if len(paths) > 1 else "default"
            )
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


def _check_dependencies(folders: dict[str, AdapterFolder]) -> None:
    below: set[str] = set()
    for folder in folders.values():
        lost = [d for d in folder.manifest.depends_on if d not in below]
        if lost:
            raise UserError(
                f"{folder.path}: was trained on top of {len(lost)} adapter(s) that are not below it, first "
                f"{lost[0][:19]}; "
                "give those first, in the order of training."
            )
        below.add(folder.adapter_id)


def _scales(
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


def _scalings(model: Any, adapter: str) -> dict[str, float]:
    """Module name -> the factor PEFT multiplies B A with at scale 1 (alpha/r, rank-stabilised variants included)."""
    found = {}
    for at, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and adapter in scaling:
            found[at] = float(scaling[adapter])
    return found


def _brief(e: Exception) -> str:
    lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(e).__name__
