"""A folder is checked against itself and its base; each way of being wrong is told apart."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.manifest import probes
from peft_unlearn.folder.read import file_sha256, read_adapter
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack.below import Below

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "folder"))
import tinyfolder


@pytest.fixture
def folder(local: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(local, tmp_path / "adapter"))


def edit(folder: Path, change) -> None:
    path = folder / "forget.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def verdicts(folder: Path, base: Path | None) -> dict[str, str]:
    found = verify(folder, base)
    assert found.exit_code == (0 if found.verdict == "ok" else 1)
    json.dumps(found.to_dict(), allow_nan=False)
    return {c.name: c.verdict for c in found.checks}


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nothing")


def test_a_whole_adapter_on_its_base(folder, base_dir):
    assert set(verdicts(folder, base_dir).values()) == {"ok"}
    assert {"files", "base", "targets", "probes, adapter on", "probes, adapter off", "effect"} <= set(
        verdicts(folder, base_dir)
    )


def test_a_flipped_bit_is_found(folder, base_dir):
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    assert verdicts(folder, base_dir) == {"files": "failed"}


def test_other_weights_of_the_same_shape(folder, tmp_path):
    other = tinyfolder.save_base(tmp_path / "other", seed=5)
    assert verdicts(folder, other)["base"] == "failed"


def test_without_its_base_it_cannot_tell(folder):
    found = verify(folder)
    assert found.verdict == "cannot tell"
    assert "--base" in str(found)


def test_weights_exchanged_together_with_their_hash_are_betrayed_by_the_probes(folder, base_dir):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(str(path))
    save_file({n: t * 3 if "lora_B" in n else t for n, t in tensors.items()}, str(path), metadata={"format": "pt"})
    edit(folder, lambda m: m["files"].update({"adapter_model.safetensors": file_sha256(path)}))
    found = verdicts(folder, base_dir)
    assert found["files"] == "ok"
    assert found["probes, adapter on"] == "failed"
    assert found["probes, adapter off"] == "ok"


def test_an_adapter_that_moves_nothing_neutral_is_not_called_ok(folder, base_dir):
    edit(folder, lambda m: m["probes"].update({"adapter": m["probes"]["base"]}))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(str(path))
    save_file({n: t * 1e-9 if "lora_B" in n else t for n, t in tensors.items()}, str(path), metadata={"format": "pt"})
    edit(folder, lambda m: m["files"].update({"adapter_model.safetensors": file_sha256(path)}))
    assert verdicts(folder, base_dir)["effect"] == "cannot tell"


def test_probes_of_a_dependent_adapter_need_the_stack(folder, base_dir):
    edit(folder, lambda m: m.update({"depends_on": ["sha256:" + "0" * 64]}))
    assert verdicts(folder, base_dir)["probes"] == "cannot tell"


def test_no_probes_no_answer(folder, base_dir):
    edit(folder, lambda m: m.update({"probes": None}))
    assert verdicts(folder, base_dir)["probes"] == "cannot tell"


def test_a_dependent_adapter_is_verified_over_those_below_it(base_dir, tmp_path):
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    first = tinyfolder.write(lower, base_dir, seed=1)
    tinyfolder.write(upper, base_dir, seed=2)
    both = Below({"l": first, "u": read_adapter(upper)}, {"l": 0.5}).put_on(load_base(base_dir))
    seen = probes(both, tinyfolder.tokenizer())
    edit(upper, lambda m: m.update({"depends_on": [first.adapter_id], "probes": asdict(seen)}))
    edit(upper, lambda m: m["method"].update({"stack": [{"id": first.adapter_id, "scale": 0.5}]}))
    alone = verify(upper, base_dir)
    assert alone.verdict == "cannot tell" and "--below" in str(alone)
    found = verify(upper, base_dir, below=[lower])
    assert found.verdict == "ok", str(found)
    edit(upper, lambda m: m["method"].update({"stack": [{"id": first.adapter_id, "scale": 1.0}]}))
    assert {c.name for c in verify(upper, base_dir, below=[lower]).checks if c.verdict == "failed"} == {
        "probes, adapter on"
    }


def test_what_does_not_belong_below(folder, base_dir, tmp_path):
    other = tmp_path / "other"
    tinyfolder.write(other, base_dir, seed=7)
    with pytest.raises(UserError, match="none of these adapters was trained on top of it"):
        verify(folder, base_dir, below=[other])
    edit(folder, lambda m: m.update({"depends_on": ["sha256:" + "0" * 64, read_adapter(other).adapter_id]}))
    with pytest.raises(UserError, match="not among the adapters given"):
        verify(folder, base_dir, below=[other])
