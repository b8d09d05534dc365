"""Bundles of images: every source gives the same sets, requests are named alike, and bad ones are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vision
from PIL import Image

from peft_unlearn.data import digits
from peft_unlearn.data.bundle import ForgetRetain, digest
from peft_unlearn.data.images import ImageSets, bundle_of, rows_of_arrays, split
from peft_unlearn.errors import UserError


def pixels(n: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def folder(root: Path) -> Path:
    for part, n in (("train", 3), ("test", 2)):
        for k, name in enumerate(("cat", "dog", "emu")):
            (root / part / name).mkdir(parents=True)
            for i, x in enumerate(pixels(n, 10 * k + (part == "test"))):
                Image.fromarray(x[0]).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_an_npz_and_a_saved_dataset_are_the_same(tmp_path):
    import datasets

    found = ForgetRetain.load(f"{folder(tmp_path / 'photos')}?forget=dog")
    assert isinstance(found, ImageSets) and found.names_of_classes == ["cat", "dog", "emu"]
    sizes = {name: len(found.rows(name) or []) for name in found.names()}
    assert sizes == {"forget": 3, "retain": 6, "holdout": 4, "forget_test": 2}
    parts = {p: ForgetRetain.load(f"{tmp_path / 'photos'}?forget=dog") for p in ("train", "test")}
    train, test = [*found.forget, *(found.retain or [])], [*(found.rows("forget_test") or []), *(found.holdout or [])]
    arrays = {f"{a}_{p}": np.stack([r[k] for r in rows]) if a == "x" else np.array([r[k] for r in rows])
              for p, rows in (("train", train), ("test", test)) for a, k in (("x", "pixel_values"), ("y", "label"))}  # fmt: skip
    np.savez(tmp_path / "all.npz", **arrays, names=np.array(["cat", "dog", "emu"]))
    label = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    saved = datasets.DatasetDict({
        p: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(r["pixel_values"][0]) for r in rows], "label": [r["label"] for r in rows]}, features=features
        )
        for p, rows in (("train", train), ("test", test))
    })  # fmt: skip
    saved.save_to_disk(str(tmp_path / "saved"))
    for other in (tmp_path / "all.npz", tmp_path / "saved"):
        again = ForgetRetain.load(f"{other}?forget=dog")
        assert again.sha256 == found.sha256
    assert parts["train"].sha256 == parts["test"].sha256


def test_requests():
    sets = ForgetRetain.load("embedded:digits?forget=5,3")
    assert {r["label"] for r in sets.forget} == {3, 5} and not {3, 5} & {r["label"] for r in sets.retain or []}
    assert sets.refs["forget"] == "embedded:digits?forget=3,5&seed=0"
    a, b, c = (ForgetRetain.load(f"embedded:digits?forget=random10&seed={s}") for s in (0, 0, 1))
    assert a.sha256 == b.sha256 and a.sha256["forget"] != c.sha256["forget"]
    assert (
        len(a.forget) == 126 and len(a.forget) + len(a.retain or []) == digits.TRAIN and "forget_test" not in a.names()
    )
    row = a.forget[0]["pixel_values"]
    assert row.shape == (1, 16, 16) and row.dtype == np.float32 and abs(row).max() <= 1


def test_the_file_is_the_published_one():
    x, y = digits.arrays()
    assert x.shape == (1797, 1, 16, 16) and np.bincount(y).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    notice = Path(digits.__file__).with_name("digits.LICENSE.txt").read_text()
    assert "Creative Commons Attribution 4.0" in notice and "Alpaydin" in notice


def test_a_digest_is_of_pixels_and_label():
    rows = tiny_vision.rows(3, 1)
    other = [{**rows[0], "label": 2}, *rows[1:]]
    moved = [{**rows[0], "pixel_values": rows[0]["pixel_values"] + 1e-6}, *rows[1:]]
    assert digest(rows) == digest(rows[::-1]) and len({digest(r) for r in (rows, other, moved)}) == 3
    with pytest.raises(UserError, match="stand in the forget set and in the retain set"):
        bundle_of({"forget": rows, "retain": rows[:1]})


def test_uint8_goes_through_the_processor_and_floats_as_they_are():
    calls: list[int] = []

    def processor(images: Any, **_: Any) -> dict[str, Any]:
        calls.append(len(images))
        return {"pixel_values": [np.asarray(x, dtype=np.float32) / 255 for x in images]}

    raw = rows_of_arrays(pixels(5, 0), [0, 0, 1, 1, 1])
    sets = split(raw, [], ["0"])
    encoded = bundle_of(sets).encode("retain", processor)
    assert calls == [3] and float(encoded[0]["pixel_values"].max()) <= 1 and [r["labels"] for r in encoded] == [1, 1, 1]
    with pytest.raises(UserError, match="preprocessor_config"):
        bundle_of(sets).encode("retain", None)
    prepared = bundle_of({"forget": tiny_vision.rows(2, 1), "retain": tiny_vision.rows(2, 0)})
    assert np.array_equal(
        prepared.encode("forget", None)[0]["pixel_values"].numpy(), prepared.forget[0]["pixel_values"]
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pixel_values": np.zeros((16, 16), np.float32)}, "no array"),
        ({"pixel_values": np.full((1, 4, 4), np.nan, np.float32)}, "no numbers"),
        ({"pixel_values": np.zeros((1, 4, 4), np.int64)}, "no array"),
        ({"label": -1}, "not the number of a class"),
        ({"label": "cat"}, "not the number of a class"),
    ],
)
def test_bad_rows_are_named(change, says):
    good = tiny_vision.rows(2, 1)
    with pytest.raises(UserError, match=says):
        bundle_of({"forget": [{**good[0], **change}], "retain": tiny_vision.rows(2, 2)})


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("", "does not say what to forget"),
        ("?forget=ape", "no class 'ape'"),
        ("?forget=cat&shuffle=1", "unknown option 'shuffle'"),
        ("?forget=random10&seed=x", "no whole number"),
    ],
)
def test_bad_requests_are_named(query, says, tmp_path):
    root = folder(tmp_path / "photos")
    with pytest.raises(UserError, match=says):
        ForgetRetain.load(f"{root}{query}")


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as images"):
        ForgetRetain.load(f"{tmp_path / 'bad.npz'}?forget=0")
    np.savez(tmp_path / "flat.npz", x_train=np.zeros((2, 64)), y_train=np.zeros(2))
    with pytest.raises(UserError, match="n, channels, height, width"):
        ForgetRetain.load(f"{tmp_path / 'flat.npz'}?forget=0")
    root = folder(tmp_path / "photos")
    (root / "test" / "yak").mkdir()
    Image.fromarray(pixels(1, 0)[0, 0]).save(root / "test" / "yak" / "0.png")
    with pytest.raises(UserError, match="test has a class that train has not: yak"):
        ForgetRetain.load(f"{root}?forget=cat")
