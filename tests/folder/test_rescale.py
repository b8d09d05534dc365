"""The scale of an adapter on disk: forget.json whole at every moment, and a baked one that plain PEFT runs as it was calibrated."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
import zygote
from tinyfolder import logits, save_base, tokenizer, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.manifest import probe_difference, probes
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.rescale import bake, set_scale
from peft_unlearn.stack.model import ForgetModel


@pytest.fixture
def made(tmp_path):
    base = save_base(tmp_path / "base")
    return base, write(tmp_path / "adapter", base, size=0.5)


def plain_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(base), str(folder)).eval()


def test_the_scale_is_written_and_used_and_the_adapter_stays_the_same_one(made):
    base, old = made
    before = logits(plain_peft(base, old.path))
    new = set_scale(old.path, 0.625)
    assert new.manifest.scale == 0.625 and new.adapter_id == old.adapter_id and new.config == old.config
    assert "0.625" in (old.path / "README.md").read_text()
    stack = ForgetModel.from_pretrained(base, old.path)
    assert stack.scales() == {"default": 0.625}
    assert torch.equal(logits(plain_peft(base, old.path)), before)  # lora_alpha is untouched


def test_baking_gives_plain_peft_the_calibrated_model(made):
    base, old = made
    stack = ForgetModel.from_pretrained(base, old.path)
    stack.scale("default", 0.37)
    wanted, now = logits(stack.model), probes(stack.model, tokenizer())
    new = bake(old.path, 0.37, now)
    torch.testing.assert_close(logits(plain_peft(base, old.path)), wanted, atol=1e-6, rtol=0)
    assert new.manifest.scale == 1.0 and new.manifest.method["baked_scale"] == 0.37
    assert new.config["lora_alpha"] == pytest.approx(8 * 0.37) and new.adapter_id == old.adapter_id
    assert new.manifest.files["adapter_config.json"] != old.manifest.files["adapter_config.json"]
    found = new.manifest.probes
    assert found is not None
    assert probe_difference(plain_peft(base, old.path), tokenizer(), found.prompts, found.adapter) == pytest.approx(
        0, abs=1e-5
    )
    assert "baked into lora_alpha" in (old.path / "README.md").read_text()
    assert not [p for p in old.path.parent.iterdir() if p.name.startswith(".")]
    again = bake(old.path, 0.5, None)
    assert again.manifest.method["baked_scale"] == pytest.approx(0.185) and again.manifest.probes is None


def test_a_whole_number_stays_one(made):
    assert bake(made[1].path, 0.5).config["lora_alpha"] == 4


def test_senseless_scales_and_foreign_files_are_refused(made, tmp_path):
    _, old = made
    for bad in (float("nan"), float("inf"), True, "1"):
        with pytest.raises(UserError, match="finite number"):
            set_scale(old.path, bad)
    with pytest.raises(UserError, match="does nothing"):
        bake(old.path, 0.0)
    (old.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        bake(old.path, 0.5)
    assert read_adapter(old.path).manifest == old.manifest


KILLED = """
import sys, os, signal
sys.path.insert(0, {tests!r})
from peft_unlearn.folder import atomic, rescale
real, calls = os.{call}, [0]
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
os.{call} = die
rescale.{job}({folder!r}, 0.5)
"""


@pytest.mark.parametrize(("job", "call"), [("set_scale", "replace"), ("set_scale", "fsync"), ("bake", "fsync")])
def test_killed_at_any_moment_the_folder_is_whole(made, job, call):
    """SIGKILL right before the new forget.json would appear, and while it is being flushed."""
    _, old = made
    before = {p.name: p.read_bytes() for p in old.path.iterdir()}
    code = KILLED.format(tests=str(Path(__file__).parent), call=call, job=job, folder=str(old.path))
    done = zygote.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    assert {n: (old.path / n).read_bytes() for n in before} == before
    assert read_adapter(old.path).manifest.scale == json.loads(before["forget.json"])["scale"]
    assert set_scale(old.path, 0.25).manifest.scale == 0.25  # and what was left behind is in nobody's way
