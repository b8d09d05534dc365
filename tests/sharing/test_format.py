"""adapters/README.md is the specification: its examples are recomputed from its own words, its schema is the reader's."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.manifest import BaseRef, Manifest, Probes
from peft_unlearn.folder.read import read_adapter

ADAPTERS = Path(__file__).resolve().parents[2] / "adapters"
SPEC = (ADAPTERS / "README.md").read_text(encoding="utf-8")
SCHEMA = json.loads((ADAPTERS / "forget.schema.json").read_text())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checkpoint_file(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file by hand."""
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_worked_checkpoint_digest(tmp_path: Path) -> None:
    lines = re.findall(r'^    (\["[ab]\.weight".*\])$', SPEC, re.M)
    stated = re.findall(r"digest: ([0-9a-f]{64})", SPEC)[0]
    raw = {"a.weight": bytes.fromhex("803f00c0"), "b.weight": struct.pack("<2f", 1.0, -2.0)}
    assert raw["b.weight"].hex(" ") in SPEC and raw["a.weight"].hex(" ") in SPEC
    for line in lines:
        name, _, _, hashed = json.loads(line)
        assert sha(raw[name]) == hashed
    assert sha("".join(f"{line}\n" for line in lines).encode()) == stated
    (tmp_path / "model.safetensors").write_bytes(
        checkpoint_file({"b.weight": ("F32", [2], raw["b.weight"]), "a.weight": ("BF16", [1, 2], raw["a.weight"])})
    )
    assert digest_checkpoint(tmp_path) == stated


def test_the_worked_set_digest() -> None:
    rows = re.findall(r"^    (\{.*?\}) +([0-9a-f]{64})$", SPEC, re.M)
    stated = re.findall(r"digest: ([0-9a-f]{64})", SPEC)[1]
    assert len(rows) == 2 and all(sha(text.encode()) == hashed for text, hashed in rows)
    assert sha(b"".join(sorted(bytes.fromhex(h) for _, h in rows))) == stated
    loaded = [json.loads(text) for text, _ in rows]
    assert ForgetRetain(loaded).sha256["forget"] == ForgetRetain(loaded[::-1]).sha256["forget"] == stated
    assert ForgetRetain([*loaded, loaded[0]]).sha256["forget"] != stated


