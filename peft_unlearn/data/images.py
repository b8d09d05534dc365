"""Images as bundles: what is to be forgotten is one or several classes, or a random share of the rows.

A row is ``{"pixel_values": (channels, height, width), "label": int}``: float32 as the model gets it, or uint8 as it was taken, which
the base's own image processor prepares. ``SOURCE?forget=cat,dog`` names a request, ``?forget=random10&seed=1`` a random tenth of the
training rows. SOURCE: a folder with ``train/CLASS/*.png`` and ``test/CLASS/*.png``; an .npz file with x_train, y_train, x_test, y_test; a
folder saved by `datasets` with the splits train and test and the columns image and label; or ``embedded:digits``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .bundle import ForgetRetain
from .chat import Template
from .classes import Row, split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass
class ImageSets(ForgetRetain):
    """A bundle of images. Sets: forget and retain of the training rows, holdout (test rows of what is retained) and
    ``forget_test`` (test rows of forgotten classes).

    names: of the classes by label; empty where nobody named them.

    Raises:
        UserError: as `ForgetRetain`; and images of several shapes.
    """

    names_of_classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = {np.shape(r["pixel_values"]) for rows in (*self.sets().values(), *self.extra.values()) for r in rows}
        raw = any(r["pixel_values"].dtype == np.uint8 for r in self.forget[:1])
        if len(shapes) > 1 and not raw:  # those are resized
            raise UserError(
                f"data: images of {len(shapes)} shapes ({', '.join(map(str, sorted(shapes)[:3]))}); prepare them alike"
            )

    def encode(
        self, name: str, tokenizer: Any, max_length: int | None = None, on_overflow: str = "error", rows: Any = None
    ) -> list[Row]:
        """Rows of one set as the model gets them: ``{"pixel_values": tensor (channels, height, width) float32, "labels": label}``.

        tokenizer: the base's image processor, which uint8 images need; None for images that are prepared.
        """
        import torch

        found = (self.rows(name) or []) if rows is None else rows
        pixels = [r["pixel_values"] for r in found]
        if found and pixels[0].dtype == np.uint8:
            if tokenizer is None:
                raise UserError(
                    f"{name} set: these images are as they were taken, and the base brings no preprocessor_config.json that says how "
                    "to prepare them; add one, or give float arrays as the model reads them (.npz)"
                )
            pixels = prepare(pixels, tokenizer)
        return [{"pixel_values": torch.as_tensor(x), "labels": r["label"]} for x, r in zip(pixels, found, strict=True)]


def prepare(images: Sequence[Any], processor: Any, size: int = 64) -> list[Any]:
    """uint8 images (channels, height, width) through a transformers image processor, in batches: float32 arrays."""
    out: list[Any] = []
    for at in range(0, len(images), size):
        part = list(images[at : at + size])
        out += list(processor(images=part, input_data_format="channels_first", return_tensors="np")["pixel_values"])
    return [np.asarray(x, dtype=np.float32) for x in out]


def bundle_of(
    sets: Mapping[str, list[Row]], refs: Mapping[str, str] | None = None, names: Sequence[str] = ()
) -> ImageSets:
    """The bundle of `split`'s sets."""
    own = {k: v for k, v in sets.items() if k not in ("forget", "retain", "holdout")}
    return ImageSets(
        sets["forget"],
        sets["retain"],
        sets.get("holdout"),
        extra=own,
        refs=dict(refs or {}),
        names_of_classes=list(names),
    )


# --- sources -------------------------------------------------------------------------------------------------------------


def recognizes(spec: str | Path) -> bool:
    """Whether this names images: an .npz file, a folder of classes under train/, or a folder saved by `datasets`."""
    path = Path(str(spec).partition("?")[0]).expanduser()
    if path.suffix == ".npz":
        return True
    return path.is_dir() and ((path / "dataset_dict.json").is_file() or bool(_classes(path / "train")))


def load(spec: str | Path, template: Template = "qa") -> ImageSets:
    """The bundle of ``SOURCE?forget=..``.

    Raises:
        UserError: no request, no such class, or a source that cannot be read.
    """
    where, _, query = str(spec).partition("?")
    options = {key: value for key, _, value in (part.partition("=") for part in query.split("&") if part)}
    if odd := sorted(options.keys() - {"forget", "seed"}) or not options.get("forget"):
        what = f"unknown option {odd[0]!r}" if isinstance(odd, list) else "it does not say what to forget"
        raise UserError(f"data: {spec}: {what}; for example {where}?forget=CLASS, or {where}?forget=random10&seed=0")
    seed = options.get("seed", "0")
    if not (seed.isascii() and seed.isdigit()):
        raise UserError(f"data: {spec}: seed={seed} is no whole number")
    train, test, names = _source(Path(where).expanduser())
    return bundle_of(split(train, test, options["forget"].split(","), int(seed), names), names=names)


def _source(path: Path) -> tuple[list[Row], list[Row], list[str]]:
    """(training rows, test rows, names of classes)"""
    try:
        if path.suffix == ".npz":
            return _arrays(path)
        if (path / "dataset_dict.json").is_file():
            return _saved_dataset(path)
        names = _classes(path / "train")
        if odd := sorted({*_classes(path / "test")} - {*names}):
            raise UserError(f"data: {path}/test has a class that train has not: {odd[0]}")
        return _folder(path / "train", names), _folder(path / "test", names), names
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise UserError(f"data: {path} cannot be read as images: {e}") from e


def _classes(path: Path) -> list[str]:
    found = sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
    return [p.name for p in found if any(f.suffix.lower() in SUFFIXES for f in p.iterdir())]


def _folder(path: Path, names: Sequence[str]) -> list[Row]:
    from PIL import Image

    out = []
    for label, name in enumerate(names):
        for file in sorted((path / name).iterdir()) if (path / name).is_dir() else ():
            if file.suffix.lower() in SUFFIXES:
                with Image.open(file) as image:
                    out.append({"pixel_values": _pixels(image), "label": label})
    return out


def _pixels(image: Any) -> Any:
    """A PIL image as (channels, height, width) uint8; of one channel where it is gray, else three."""
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _arrays(path: Path) -> tuple[list[Row], list[Row], list[str]]:
    with np.load(path, allow_pickle=False) as file:
        held = {k: file[k] for k in file.files}
    return (
        rows_of_arrays(held["x_train"], held["y_train"]),
        rows_of_arrays(held["x_test"], held["y_test"]) if "x_test" in held else [],
        [str(n) for n in held.get("names", ())],
    )


def rows_of_arrays(x: Any, y: Iterable[Any]) -> list[Row]:
    """Rows of images (n, channels, height, width), uint8 or prepared floats, and labels (n,)."""
    x = np.asarray(x)
    if x.ndim != 4:
        raise UserError(f"data: images are arrays (n, channels, height, width), not {x.shape}")
    x = x if x.dtype == np.uint8 else x.astype(np.float32)
    return [{"pixel_values": image, "label": int(label)} for image, label in zip(x, y, strict=True)]


def _saved_dataset(path: Path) -> tuple[list[Row], list[Row], list[str]]:
    from datasets import load_from_disk

    found: Any = load_from_disk(str(path))

    def rows(name: str) -> list[Row]:
        if name not in found:
            return []
        return [{"pixel_values": _pixels(r["image"]), "label": int(r["label"])} for r in found[name]]

    return rows("train"), rows("test"), list(getattr(found["train"].features["label"], "names", []))
