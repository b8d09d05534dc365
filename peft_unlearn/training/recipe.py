"""A recipe, understood: everything that can be checked before a base model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..data.advice import advice
from ..data.bundle import ForgetRetain
from ..data.load import DATA_OPTIONS, load_data
from ..errors import Errors, UserError, nearest
from ..folder.base import load_base, load_config, load_tokenizer, resolve_base
from ..folder.quantized import KEY, name_of, require_library
from ..folder.quantized import understood as how_held
from ..folder.schema import COUNT, NUMBER, POSITIVE, is_number, is_whole, maybe, one_of, shape
from ..tuners.selection import Selection
from . import fila, oneshot
from .adapt import peft_config
from .config import METHODS, UnlearnConfig, require_sets
from .selecting import Selecting, understood
from .structured import OnLora, on_lora

AUTO = "auto"
_FORGET_ONLY = (
    "no term keeps anything (there is only a forget term): what is like the forget set is lost with it; stop early (eval.every with "
    "stop_below), or add a retain term"
)
_EVAL_KEYS = ("suite", "every", "n", "keep_best", "retain_floor", "stop_below")
OWN_CHECK = ("terms", "reference", "anchor", "on_overflow")  # say more of what they want than their type
BEST = "forget_at_floor"  # the metric that evaluation adds for keep_best
# a checkpoint every tenth of a run, and the latest two kept, where a recipe says nothing of checkpoints
_TENTHS = {"save_strategy": "steps", "save_steps": 0.1, "save_total_limit": 2}
_BLOCKS = shape("a list of blocks, e.g. [1, 2]", lambda v: isinstance(v, list) and v != [] and all(map(is_whole, v)))
# options of experts: auto
CHOOSING = {"per_layer": COUNT, "top": COUNT, "layers": maybe(_BLOCKS), "ranking": one_of("affinity", "contrast")}


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
    # how the entries are chosen that a sparse adapter trains (`adapter` is None till then), or the structures of a LoRA
    selecting: Selecting | None = None
    selected: Selection | None = None  # once they are
    base_options: Mapping[str, Any] = field(
        default_factory=dict
    )  # how the base is held in fewer bits, see `folder.quantized`
    fila: bool = False  # the adapter's start, see `fila`
    oneshot: Any = None  # ((method, hyper-parameters), budget) of an adapter that no optimizer trains
    frozen: Mapping[Any, Any] = field(default_factory=dict)  # by that start: parameter -> which of it may move

    def load(self) -> Any:
        """The base as the recipe wants it held, in the dtype of the training."""
        return load_base(self.base_dir, "bfloat16" if self.config.bf16 else "float32", options=self.base_options)


def auto_options(spec: dict[str, Any], errors: Errors) -> dict[str, Any] | None:
    """The choosing options of ``experts: auto`` (taken out of `spec`), or None where the experts are named."""
    if spec.get("experts") != AUTO:
        return None
    del spec["experts"]
    out = {k: spec.pop(k) for k in CHOOSING if k in spec}
    for k, value in out.items():
        CHOOSING[k](value, f"adapter.{k}", errors)
    if "per_layer" in out and "top" in out:
        errors.add("adapter: per_layer and top are two ways of choosing; give one")
    return out


def prepare(recipe: Mapping[str, Any], out: str | Path, base: str | None = None, data: str | None = None) -> Run:
    """Check a recipe as a whole.

    Raises:
        UserError: every complaint about configuration and adapter at once; then data; then base.
    """
    if recipe.get("compose") is not None:
        raise UserError("this recipe sums adapters and trains nothing: run `peft-unlearn compose` on its parts")
    if recipe.get("sanitize") is not None:
        raise UserError(
            "this adapter was trained and then changed by `peft-unlearn sanitize`: take `sanitize` out of the recipe to train the first, "
            "and run that command on it"
        )
    once = None
    if recipe.get("oneshot") is not None:
        errors = Errors()
        once = oneshot.understood(recipe, str((recipe.get("adapter") or {}).get("type", "lora")).lower(), errors)
        errors.raise_if_any(f"recipe {recipe.get('name', '')}".strip())
        recipe = {**recipe, "terms": recipe.get("terms") or oneshot.terms_of(recipe["oneshot"])}
    config, adapter, negate, auto, selecting, starts, options = _understood(recipe, out)
    bundle = load_data(recipe.get("data"), data)
    require_sets(config, bundle)
    base_dir = resolve_base(recipe.get("base"), override=base)
    _check_layers(config, base_dir)
    named = str(base or recipe.get("base"))
    recipe = _with_template(recipe, bundle, base_dir)
    return Run(
        _as_run(recipe, data),
        config,
        adapter,
        bundle,
        named,
        base_dir,
        negate,
        auto,
        selecting,
        fila=starts,
        base_options=options,
        oneshot=once,
    )


def notes(run: Run) -> list[str]:
    """What a user should know before the run: of the data, and of a recipe that keeps nothing."""
    if {t.gradient for t in run.config.term_list} == {"forget"}:
        return [*advice(run.data), _FORGET_ONLY]
    return advice(run.data)


def _understood(
    recipe: Mapping[str, Any], out: str | Path
) -> tuple[UnlearnConfig, Any, float | None, Any, Selecting | None, bool, dict[str, Any]]:
    """(config, PEFT config, negation, how experts and how entries are chosen, FILA, base options) of a recipe; every complaint at once."""
    errors, config, adapter = Errors(), None, None
    given = recipe.get("adapter")
    if not isinstance(given, (Mapping, type(None))):
        errors.add(f"adapter: settings are a mapping, e.g. {{type: lora, r: 16}}, not {given!r}")
        given = None
    spec = dict(given or {})
    negate = spec.pop("negate", None)
    maybe(POSITIVE)(negate, "adapter.negate", errors)
    if negate is not None and str(spec.get("type", "lora")).lower() != "lora":
        errors.add("adapter.negate works on LoRA, whose delta changes sign with lora_B")
    auto = auto_options(spec, errors)
    if auto is not None:
        spec["experts"] = {0: [0]}  # stands in until attribution has run, so that everything else is checked now
    kind = str(spec.get("type", "lora")).lower()
    selecting = on_lora(recipe, spec, errors) if kind == "lora" else understood(recipe, spec, errors)
    starts = fila.understood(spec, errors)
    options = how_held(recipe.get(KEY), errors)
    if options:
        _check_quantized(options, kind, selecting is not None, starts, recipe.get("smoothing"), errors)
    try:
        config = from_recipe(recipe, str(out))
    except UserError as e:
        errors.absorb(e)
    try:
        adapter = None if kind == "sparse" else peft_config(spec)
    except UserError as e:
        errors.absorb(e)
    errors.raise_if_any(f"recipe {recipe.get('name', '')}".strip())
    assert config is not None
    if isinstance(selecting, OnLora):
        selecting = replace(selecting, config=adapter)
    return config, adapter, None if negate is None else float(negate), auto, selecting, starts, options


def _check_quantized(
    options: Mapping[str, Any], kind: str, selects: bool, starts: bool, smoothing: Any, errors: Errors
) -> None:
    """Complain of what needs the base's weights as numbers, and of a library that is missing."""
    held = name_of(options)
    if kind != "lora":
        errors.add(
            f"adapter.type {kind} does not work on a base in {held}, only lora does: it adds to a layer's output alone"
        )
    if selects or starts:
        what = "selection" if selects else f"init_lora_weights {fila.NAME}"
        errors.add(f"{what} reads the base's weights and their gradients, and a base in {held} has neither")
    given = list(smoothing.values())[:1] if isinstance(smoothing, Mapping) else []
    if given and isinstance(given[0], Mapping) and given[0].get("space") == "base":
        errors.add(
            f"smoothing in space base moves the weights under the adapters, and a base in {held} has no numbers to move"
        )
    try:
        require_library(options)
    except UserError as e:
        errors.absorb(e)


