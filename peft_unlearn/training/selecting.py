"""A recipe's ``selection``: which entries of the base's weights a sparse adapter trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..attribution.attribute import origin
from ..attribution.streamed import eligible
from ..attribution.weights import select
from ..data.bundle import ForgetRetain
from ..data.collate import padding_id
from ..errors import Errors, UserError, nearest
from ..folder.base import base_reference
from ..folder.digest import digest_checkpoint
from ..folder.schema import COUNT, TEXT, is_number, is_whole, one_of, shape
from ..tuners.linear import ALL_LINEAR
from ..tuners.selection import Selection
from ..tuners.sparse.config import SparseConfig
from .config import UnlearnConfig, encode_set

NEVER, EPOCH = "never", "epoch"
_REFRESH = shape("never, epoch or a number of steps", lambda v: v in (NEVER, EPOCH) or (is_whole(v) and v >= 1))
_OPTIONS = {
    "method": TEXT, "ratio": shape("a number", is_number), "budget": one_of("global", "module"),
    "unit": one_of("entry", "row", "column", "module"), "refresh": _REFRESH,
    "file": TEXT, "forget": TEXT, "size": COUNT, "accumulators": one_of("float32", "bfloat16"), "device": TEXT,
}  # fmt: skip
FILE = "selection.safetensors"


@dataclass
class Selecting:
    """What a recipe says of it. file: a selection made before, None where the run makes its own. hyper: of the method."""

    method: str = ""
    ratio: float = 0.0
    budget: str = "global"
    refresh: Any = NEVER
    file: str | None = None
    forget: str | None = None
    size: int = 16
    unit: str = "entry"
    accumulators: str = "float32"
    device: str | None = None
    hyper: Mapping[str, Any] | None = None
    target_modules: Any = ALL_LINEAR
    scale: float = 1.0

    def adapter(self, chosen: Selection) -> SparseConfig:
        """The config of the adapter that trains these entries; with a refresh, of one on all entries that could be chosen."""
        if self.refresh != NEVER:
            every = {n: torch.arange(torch.Size(s).numel(), device="cpu") for n, s in chosen.shapes.items()}
            chosen = replace(chosen, indices=every)
        return SparseConfig(selection=chosen, scale=self.scale, task_type="CAUSAL_LM")  # type: ignore[arg-type]

    def planned(self, base: Any) -> SparseConfig:
        """The config of an adapter of this size on a base without weights, to be counted: which entries is not known yet."""
        if self.file is not None:
            return self.adapter(Selection.load(self.file))
        shapes = {n: tuple(p.shape) for n, p in eligible(base, self.target_modules).items()}
        sizes = {n: torch.Size(s).numel() for n, s in shapes.items()}
        counts = {n: max(1, int(self.ratio * size)) for n, size in sizes.items()}
        if (
            self.budget == "global"
            and (more := int(self.ratio * sum(sizes.values()) + 1e-9) - sum(counts.values())) > 0
        ):
            counts[max(sizes, key=lambda n: sizes[n])] += (
                more  # each share was rounded down, and all together only once
            )
        return self.adapter(Selection({n: torch.arange(k, device="cpu") for n, k in counts.items()}, shapes))

    def choose(
        self,
        model: Any,
        tokenizer: Any,
        data: ForgetRetain,
        config: UnlearnConfig,
        turn: int = 0,
        about: Mapping[str, Any] | None = None,
        progress: Callable[..., None] | None = None,
    ) -> Selection:
        """The entries by this recipe, on `model` as it is now; the `turn`-th time in the run."""
        rows = {n: encode_set(config, data, n, tokenizer) for n in ("forget", "retain") if data.rows(n)}
        return select(
            model, rows, method=self.method, ratio=self.ratio, hyper=self.hyper, target_modules=self.target_modules,
            budget=self.budget, unit=self.unit, forget=self.forget, pad_id=padding_id(tokenizer), size=self.size, seed=config.seed + turn,  # type: ignore[arg-type]
            accumulators=getattr(torch, self.accumulators), device=self.device, about=about, progress=progress,
        )  # fmt: skip


def understood(recipe: Mapping[str, Any], adapter: dict[str, Any], errors: Errors) -> Selecting | None:
    """What a recipe selects; None for an adapter that is not sparse. What is selected from is taken out of `adapter`."""
    given, kind = recipe.get("selection"), str(adapter.get("type", "lora")).lower()
    if kind != "sparse":
        if given is not None:
            errors.add(f"selection is for adapter.type sparse, or lora with a unit, and this one is {kind}")
        return None
    found = Selecting(target_modules=adapter.pop("target_modules", ALL_LINEAR), scale=adapter.pop("scale", 1.0))
    for key in [k for k in adapter if k != "type"]:
        errors.add(f"adapter: sparse has no {key!r}.{nearest(str(key), ['target_modules', 'scale'])}")
        del adapter[key]
    if not is_number(found.scale) or not found.scale:
        errors.add(f"adapter.scale must be a number that is not 0, not {found.scale!r}")
    if not isinstance(given, Mapping):
        errors.add(
            "adapter.type sparse needs a selection, e.g. {method: wagle, ratio: 0.005}, or {file: ..} of `peft-unlearn attribute`"
            + ("" if given is None else f", not {given!r}")
        )
        return None
    return options(found, given, errors)


def options(start: Any, given: Mapping[str, Any], errors: Errors, more: Mapping[str, Any] | None = None) -> Any:
    """`start` with what a recipe's ``selection`` says. more: options besides `_OPTIONS`, as checks."""
    before, known = len(errors.messages), {**_OPTIONS, **(more or {})}
    for key, fits in known.items():
        if key in given:
            fits(given[key], f"selection.{key}", errors)
    own = {k: v for k, v in given.items() if k in known}
    found = replace(start, **own, hyper={k: v for k, v in given.items() if k not in known})
    if len(errors.messages) == before:
        _check(found, errors)
    return found