def test_a_second_implementation_of_the_base_digest(base_dir: Path, made: Path) -> None:
    """Nothing of this package: the words of the page in a few lines, on a real checkpoint."""
    raw = (base_dir / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = {k: v for k, v in json.loads(raw[8 : 8 + size]).items() if k != "__metadata__"}
    whole = hashlib.sha256()
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        row = [name, header[name]["dtype"], header[name]["shape"], sha(raw[8 + size + begin : 8 + size + end])]
        whole.update(json.dumps(row, separators=(",", ":")).encode() + b"\n")
    manifest = json.loads((made / "forget.json").read_text())
    assert whole.hexdigest() == manifest["base"]["digest"]
    assert read_adapter(made).adapter_id == f"sha256:{sha((made / 'adapter_model.safetensors').read_bytes())}"
    assert set(manifest["files"]) | {"forget.json"} == {p.name for p in made.iterdir()}


def test_schema_and_dataclass_have_the_same_fields() -> None:
    assert jsonschema.Draft202012Validator.check_schema(SCHEMA) is None
    top = SCHEMA["properties"]
    for cls, schema in ((Manifest, SCHEMA), (BaseRef, top["base"]), (Probes, top["probes"]["anyOf"][1])):
        assert set(schema["properties"]) == {f.name for f in fields(cls)}
        assert schema["additionalProperties"] is False
        bare = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        # `reference`, `scale` and `format` have defaults for writers, and must be there for readers
        extra = {"reference", "scale", "format"} if cls is Manifest else set()
        assert set(schema["required"]) == bare | extra
    for name in top:
        assert f"`{name}`" in SPEC or f"`{name}." in SPEC, name
    kinds = {"str": "string", "float": "number", "int": "integer", "dict": "object", "list": "array"}
    for f in fields(Manifest):
        kind = kinds.get(re.split(r"[\[ ]", str(f.type))[0])
        if kind is not None:
            assert top[f.name].get("type") == kind, f.name


def accepted(raw: dict[str, Any]) -> tuple[bool, bool]:
    """(by the schema, by the reader)."""
    try:
        Manifest.from_text(json.dumps(raw))
        reader = True
    except UserError:
        reader = False
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(raw), reader


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    out = copy.deepcopy(raw)
    at: Any = out
    *keys, last = path.split(".")
    for key in keys:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[last]
    else:
        at[int(last) if isinstance(at, list) else last] = value
    return out


CHANGES: list[tuple[str, Any]] = [
    *((f, ...) for f in ("format", "base", "method", "data", "reference", "scale", "base.ref", "base.digest", "probes.base")),
    *((f, ...) for f in ("name", "seeds", "targets", "probes", "files", "depends_on", "base.digest_targeted")),
    *((f, None) for f in ("format", "base", "method", "data", "reference", "scale", "files", "name", "probes", "base.digest")),
    *((f, "x") for f in ("format", "base", "method", "scale", "seeds", "targets", "base.digest", "data.forget", "extra", "base.extra")),
    ("format", 2), ("format", True), ("scale", True), ("scale", -0.5), ("scale", 2), ("base.ref", "me/base/more"),
    ("base.ref", "/home/ann/base"), ("base.ref", "embedded:people"), ("base.ref", "local:0123"), ("base.revision", None),
    ("base.revision", "main"), ("data", {}), ("data.forget.n", "3"), ("data.forget.n", True), ("data.forget.text", "x"),
    ("data.forget.sha256", "a" * 63), ("data.forget.ref", "me/data"), ("seeds", {"seed": 1.5}), ("effective_batch", {"rows": 4}),
    ("depends_on", ["sha256:" + "a" * 64]), ("depends_on", ["a" * 64]), ("files", {"README.md": None}), ("files", {"x": "y"}),
    ("probes.prompts", "x"), ("probes.base.0", {"ids": [1]}), ("probes.base.0", {"ids": [-1], "logits": [0.5]}),
    ("method", {"anything": [1, {"b": None}]}), ("versions", {"torch": "2"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def raw(made: Path) -> dict[str, Any]:
    return json.loads((made / "forget.json").read_text())


def test_schema_and_reader_agree(raw: dict[str, Any]) -> None:
    assert accepted(raw) == (True, True)
    verdicts = []
    for path, value in CHANGES:
        by_schema, by_reader = accepted(changed(raw, path, value))
        assert by_schema == by_reader, (path, value, by_schema, by_reader)
        verdicts.append(by_reader)
    assert 10 < sum(verdicts) < len(verdicts) - 20


def test_published_manifests_fit_the_schema(raw: dict[str, Any]) -> None:
    for found in [raw, *(json.loads(p.read_text()) for p in sorted(ADAPTERS.glob("published/*/forget.json")))]:
        jsonschema.validate(found, SCHEMA)


def test_the_two_forms_of_an_expert_adapter(tmp_path: Path) -> None:
    """The layouts as the page gives them: slices of the stock tensors are the compact ones, all else is zero."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tuners"))
    import families

    from peft_unlearn.tuners.expert_lora.export import export_stock

    model = families.adapted(families.base("olmoe", "grouped_mm"), train_router="full")
    export_stock(model, tmp_path / "out")
    stock = load_file(str(tmp_path / "out/adapter_model.safetensors"))
    compact = load_file(str(tmp_path / "out/expert_lora/adapter_model.safetensors"))
    config = json.loads((tmp_path / "out/expert_lora/adapter_config.json").read_text())
    r, seen = config["r"], 0
    for layer, ids in config["experts"].items():
        count, at = config["num_experts"][layer], f"base_model.model.model.layers.{layer}.mlp"
        for projection, inside in (("gate_up", ".base_layer"), ("down", "")):
            small = {f: compact.get(f"{at}.experts.peft_unlearn_expert_lora_{projection}_{f}") for f in "AB"}
            if small["A"] is None:
                continue
            a, b = (stock[f"{at}.experts{inside}.lora_{f}.weight"] for f in "AB")
            a, b = a.reshape(count, r, -1), b.reshape(b.shape[0], r, count)
            for e in range(count):
                i = ids.index(e) if e in ids else None
                assert torch.equal(a[e], small["A"][i] if i is not None else torch.zeros_like(a[e]))
                assert torch.equal(b[:, :, e], small["B"][i] if i is not None else torch.zeros_like(b[:, :, e]))
                seen += i is not None
        delta = compact[f"{at}.gate.peft_unlearn_expert_lora_router_delta"]
        product = stock[f"{at}.gate.lora_B.weight"] @ stock[f"{at}.gate.lora_A.weight"]
        assert delta.shape == product.shape == (count, delta.shape[1]) and torch.equal(product, delta)
    assert seen >= 2