def _with_template(recipe: Mapping[str, Any], bundle: ForgetRetain, base_dir: Path) -> Mapping[str, Any]:
    """The recipe with ``template: chat`` where it names none and the base is a chat model: whoever asks it will ask that way."""
    spec = recipe.get("data")
    given = dict(spec) if isinstance(spec, Mapping) else {} if spec is None else {"bundle": spec}
    if "template" in given or not getattr(load_tokenizer(base_dir), "chat_template", None):
        return recipe
    args = given.get("template_args")
    bundle.template = {"chat": args} if args else "chat"
    return {**recipe, "data": {**given, "template": "chat"}}


def _as_run(recipe: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """The recipe that is saved: it names the data that were trained on; files become hashes there."""
    if data is None:
        return dict(recipe)
    spec = recipe.get("data")
    options = {k: v for k, v in spec.items() if k in DATA_OPTIONS} if isinstance(spec, Mapping) else {}
    bundle = str(Path(data).resolve()) if Path(data).expanduser().exists() else data
    return {**recipe, "data": {**options, "bundle": bundle}}


def _check_layers(config: UnlearnConfig, base_dir: Path) -> None:
    """Refuse block numbers that the base does not have (module names are looked up once the model is there)."""
    numbers = [(t.objective.name, k) for t in config.term_list for k in t.layers if isinstance(k, int)]
    if not numbers:
        return
    n = load_config(base_dir).get_text_config().num_hidden_layers
    errors = Errors()
    for name, k in numbers:
        if not -n <= k < n:
            errors.add(f"{name}: layer {k} does not exist: the base has blocks 0 to {n - 1}")
    errors.raise_if_any("terms")


def wrong_type(name: str, value: Any) -> str | None:
    """What the field `name` of `UnlearnConfig` wants, e.g. "a number", where `value` is nothing of the kind."""
    annotation = next(str(f.type) for f in fields(UnlearnConfig) if f.name == name)
    words = set(re.findall(r"[A-Za-z_]+", re.sub(r"\[.*\]", "", annotation))) - {"class"}
    names = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "dict": "a mapping",
             "list": "a list of texts"}  # fmt: skip
    if name in OWN_CHECK or not words <= {*names, "None", "NoneType"}:
        return None
    texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
    fits = {"bool": isinstance(value, bool), "int": is_whole(value), "float": is_number(value), "str": isinstance(value, str),
            "dict": isinstance(value, Mapping), "list": texts}  # fmt: skip
    if any(fits[k] for k in fits if k in words) or (value is None and words & {"None", "NoneType"}):
        return None
    return " or ".join(v for k, v in names.items() if k in words and not (k == "int" and "float" in words))


