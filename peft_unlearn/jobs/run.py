"""A recipe, understood: everything that can be checked before a base model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapt import peft_config
from ..config import UnlearnConfig, require_sets
from ..data.bundle import ForgetRetain
from ..errors import Errors, UserError
from ..folder.base import resolve_base
from .configure import DATA_OPTIONS, from_recipe

AUTO = "auto"
CHOOSING = ("per_layer", "top", "layers", "ranking")  # options of experts: auto


@dataclass
class Run:
    """A recipe, understood: everything that can be known before the base model is loaded."""

    recipe: dict[str, Any]
    config: UnlearnConfig
    adapter: Any
    data: ForgetRetain
    base: str
    base_dir: Path
    negate: float | None = None  # save the adapter's delta times minus this (task vectors)
    auto: dict[str, Any] | None = None  # how attribution chooses the experts that `adapter` goes into


def auto_options(spec: dict[str, Any], errors: Errors) -> dict[str, Any] | None:
    """The choosing options of ``experts: auto`` (taken out of `spec`), or None where the experts are named."""
    if spec.get("experts") != AUTO:
        return None
    del spec["experts"]
    out = {k: spec.pop(k) for k in CHOOSING if k in spec}
    for k in ("per_layer", "top"):
        if k in out and (not isinstance(out[k], int) or isinstance(out[k], bool) or out[k] < 1):
            errors.add(f"adapter.{k} must be a whole number from 1 on, not {out[k]!r}")
    if "per_layer" in out and "top" in out:
        errors.add("adapter: per_layer and top are two ways of choosing; give one")
    layers = out.get("layers")
    if layers is not None and not (
        isinstance(layers, list) and layers and all(isinstance(k, int) and not isinstance(k, bool) for k in layers)
    ):
        errors.add(f"adapter.layers is a list of blocks, e.g. [1, 2], not {layers!r}")
    if out.get("ranking", "affinity") not in ("affinity", "contrast"):
        errors.add(f"adapter.ranking={out['ranking']!r} is not one of affinity, contrast")
    return out


def prepare(recipe: Mapping[str, Any], out: str | Path, base: str | None = None, data: str | None = None) -> Run:
    """Check a recipe as a whole.

    Raises:
        UserError: every complaint about configuration and adapter at once; then data; then base.
    """
    if recipe.get("compose") is not None:
        raise UserError("this recipe sums adapters and trains nothing: run `peft-unlearn compose` on its parts")
    errors = Errors()
    config, adapter = None, None
    given = recipe.get("adapter")
    if not isinstance(given, (Mapping, type(None))):
        errors.add(f"adapter: settings are a mapping, e.g. {{type: lora, r: 16}}, not {given!r}")
        given = None
    spec = dict(given or {})
    negate = spec.pop("negate", None)
    if negate is not None and (not isinstance(negate, (int, float)) or isinstance(negate, bool) or not negate > 0):
        errors.add(f"adapter.negate is the strength of the negation, a number above 0, not {negate!r}")
    if negate is not None and str(spec.get("type", "lora")).lower() != "lora":
        errors.add("adapter.negate works on LoRA, whose delta changes sign with lora_B")
    auto = auto_options(spec, errors)
    if auto is not None:
        spec["experts"] = {0: [0]}  # stands in until attribution has run, so that everything else is checked now
    for part in (lambda: from_recipe(recipe, str(out)), lambda: peft_config(spec)):
        try:
            made = part()
            config, adapter = (made, adapter) if isinstance(made, UnlearnConfig) else (config, made)
        except UserError as e:
            errors.absorb(e)
    errors.raise_if_any(f"recipe {recipe.get('name', '')}".strip())
    assert config is not None
    bundle = load_data(recipe.get("data"), data)
    require_sets(config, bundle)
    named = base or recipe.get("base")
    path = resolve_base(recipe.get("base"), override=base)
    _check_layers(config, path)
    ran = dict(recipe)
    if data is not None:  # what is saved as the recipe has to name what was trained on; files become hashes there
        spec = recipe.get("data")
        options = {k: v for k, v in spec.items() if k in DATA_OPTIONS} if isinstance(spec, Mapping) else {}
        ran["data"] = {**options, "bundle": str(Path(data).resolve()) if Path(data).expanduser().exists() else data}
    return Run(ran, config, adapter, bundle, str(named), path, None if negate is None else float(negate), auto)


def _check_layers(config: UnlearnConfig, base_dir: Path) -> None:
    """Refuse block numbers that the base does not have (module names are looked up once the model is there)."""
    from transformers import AutoConfig

    numbers = [(t.objective.name, k) for t in config.term_list for k in t.layers if isinstance(k, int)]
    if not numbers:
        return
    n = AutoConfig.from_pretrained(str(base_dir)).get_text_config().num_hidden_layers
    errors = Errors()
    for name, k in numbers:
        if not -n <= k < n:
            errors.add(f"{name}: layer {k} does not exist: the base has blocks 0 to {n - 1}")
    errors.raise_if_any("terms")


def load_data(spec: Any, override: str | None = None) -> ForgetRetain:
    """The bundle of a recipe's ``data`` part, or of --data; a published recipe knows its files by hash alone, and what is given
    is checked against that."""
    options = {k: spec[k] for k in DATA_OPTIONS if isinstance(spec, Mapping) and k in spec}
    sets = {k: v for k, v in spec.items() if k not in DATA_OPTIONS} if isinstance(spec, Mapping) else spec
    if isinstance(sets, Mapping) and "bundle" in sets:  # {bundle: embedded:people, per_anchor: 2}: all sets by one name
        if len(sets) > 1:
            raise UserError(
                f"data: bundle names all sets at once; {', '.join(k for k in sets if k != 'bundle')} beside it is one too many"
            )
        sets = sets["bundle"]
    template = options.get("template", "qa")
    hashed = {k: v for k, v in sets.items() if str(v).startswith("sha256:")} if isinstance(sets, Mapping) else {}
    if override is None:
        if hashed:
            raise UserError(
                f"the recipe knows its {', '.join(hashed)} set by hash alone; say where the files are with --data FOLDER"
            )
        if not sets:
            raise UserError("no data are named; give data in the recipe or --data (a folder, or embedded:people)")
        return ForgetRetain.load(sets, template=template)
    bundle = ForgetRetain.load(override, template=template)
    for name, wanted in hashed.items():
        if bundle.sha256.get(name) != str(wanted).removeprefix("sha256:"):
            raise UserError(f"--data {override}: its {name} set is not the one this recipe was run on (other sha256)")
    return bundle
