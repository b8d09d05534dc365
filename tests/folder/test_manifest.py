"""forget.json: what is written is read back, and every way to be wrong has its message."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from peft_unlearn.errors import UserError
from peft_unlearn.folder.manifest import BaseRef, Manifest, Probes, path_like

SHA = "ab" * 32


def good(**more: Any) -> Manifest:
    rows = [{"ids": [3, 1], "logits": [0.5, -0.25]}]
    fields: dict[str, Any] = {
        "base": BaseRef("embedded:people", SHA, None, SHA),
        "method": {"terms": {"forget": {"npo": {"beta": 0.1}}}, "rule": None},
        "data": {"forget": {"sha256": SHA, "n": 100, "ref": "embedded:people?seed=0"}},
        "probes": Probes(["The"], rows, rows),
        "depends_on": [f"sha256:{SHA}"],
        "files": {"adapter_model.safetensors": SHA, "README.md": None},
    }
    return Manifest(**{**fields, **more})


def test_round_trip() -> None:
    manifest = good()
    text = manifest.text()
    assert Manifest.from_text(text) == manifest and Manifest.from_text(text).text() == text
    assert manifest.adapter_id == f"sha256:{SHA}"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.update(format=2), "format 2 is unknown to this version"),
        (lambda m: m.update(format="1"), "format '1' is unknown"),
        (lambda m: m.pop("format"), "not the manifest of a forget adapter"),
        (lambda m: m.pop("base"), "base is missing"),
        (lambda m: m["base"].pop("digest"), "base.digest is missing"),
        (lambda m: m.update(refernce="x"), "unknown key 'refernce'. Did you mean 'reference'"),
        (lambda m: m["base"].update(digset="x"), "unknown key 'digset' in base. Did you mean 'digest'"),
        (lambda m: m.update(base="x"), "base must be a mapping, not 'x'"),
        (lambda m: m.update(method=[]), "method must be a mapping, not a list"),
        (lambda m: m.update(scale="1"), "scale must be a number, not '1'"),
        (lambda m: m.update(scale=True), "scale must be a number, not true"),
        (lambda m: m["base"].update(digest="xyz"), "64 hexadecimal digits"),
        (lambda m: m["base"].update(ref="/models/x"), "base.ref is a path"),
        (lambda m: m["base"].update(ref="../x"), "base.ref is a path"),
        (lambda m: m["base"].update(ref="org/model"), "must be the 40-digit commit"),
        (lambda m: m["base"].update(ref="local:" + "0" * 12), "not the start of base.digest"),
        (lambda m: m["base"].update(ref="a b"), "neither a Hub id"),
        (lambda m: m["data"]["forget"].update(texts=["x"]), "never texts"),
        (lambda m: m["data"]["forget"].update(n="many"), "data.forget.n must be the number of rows, not 'many'"),
        (lambda m: m["data"]["forget"].update(ref="/data/f.jsonl"), "data.forget.ref holds a path"),
        (lambda m: m["method"].update(file="C:\\x"), "method.file holds a path"),
        (lambda m: m.update(depends_on=["x"]), "depends_on[0] must be an adapter id (sha256:..), not 'x'"),
        (lambda m: m.update(seeds={"seed": 1.5}), "seeds.seed must be a whole number, not 1.5"),
        (lambda m: m["probes"]["base"].pop(), "one entry per prompt"),
        (lambda m: m["probes"]["base"][0]["ids"].pop(), "of one length"),
        (lambda m: m["method"].update(x=float("nan")), "must be finite"),
    ],
)
def test_malformed(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    raw = json.loads(good().text())
    damage(raw)
    with pytest.raises(UserError) as e:
        Manifest.from_text(json.dumps(raw), "OUT/forget.json")
    assert message in str(e.value) and "OUT/forget.json" in str(e.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "expected a JSON object"), ("", "not JSON")])
def test_not_a_manifest(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Manifest.from_text(text)


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError, match="2 problems"):
        good(scale=float("inf"), seeds={"a": "b"}).text()


def test_hub_base_needs_its_commit() -> None:
    assert good(base=BaseRef("meta-llama/Llama-3.2-1B", SHA, "0" * 40)).text()


def test_path_like() -> None:
    for text in ("/a", "~/a", "./a", "../a", "..", "file:///a", "C:\\a", "C:/a", "\\\\host\\a", "a/../b"):
        assert path_like(text), text
    for text in (
        "org/name",
        "embedded:people",
        "model.layers.0",
        ".*q_proj",
        "a:b",
        "1/2",
        "...",
        "e.g. this",
        "~10 people",
    ):
        assert not path_like(text), text
