"""A recipe's settings as `UnlearnConfig` (the recipe itself is read in `folder.recipe`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import METHODS, UnlearnConfig
from ..errors import Errors, UserError, nearest

DATA_OPTIONS = ("anchor", "per_anchor", "max_length", "on_overflow", "template")
_EVAL_KEYS = ("suite", "every", "n", "keep_best", "retain_floor", "stop_below")
BEST = "forget_at_floor"  # the metric that evaluation adds for keep_best


def wrong_type(name: str, value: Any) -> str | None:
    """What the field `name` of `UnlearnConfig` wants, e.g. "a number", where `value` is nothing of the kind."""
    annotation = next(str(f.type) for f in fields(UnlearnConfig) if f.name == name)
    words = set(re.findall(r"[A-Za-z_]+", annotation)) - {"class"}
    if not words <= {"bool", "int", "float", "None", "NoneType", "Optional", "Union", "typing"}:
        return None  # texts, lists and mappings have checks of their own
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = {"bool": isinstance(value, bool), "int": number and isinstance(value, int), "float": number}
    if any(fits[k] for k in fits if k in words) or (value is None and words & {"None", "NoneType", "Optional"}):
        return None
    names = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    return " or ".join(v for k, v in names.items() if k in words and not (k == "int" and "float" in words))


def from_recipe(recipe: Mapping[str, Any], output_dir: str) -> UnlearnConfig:
    """`UnlearnConfig` of a recipe (design.md 5).

    Raises:
        UserError: everything wrong with it, at once.
    """
    errors = Errors()
    known = {f.name for f in fields(UnlearnConfig) if f.init}
    for key in ("train", "eval"):
        if not isinstance(recipe.get(key), (Mapping, type(None))):
            errors.add(f"{key} is a section with keys, not {recipe[key]!r}")
            recipe = {**recipe, key: None}
    train = dict(recipe.get("train") or {})
    if reserved := sorted(set(train) & {"output_dir", "terms", "rule", "reference"}):
        errors.add(f"train: {', '.join(reserved)} does not belong there; it has a place of its own")
        train = {k: v for k, v in train.items() if k not in reserved}
    data = recipe.get("data")
    options = {k: data[k] for k in DATA_OPTIONS if isinstance(data, Mapping) and k in data}
    if recipe.get("selection") is not None:
        errors.add("selection is not available in this version")
    if recipe.get("terms") is None:
        errors.add("terms are missing: say what is forgotten and kept, e.g. {forget: {npo: {}}, retain: {nll: {}}}")
    options.pop("template", None)
    evaluation = dict(recipe.get("eval") or {})
    train = {**eval_options(evaluation, errors), **train}
    for key in train:
        if key not in known:
            errors.add(f"train: TrainingArguments has no {key!r}.{nearest(str(key), known)}")
    top = {k: recipe[k] for k in ("terms", "reference", "seed", *METHODS) if recipe.get(k) is not None}
    clean = {k: v for k, v in train.items() if k in known}
    for section, values in (("train", clean), ("data", options), ("recipe", top)):
        for key, value in list(values.items()):
            if wanted := wrong_type(key, value):
                errors.add(f"{section}: {key} must be {wanted}, not {value!r}")
                del values[key]
    try:
        config = UnlearnConfig(output_dir=output_dir, **{**clean, **options, **top})
    except UserError as e:
        errors.absorb(e)
        config = None
    except (TypeError, ValueError) as e:  # TrainingArguments' own validation
        errors.add(f"train: {e}")
        config = None
    errors.raise_if_any(f"recipe {recipe.get('name') or ''}".strip())
    assert config is not None
    return config


def eval_options(evaluation: Mapping[str, Any], errors: Errors) -> dict[str, Any]:
    """TrainingArguments of a recipe's ``eval`` part: ``{suite, every, n, keep_best, retain_floor, stop_below}``."""
    for key in evaluation:
        if key not in _EVAL_KEYS:
            errors.add(f"eval has no {key!r}.{nearest(str(key), _EVAL_KEYS)}")
    for key in ("n", "retain_floor", "stop_below"):
        value = evaluation.get(key)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            errors.add(f"eval.{key} must be a number, not {value!r}")
    every = evaluation.get("every")
    if not every:
        if evaluation.get("keep_best") or evaluation.get("stop_below") is not None:
            errors.add(
                "eval: keep_best and stop_below judge by scores; say every how many steps to evaluate (eval.every)"
            )
        return {}
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        errors.add(f"eval.every must be a whole number of steps, not {every!r}")
        return {}
    out: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every}
    if evaluation.get("keep_best"):
        out |= {"load_best_model_at_end": True, "metric_for_best_model": BEST, "greater_is_better": False}
        out |= {"save_strategy": "steps", "save_steps": every, "save_total_limit": 2}
    return out
