"""The digest is stable across shards and dtypes in memory, and no single bit escapes it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tinyfolder import adapted, save_base

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint, digest_live, targeted_names

Q = "model.layers.0.self_attn.q_proj.weight"


def literal(path: Path) -> str:
    """The definition, written out once more through another reader."""
    tensors = {k: v for f in sorted(path.glob("*.safetensors")) for k, v in load_file(str(f)).items()}
    whole = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        kind = {torch.bfloat16: "BF16", torch.float32: "F32"}[t.dtype]
        sha = hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        whole.update((json.dumps([name, kind, list(t.shape), sha], separators=(",", ":")) + "\n").encode())
    return whole.hexdigest()


def test_equals_its_definition_sharded_or_not(base_dir: Path, tmp_path: Path) -> None:
    sharded = save_base(tmp_path / "s", shard="3KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert digest_checkpoint(base_dir) == literal(base_dir) == digest_checkpoint(sharded) == literal(sharded)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_live_equals_files_bare_and_adapted(tmp_path: Path, tie: bool, dtype: str) -> None:
    path = save_base(tmp_path / "b", tie=tie)
    bare = digest_live(load_base(path, dtype), path)
    assert (bare.verdict, bare.digest) == ("same", digest_checkpoint(path)), bare.reason
    over = digest_live(adapted(path), path)
    assert (over.verdict, over.digest) == ("same", digest_checkpoint(path)), over.reason


@pytest.mark.parametrize("bit", [0, 7, 16, 31], ids=lambda b: f"bit{b}")
def test_any_flipped_bit_is_changed(base_dir: Path, bit: int) -> None:
    """Bits 0 to 15 of a float32 have no place in bfloat16: still changed, never "cannot tell"."""
    model = load_base(base_dir)
    raw = model.get_parameter(Q).data.view(torch.int32)
    raw[1, 2] ^= (1 << bit) if bit < 31 else -(2**31)
    got = digest_live(model, base_dir)
    assert got.verdict == "changed" and got.changed == [Q]
    assert (got.digest is None) == (bit < 16)


def test_rounding_at_load_is_not_called_a_change(tmp_path: Path) -> None:
    path = save_base(tmp_path / "b", dtype=torch.float32)
    got = digest_live(load_base(path, "bfloat16"), path)
    assert got.verdict == "cannot tell" and "float32" in (got.reason or "")
    model = load_base(path, "bfloat16")
    model.get_parameter(Q).data[0, 0] *= 2
    assert digest_live(model, path).changed == [Q]


def test_layouts_that_do_not_map_cannot_be_told(base_dir: Path, tmp_path: Path) -> None:
    tensors = load_file(str(base_dir / "model.safetensors"))
    tensors[Q.replace("q_proj", "other")] = tensors.pop(Q)
    (tmp_path / "odd").mkdir()
    save_file(tensors, str(tmp_path / "odd" / "model.safetensors"))
    got = digest_live(load_base(base_dir), tmp_path / "odd")
    assert got.verdict == "cannot tell" and got.digest is None and set(got.unknown) == {Q, Q.replace("q_proj", "other")}


def test_an_untied_head_must_equal_what_it_was_tied_to(tmp_path: Path) -> None:
    path = save_base(tmp_path / "b", tie=True)
    model = load_base(path)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert digest_live(model, path).verdict == "same"
    model.lm_head.weight.data[0, 0] += 1
    assert digest_live(model, path).changed == ["lm_head.weight"]


def test_targeted_sees_only_its_modules(base_dir: Path) -> None:
    model = adapted(base_dir)
    names = targeted_names(model)
    assert len(names) == 4 and all(n.endswith(("q_proj", "down_proj")) for n in names)
    want = digest_checkpoint(base_dir, names)
    assert digest_live(model, base_dir, names).digest == want != digest_checkpoint(base_dir)
    model.base_model.model.lm_head.weight.data[0, 0] += 1
    assert digest_live(model, base_dir, names).digest == want
    with pytest.raises(UserError, match="no tensor on disk for nowhere"):
        digest_checkpoint(base_dir, ["nowhere"])


def test_an_adapted_tied_head_is_found_under_the_name_on_disk(tmp_path: Path) -> None:
    path = save_base(tmp_path / "b", tie=True)
    model = get_peft_model(load_base(path), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert targeted_names(model) == ["model.embed_tokens"]
    assert digest_live(model, path, targeted_names(model)).digest == digest_checkpoint(path, ["model.embed_tokens"])
    assert digest_live(model, path).verdict == "same"


def test_damaged_checkpoints_are_named(base_dir: Path, tmp_path: Path) -> None:
    def folder(name: str, **files: bytes) -> Path:
        (tmp_path / name).mkdir()
        for n, b in files.items():
            (tmp_path / name / n.replace("__", ".")).write_bytes(b)
        return tmp_path / name

    good = (base_dir / "model.safetensors").read_bytes()
    index = "model__safetensors__index__json"
    up = json.dumps({"weight_map": {"a": "../b.safetensors"}}).encode()
    for path, message in (
        (folder("empty", model__safetensors=b""), "the file is empty"),
        (folder("short", model__safetensors=good[:-3]), "truncated"),
        (folder("long", model__safetensors=good + b"x"), "foreign bytes"),
        (folder("foreign", model__safetensors=b"PK\x03\x04" * 9), "not a safetensors file"),
        (folder("twice", model__safetensors=b'\x11\0\0\0\0\0\0\0{"a":{},"a":{}}  '), "twice"),
        (folder("pickled", pytorch_model__bin=b"x"), "pickled"),
        (folder("nothing"), "neither model.safetensors nor"),
        (folder("up", **{index: up}), "leaves the folder"),
        (folder("lost", **{index: up.replace(b"../", b"")}), "which is missing"),
        (folder("bad", **{index: b"[]"}), "not a readable index"),
        (tmp_path / "absent", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            digest_checkpoint(path)
