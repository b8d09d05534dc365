"""From a base's name to its files and back."""

from pathlib import Path

import pytest
import torch

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import base_reference, load_base, load_tokenizer, peft_base_name, resolve_base


def test_override_wins_and_local_needs_it(base_dir: Path) -> None:
    assert resolve_base("local:" + "0" * 12, override=base_dir) == base_dir
    assert resolve_base(str(base_dir)) == base_dir
    for ref in ("local:" + "0" * 12, None, ""):
        with pytest.raises(UserError, match="--base"):
            resolve_base(ref)


def test_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for ref, message in (
        (tmp_path, "no config.json"),
        (tmp_path / "f", "is a file"),
        (tmp_path / "x", "no such folder"),
        ("org/not-in-any-cache", "not in the local Hub cache.*--base"),
        ("a b c", "--base"),
        ("embedded:nobody", "nobody"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_base(ref)


def test_references_are_portable(base_dir: Path, tmp_path: Path) -> None:
    sha = "ab" * 32
    assert base_reference(str(base_dir), base_dir, sha).ref == "local:abababababab"
    assert base_reference("embedded:people", base_dir, sha).ref == "embedded:people"
    cached = tmp_path / "models--org--m" / "snapshots" / ("0" * 40)
    got = base_reference("org/m", cached, sha)
    assert (got.ref, got.revision) == ("org/m", "0" * 40)
    assert [peft_base_name(r) for r in ("org/m", "embedded:people", "local:ab")] == ["org/m", "peft-unlearn/people", ""]


def test_loading(base_dir: Path, tmp_path: Path) -> None:
    model = load_base(base_dir)
    assert model.dtype == torch.float32 and not model.training
    assert load_tokenizer(tmp_path, base_dir)("The")["input_ids"] == [3]
    with pytest.raises(UserError, match="No tokenizer files"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="expected float32"):
        load_base(base_dir, "int4")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load it"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}}, {"quantization_config": 5}, {"hidden_size": "x"},
        {"num_attention_heads": 0}, {"hidden_act": "no such"}, {"rope_theta": [1]}, {"model_type": "no such"},
        {"architectures": [5], "hidden_size": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_base_that_cannot_be_built_for_whatever_reason_is_a_message(tmp_path: Path, change: dict) -> None:
    import json

    from tinyfolder import save_base

    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    try:
        load_base(base)
    except UserError as e:
        assert str(base) in str(e) and "\n" not in str(e)
    else:  # transformers takes no notice of it
        assert next(iter(change)) in ("rope_theta", "quantization_config")


def test_a_config_that_asks_for_more_layers_than_any_model_has_builds_none(tmp_path: Path) -> None:
    import json

    from tinyfolder import save_base

    from peft_unlearn.folder.base import on_meta

    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9, "layer_types": None}))
    for build in (on_meta, load_base):
        with pytest.raises(UserError, match="asks for 1,000,000,000 layers"):
            build(base)
