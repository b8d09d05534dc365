"""Removal is proved against the base's files, and what is not the base is never called removed."""

from pathlib import Path

import pytest
import torch
from tinyfolder import adapted, logits, save_base, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.stack.model import ForgetModel, remove
from peft_unlearn.stack.stackfile import add

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


@pytest.mark.parametrize("named", ["forget-stack.yaml", "prod", "folder"])
def test_from_whatever_stack_add_wrote(named: str, base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    stack = tmp_path / named
    if named == "folder":
        stack.mkdir()
    add(stack, adapter_dir, request_id="1", reason="r", name="a")
    assert remove(stack, base_dir).ok and remove(stack, base_dir, "a").ok
    with pytest.raises(UserError, match="no adapter 'b'"):
        remove(stack, base_dir, "b")
    with pytest.raises(UserError, match="is no stack file"):
        remove(adapter_dir, base_dir, "a")


def test_one_of_several_leaves_the_others_as_they_would_be(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", base_dir, seed=2)
    write(tmp_path / "c", base_dir, seed=3)
    places = {"first": adapter_dir, "second": tmp_path / "b", "third": tmp_path / "c"}
    for gone in places:
        model = ForgetModel.from_pretrained(base_dir, places)
        report = model.remove(gone)
        assert report.ok and report.digest == report.base_digest and not report.left, str(report)
        rest = {n: p for n, p in places.items() if n != gone}
        assert report.remaining == list(rest) == model.active() and ", ".join(rest) in str(report)
        assert torch.equal(logits(model.model), logits(ForgetModel.from_pretrained(base_dir, rest).model))
        assert model.model.active_adapter in rest and gone not in str(model.model)
        with model.disabled() as inner:
            assert torch.equal(logits(inner), logits(load_base(base_dir)))
        with pytest.raises(UserError, match="There is no adapter"):
            model.remove(gone)
        for name in rest:
            assert model.remove(name).ok
        assert torch.equal(logits(model.model), logits(load_base(base_dir)))


def test_layers_of_one_adapter_alone_go_with_it(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    from stacks import lora

    lora(tmp_path / "k", base_dir, 2, ("k_proj",))
    model = ForgetModel.from_pretrained(base_dir, {"a": adapter_dir, "k": tmp_path / "k"})
    model.remove("k")
    layer = model.model.get_submodule("base_model.model.model.layers.0.self_attn")
    assert type(layer.k_proj) is torch.nn.Linear and type(layer.q_proj) is not torch.nn.Linear


def test_one_flipped_base_bit_is_reported_under_others(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", base_dir, seed=2)
    model = ForgetModel.from_pretrained(base_dir, {"a": adapter_dir, "b": tmp_path / "b"})
    wrapped = model.model.get_parameter("base_model.model." + Q.replace(".weight", ".base_layer.weight"))
    wrapped.data.view(torch.int32)[3, 1] ^= 1
    report = model.remove("a")
    assert report.verdict == "changed" and report.changed == [Q] and report.exit_code == 1


def test_one_cannot_be_taken_out_of_merged_weights(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "b", base_dir, seed=2)
    model = ForgetModel.from_pretrained(base_dir, {"a": adapter_dir, "b": tmp_path / "b"})
    model.model.merge_adapter()
    with pytest.raises(UserError, match="Load the base and the other adapters anew"):
        model.remove("a")


def test_a_merged_folder_is_refused_with_what_to_do(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    from peft_unlearn.folder.read import read_adapter
    from peft_unlearn.merging.merge import merge

    merge(adapter_dir, base_dir, tmp_path / "merged")
    with pytest.raises(UserError, match="is a merged model") as e:
        remove(tmp_path / "merged", base_dir)
    assert read_adapter(adapter_dir).adapter_id[:19] in str(e.value)
    assert digest_checkpoint(base_dir)[:12] in str(e.value) and "load the base again" in str(e.value)
    with pytest.raises(UserError, match="is a whole model, not an adapter"):
        remove(base_dir)
    with pytest.raises(UserError, match="no stack file"):
        remove(adapter_dir, base_dir, name="a")