def _check(found: Selecting, errors: Errors) -> None:
    if found.method:
        try:
            method = registry.get("selection", found.method)
        except UserError as e:
            errors.absorb(e)
            return
        for wrong in method.check(found.hyper or {}):
            errors.add(f"selection: {wrong}")
        if found.file is not None and found.refresh == NEVER:
            errors.add(
                "selection: a file and a method are two selections; name one (with a refresh the file is the first of them)"
            )
        if not 0 < found.ratio <= 1:
            errors.add(f"selection.ratio {found.ratio!r} must lie in (0, 1]: the share of the entries that may move")
    elif found.file is None or found.refresh != NEVER:
        why = "" if found.file is None else ": a refresh chooses anew"
        errors.add(f"selection: name a method{why}.{nearest('', [m.name for m in registry.methods('selection')])}")
    elif found.hyper:
        errors.add(f"selection has no {next(iter(found.hyper))!r}.{nearest(next(iter(found.hyper)), _OPTIONS)}")


def chosen(
    run: Any, model: Any, tokenizer: Any, progress: Callable[[str], None] = lambda _: None, resume: bool = False
) -> Selection:
    """The selection of a run: from the recipe's file, from its working folder where it goes on, else made now and kept there.

    Raises:
        UserError: a file of another base or other data, or none.
    """
    from ..progress import bars

    spec: Selecting = run.selecting
    base, data = base_reference(run.base, run.base_dir, digest_checkpoint(run.base_dir)), run.data.sha256
    kept, hashed = Path(run.config.work_dir) / FILE, (spec.file or "").startswith("sha256:")
    if (resume or hashed) and kept.is_file():
        found = Selection.load(kept)
        found.check_origin(base.digest, data)
        if spec.method and (
            odd := [k for k in ("method", "ratio", "budget") if found.about.get(k) != getattr(spec, k)]
        ):
            raise UserError(
                f"{kept} is the selection that the run began with, and its {', '.join(odd)} is not what the recipe says now; resume with "
                "the recipe it was started with, or start anew with another output folder"
            )
    elif hashed:
        raise UserError("this recipe knows its selection by a hash alone: give the file, --set selection.file=PATH")
    elif spec.file is not None:
        found = Selection.load(spec.file)
        found.check_origin(base.digest, data)
    else:
        with bars() as shown:
            about = origin(base.ref, base.digest, data)
            found = spec.choose(model, tokenizer, run.data, run.config, about=about, progress=shown)
    if spec.file is not None and not hashed:
        run.recipe = {**run.recipe, "selection": {**run.recipe["selection"], "file": _hashed(spec.file)}}
    if run.config.process_index == 0:
        kept.parent.mkdir(parents=True, exist_ok=True)
        found.save(kept)
    progress(
        f"selected: {found.count:,} entries of {len(found.shapes)} weights ({found.density:.2%}), {found.about.get('method')}"
    )
    return found


def _hashed(path: str) -> str:
    return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