def from_recipe(recipe: Mapping[str, Any], output_dir: str) -> UnlearnConfig:
    """`UnlearnConfig` of a recipe (design.md 5).

    Raises:
        UserError: everything wrong with it, at once.
    """
    errors = Errors()
    sections = {}
    for key in ("train", "eval"):
        given = recipe.get(key)
        if not isinstance(given, (Mapping, type(None))):
            errors.add(f"{key} is a section with keys, not {given!r}")
        sections[key] = given if isinstance(given, Mapping) else {}
    train = {**eval_options(sections["eval"], errors), **sections["train"]}
    if not _TENTHS.keys() & train.keys():
        train |= _TENTHS
    if reserved := sorted(set(train) & {"output_dir", "terms", "rule", "reference"}):
        errors.add(f"train: {', '.join(reserved)} does not belong there; it has a place of its own")
    if recipe.get("terms") is None:
        errors.add("terms are missing: give what is forgotten and kept, e.g. {forget: {npo: {}}, retain: {nll: {}}}")
    known = {f.name for f in fields(UnlearnConfig) if f.init}
    for key in (k for k in train if k not in known):
        errors.add(f"train: TrainingArguments has no {key!r}.{nearest(str(key), known)}")
    data = recipe.get("data")
    values: dict[str, Any] = {}
    for section, found in (
        ("train", {k: v for k, v in train.items() if k in known and k not in reserved}),
        ("data", {k: data[k] for k in DATA_OPTIONS if k in known and isinstance(data, Mapping) and k in data}),
        ("recipe", {k: recipe[k] for k in ("terms", "reference", "seed", *METHODS) if recipe.get(k) is not None}),
    ):
        for key, value in found.items():
            if wanted := wrong_type(key, value):
                errors.add(f"{section}: {key} must be {wanted}, not {value!r}")
            else:
                values[key] = value
    config = None
    try:
        config = UnlearnConfig(output_dir=output_dir, **values)
    except UserError as e:
        errors.absorb(e)
    errors.raise_if_any(f"recipe {recipe.get('name') or ''}".strip())
    assert config is not None
    return config


def eval_options(evaluation: Mapping[str, Any], errors: Errors) -> dict[str, Any]:
    """TrainingArguments of a recipe's ``eval`` part: ``{suite, every, n, keep_best, retain_floor, stop_below}``."""
    for key in evaluation:
        if key not in _EVAL_KEYS:
            errors.add(f"eval has no {key!r}.{nearest(str(key), _EVAL_KEYS)}")
    for key in ("n", "retain_floor", "stop_below"):
        maybe(NUMBER)(evaluation.get(key), f"eval.{key}", errors)
    every = evaluation.get("every")
    if not every:
        if evaluation.get("keep_best") or evaluation.get("stop_below") is not None:
            errors.add(
                "eval: keep_best and stop_below judge by scores; say every how many steps to evaluate (eval.every)"
            )
        return {}
    if not (is_whole(every) and every > 0):
        errors.add(f"eval.every must be a whole number of steps, not {every!r}")
        return {}
    out: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every}
    if evaluation.get("keep_best"):
        out |= {"load_best_model_at_end": True, "metric_for_best_model": BEST, "greater_is_better": False}
        out |= {"save_strategy": "steps", "save_steps": every, "save_total_limit": 2}
    return out
