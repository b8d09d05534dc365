"""What the trainer does otherwise where the base is an image classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..data.images import ImageSets
from ..errors import Errors, UserError
from ..head import causal_lm, reads_images
from ..tuners.names import belongs
from ..tuners.peft_type import FORGET_VECTOR
from .adapt import peft_config
from .config import UnlearnConfig

_READABLE = {"logp", "ref_logp", "logits", "ref_logits"}


def of_images(config: Any, data: Any) -> Any:
    """A forget vector's config (or a recipe's ``adapter``) with the shape of the data's images, where it names none."""
    if isinstance(config, Mapping):
        config = peft_config(config)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if kind != FORGET_VECTOR or config.shape is not None or not isinstance(data, ImageSets):
        return config
    pixels = data.forget[0]["pixel_values"]
    return config if str(pixels.dtype) == "uint8" else replace(config, shape=list(pixels.shape))


def check_kind(model: Any, data: Any) -> None:
    """Refuse images for a base that reads text, and texts for one that reads images."""
    if reads_images(model) == isinstance(data, ImageSets):
        return
    name = type(causal_lm(model)).__name__
    if isinstance(data, ImageSets):
        raise UserError(f"data: these are images, and the base ({name}) reads text; images need an image classifier")
    raise UserError(f"data: the base ({name}) is an image classifier, and these rows are texts")


def check_images(model: Any, sets: Mapping[str, Sequence[Mapping[str, Any]]], _: int = 0) -> None:
    """Refuse rows that the classifier cannot read, or has no class for.

    Raises:
        UserError: everything at once, by set.
    """
    config, errors = model.config, Errors()
    size = getattr(config, "image_size", None)
    wanted = (size, size) if isinstance(size, int) else size and tuple(size)
    for name, rows in sets.items():
        channels, *sides = rows[0]["pixel_values"].shape
        shape, reads = (channels, *sides), getattr(config, "num_channels", None)
        if (reads and channels != reads) or (wanted and sides != list(wanted)):
            errors.add(
                f"{name} set: images are {shape}, and the base reads ({reads}, {', '.join(map(str, wanted or 'hw'))})"
            )
        if (most := max((int(r["labels"]) for r in rows), default=0)) >= config.num_labels:
            errors.add(f"{name} set: a row has class {most}, and the base tells classes 0 to {config.num_labels - 1}")
    errors.raise_if_any("data")


def refuse_tokens_only(config: UnlearnConfig) -> None:
    """Refuse terms that read what a classifier of images has not.

    Raises:
        UserError: all of them, at once.
    """
    errors = Errors()
    for t in config.term_list:
        if odd := set(t.objective.needs) - _READABLE:
            errors.add(
                f"{t.objective.name} reads {', '.join(sorted(odd))} of tokens; images have log-probabilities and logits"
            )
        elif t.objective.unit == "position":
            errors.add(f"{t.objective.name} counts positions of tokens, and an image has none")
    if config.reference == "precomputed":
        errors.add("reference: precomputed is for tokens; before costs one forward of a small model")
    errors.raise_if_any("terms on images")


def as_served(model: nn.Module, adapter: str) -> None:
    """Put the base into evaluation mode and the adapter's own modules (its dropout) into training mode: what is trained on is the
    classifier as it is served, and the running statistics of its batch normalization stay as they are."""
    for name, module in model.named_modules():
        module.training = belongs(name, adapter)


def row_of(row: Mapping[str, Any]) -> Any:
    """What tells a row of tokens, or of an image, from another."""
    if "pixel_values" in row:
        return hashlib.sha256(row["pixel_values"].numpy().tobytes()).hexdigest(), row["labels"]
    return row["input_ids"], row["labels"]
