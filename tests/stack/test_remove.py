"""Removal is proved against the base's files, and what is not the base is never called removed."""

from pathlib import Path

import pytest
import torch
from tinyfolder import adapted, logits, save_base, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.stack.remove import remove

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("tie", [False, True])
def test_removed_with_proof(tmp_path: Path, tie: bool) -> None:
    base = save_base(tmp_path / "base", tie=tie)
    write(tmp_path / "out", base)
    report = remove(tmp_path / "out", base)
    assert report.ok and report.exit_code == 0, str(report)
    assert report.digest == report.base_digest == digest_checkpoint(base)
    assert report.probe_difference == 0 and not report.left and "Removed default" in str(report)


def test_the_model_itself_becomes_the_base(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", base_dir, seed=2)
    model = ForgetModel.from_pretrained(base_dir, [adapter_dir, tmp_path / "b"], scales=[1, -2])
    report = model.remove()
    assert report.ok and report.adapters == [adapter_dir.name, "b"], str(report)
    assert torch.equal(logits(model.model), logits(load_base(base_dir)))
    assert not hasattr(model.model, "peft_config")
    with pytest.raises(UserError, match="no adapter"):
        model.remove()


@pytest.mark.parametrize("bit", [0, 20])
def test_one_flipped_base_bit_is_reported(base_dir: Path, adapter_dir: Path, bit: int) -> None:
    model = ForgetModel.from_pretrained(base_dir, adapter_dir)
    wrapped = model.model.get_parameter("base_model.model." + Q.replace(".weight", ".base_layer.weight"))
    wrapped.data.view(torch.int32)[3, 1] ^= 1 << bit
    report = model.remove()
    assert report.verdict == "changed" and report.exit_code == 1
    assert report.changed == [Q] and report.digest != report.base_digest and "CHANGED" in str(report)


def test_bf16_merge_and_unmerge_is_reported(base_dir: Path) -> None:
    from peft import PeftModel

    write_dir = adapted(base_dir)
    model: PeftModel = write_dir.to(torch.bfloat16)
    model.merge_adapter()
    model.unmerge_adapter()
    report = remove(model, base_dir)
    assert report.verdict == "changed" and set(report.changed) <= {
        f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")
    }


def test_a_merged_model_is_reported(base_dir: Path, adapter_dir: Path) -> None:
    model = ForgetModel.from_pretrained(base_dir, adapter_dir)
    model.model.merge_adapter()
    report = model.remove()
    assert report.verdict == "changed" and len(report.changed) == 4 and len(report.merged) == 4
    assert "reload the base" in str(report)


def test_rounded_base_cannot_be_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    write(tmp_path / "out", base)
    model = ForgetModel.from_pretrained(base, tmp_path / "out", dtype="bfloat16")
    report = model.remove()
    assert report.verdict != "removed" and report.exit_code == 1 and report.changed == []


def test_same_weights_that_answer_otherwise_are_not_removed(base_dir: Path, adapter_dir: Path) -> None:
    """A hook that somebody left on the model: every tensor is right, the logits are not."""
    model = ForgetModel.from_pretrained(base_dir, adapter_dir)
    model.model.get_base_model().lm_head.register_forward_hook(lambda m, a, out: out + 1)
    report = model.remove()
    assert not report.ok and "probe" in str(report)


def test_bad_calls(base_dir: Path) -> None:
    with pytest.raises(UserError, match="no adapter on this model"):
        remove(load_base(base_dir), base_dir)
    with pytest.raises(UserError, match="base="):
        remove(adapted(base_dir))
