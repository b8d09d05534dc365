"""LoRA and expert adapters on one base: switched, scaled, taken out one by one; and what does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import dense, edit, expert, lora
from tinyfolder import IDS, logits, write

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.score import on_one_model
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.fetch import commit_of, is_hub_id, resolve_adapter, split_reference
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.stack.model import ForgetModel


@pytest.fixture(scope="module")
def parts(moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("parts")
    expert(where / "e1", moe_dir, 1, {1: [0, 3], 2: [2]}, train_router="lora")
    expert(where / "e2", moe_dir, 2, {0: [1], 1: [3, 5]}, r=3)
    lora(where / "l1", moe_dir, 3)
    lora(where / "l2", moe_dir, 4, ("q_proj", "o_proj"))
    return {n: where / n for n in ("e1", "l1", "e2", "l2")}


@pytest.mark.parametrize("order", [("e1", "l1", "e2", "l2"), ("l1", "e1", "l2", "e2")])
def test_they_add_up_and_go_one_by_one(moe_dir: Path, parts: dict[str, Path], order: tuple[str, ...]) -> None:
    base = logits(load_base(moe_dir))
    stack = ForgetModel.from_pretrained(moe_dir, {n: parts[n] for n in order})
    assert stack.active() == list(order) and not any(p.requires_grad for p in stack.model.parameters())
    _, model = dense([(parts[n], 1.0) for n in order], moe_dir)
    all_on = logits(stack.model)
    assert torch.allclose(all_on, logits(model), atol=1e-5) and not torch.allclose(all_on, base, atol=0.1)
    with stack.disabled():
        assert torch.equal(logits(stack.model), base) and stack.active() == []
    assert torch.equal(logits(stack.model), all_on)
    for name, subject in on_one_model(stack.model, {"base": None, "e1": "e1", "l2": "l2"}).items():
        with subject() as inner:
            alone = base if name == "base" else logits(ForgetModel.from_pretrained(moe_dir, parts[name]).model)
            assert torch.equal(logits(inner), alone)
    assert torch.equal(logits(stack.model), all_on)
    stack.scale("e2", -0.5)
    stack.scale("l2", 2)
    _, model = dense([(parts["e1"], 1), (parts["l1"], 1), (parts["e2"], -0.5), (parts["l2"], 2)], moe_dir)
    assert torch.allclose(logits(stack.model), logits(model), atol=1e-5)
    for gone in ("e1", "l1"):
        report = stack.remove(gone)
        assert report.ok and report.adapters == [gone] and report.remaining == list(stack.adapters)
        fresh = ForgetModel.from_pretrained(
            moe_dir, {n: parts[n] for n in stack.adapters}, scales={n: stack.scales()[n] for n in stack.adapters}
        )
        assert torch.equal(logits(fresh.model), logits(stack.model))
    assert stack.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 8)
    assert stack.remove().ok and torch.equal(logits(stack.model), base) and stack.adapters == {}


def test_a_stock_expert_adapter_stacks_too(moe_dir: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    """One that another tool wrote has no compact form; two of those with other targets are more than PEFT's own layer takes."""
    folders = {}
    for name in ("e1", "e2"):
        shutil.copytree(parts[name], tmp_path / name)
        shutil.rmtree(tmp_path / name / "expert_lora")
        edit(tmp_path / name, "forget.json", lambda m: [m["files"].pop(k) for k in list(m["files"]) if "/" in k])
        folders[name] = tmp_path / name
    both = ForgetModel.from_pretrained(moe_dir, folders)
    compact = ForgetModel.from_pretrained(moe_dir, {n: parts[n] for n in folders})
    assert torch.allclose(logits(both.model), logits(compact.model), atol=1e-5)


def test_two_forms_that_disagree_are_refused(moe_dir: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(parts["e1"], bad)
    file = bad / "expert_lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k: t + (0.01 if "down_B" in k else 0) for k, t in tensors.items()}, file)
    edit(bad, "forget.json", lambda m: m["files"].update({"expert_lora/adapter_model.safetensors": None}))
    with pytest.raises(UserError, match="hold two different adapters"):
        ForgetModel.from_pretrained(moe_dir, bad)


def test_two_kinds_on_one_module_are_refused(base_dir: Path, tmp_path: Path) -> None:
    from peft import LoHaConfig
    from stacks import write_config

    write_config(tmp_path / "loha", base_dir, LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), 1)
    write_config(tmp_path / "apart", base_dir, LoHaConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"), 1)
    lora(tmp_path / "l", base_dir, 2)
    for order in (["l", "loha"], ["loha", "l"]):
        with pytest.raises(UserError, match="q_proj"):
            ForgetModel.from_pretrained(base_dir, [tmp_path / n for n in order])
    stack = ForgetModel.from_pretrained(base_dir, [tmp_path / "apart", tmp_path / "l"])
    base = logits(load_base(base_dir))
    both = logits(stack.model)
    with stack.disabled():
        assert torch.equal(logits(stack.model), base)
    stack.remove("apart")
    assert torch.equal(logits(stack.model), logits(ForgetModel.from_pretrained(base_dir, tmp_path / "l").model))
    assert not torch.equal(both, logits(stack.model))


def test_a_type_without_a_scale_says_so(base_dir: Path, tmp_path: Path) -> None:
    from peft import IA3Config
    from stacks import write_config

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    write_config(tmp_path / "ia3", base_dir, config, 1)
    stack = ForgetModel.from_pretrained(base_dir, tmp_path / "ia3")
    with pytest.raises(UserError, match="no scale to set"):
        stack.scale("default", 0.5)
    assert stack.remove().ok


def test_a_chain(base_dir: Path, tmp_path: Path) -> None:
    ids: list[str] = []
    for i, needs in enumerate(([], [0], [], [1])):
        made = write(tmp_path / f"n{i}", base_dir, seed=i + 1, depends_on=[ids[k] for k in needs])
        ids.append(made.adapter_id)
    stack = ForgetModel.from_pretrained(base_dir, [tmp_path / f"n{i}" for i in range(4)])
    assert stack.chain("n3") == ["n0", "n1", "n3"] and stack.chain("n2") == ["n2"]
    with pytest.raises(UserError, match=r"n1, n3 were trained on top of 'n0'"):
        stack.remove("n0")
    assert stack.remove("n0", cascade=True).adapters == ["n3", "n1", "n0"] and stack.active() == ["n2"]
    for order, message in ((["n1", "n0"], "n0 is given after it"), (["n2", "n1"], "is not among the adapters given")):
        with pytest.raises(UserError, match=message):
            ForgetModel.from_pretrained(base_dir, [tmp_path / n for n in order])


def test_wrong_shapes_name_the_tensor(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(adapter_dir, bad)
    edit(bad, "adapter_config.json", lambda c: c.update(r=3))
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.\S+ has shape \[4, \d+\].*needs \[3, \d+\]"):
        ForgetModel.from_pretrained(base_dir, bad)
    edit(bad, "adapter_config.json", lambda c: c.update(r=4, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"4 of its tensors have no place there, first \S*down_proj"):
        ForgetModel.from_pretrained(base_dir, bad)
    edit(bad, "adapter_config.json", lambda c: c.update(target_modules=["q_proj", "down_proj", "k_proj"]))
    with pytest.raises(
        UserError, match=r"4 tensors that its configuration asks for are not in its file, first \S*k_proj"
    ):
        ForgetModel.from_pretrained(base_dir, bad)


# --- tokenizers ----------------------------------------------------------------------------------------------------------


def retokenized(adapter: Path, out: Path, change) -> Path:
    shutil.copytree(adapter, out)
    edit(out, "tokenizer.json", change)
    return out


def test_another_tokenizer_is_refused(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    def swap(t: dict) -> None:
        words = t["model"]["vocab"]
        words["France"], words["capital"] = words["capital"], words["France"]

    def more(t: dict) -> None:
        t["model"]["vocab"]["zebra"] = 31

    def split(t: dict) -> None:
        t["pre_tokenizer"] = {"type": "WhitespaceSplit"}

    for name, change, message in (
        ("swap", swap, r"2 of its words have other ids, e\.g\. 'France'"),
        ("more", more, "1 words are in one of the two only, e.g. 'zebra'"),
        ("split", split, r"the text .* becomes"),
    ):
        with pytest.raises(UserError, match=message):
            ForgetModel.from_pretrained(base_dir, retokenized(adapter_dir, tmp_path / name, change))


def test_what_is_no_other_tokenizer(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    def added(t: dict) -> None:
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        t["added_tokens"].append({"id": 40, "content": "<pad>", **token})

    def around(t: dict) -> None:
        t["padding"] = t["truncation"] = None
        only = [{"Sequence": {"id": "A", "type_id": 0}}]
        t["post_processor"] = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}, "single": only}

    for name, change in (("added", added), ("around", around)):
        ForgetModel.from_pretrained(base_dir, retokenized(adapter_dir, tmp_path / name, change))
    shutil.copytree(adapter_dir, tmp_path / "none")
    (tmp_path / "none" / "tokenizer.json").unlink()
    edit(tmp_path / "none", "forget.json", lambda m: m["files"].pop("tokenizer.json"))
    ForgetModel.from_pretrained(base_dir, tmp_path / "none")


def test_a_tokenizer_file_that_is_none(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a tokenizer"):
        ForgetModel.from_pretrained(base_dir, retokenized(adapter_dir, tmp_path / "x", lambda t: t.pop("model")))


# --- names of adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one repository in it, and no network."""
    from huggingface_hub import constants

    repo = tmp_path / "cache" / "models--me--gone"
    shutil.copytree(adapter_dir, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repo


def test_hub_ids(hub: Path, base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    found = resolve_adapter("me/gone")
    assert commit_of(found) == "a" * 40 and resolve_adapter("me/gone@" + "a" * 40) == found
    assert resolve_adapter("me/gone", "a" * 40) == found and resolve_adapter(adapter_dir) == adapter_dir
    assert commit_of(adapter_dir) is None and is_hub_id("me/gone") and not is_hub_id(adapter_dir)
    assert split_reference("me/gone@v1") == ("me/gone", "v1") and split_reference("a@b") == ("a@b", None)
    stack = ForgetModel.from_pretrained(base_dir, ["me/gone@" + "a" * 40, write_second(base_dir, tmp_path)])
    assert list(stack.adapters) == ["gone", "second"]
    for ref, revision, message in (
        ("me/gone", "b" * 40, "not in the local Hub cache"),
        ("me/gone@" + "a" * 40, "b" * 40, "two revisions"),
        ("me/other", None, "not in the local Hub cache"),
        ("../gone", None, "no such folder"),
        ("/me/gone", None, "no such folder"),
        ("me/gone/more", None, "not a Hub id"),
        ("me/..", None, "no such folder|not a Hub id"),
        (str(adapter_dir), "a" * 40, "a folder has no revision"),
        (str(adapter_dir / "forget.json"), None, "is a file"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_adapter(ref, revision)
    (found / "adapter_model.safetensors").rename(found / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights are never downloaded"):
        resolve_adapter("me/gone")


def write_second(base_dir: Path, tmp_path: Path) -> Path:
    write(tmp_path / "second", base_dir, seed=2)
    return tmp_path / "second"


def test_damaged_folders_are_refused_in_a_stack(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """Reading has its own tests (tests/folder); here that a stack reads everything before it loads anything."""
    weights = "adapter_model.safetensors"

    def broken(name: str, change) -> Path:
        shutil.copytree(adapter_dir, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def zero(folder: Path) -> None:
        save_file({k: t * 0 if "lora_B" in k else t for k, t in load_file(folder / weights).items()}, folder / weights)

    def flip(folder: Path) -> None:
        raw = bytearray((folder / weights).read_bytes())
        raw[-1] ^= 1
        (folder / weights).write_bytes(bytes(raw))

    for name, change, message in (
        ("zero", zero, "does nothing"),
        ("short", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-5]), "truncated"),
        ("flip", flip, "is not the file that was written"),
        ("void", lambda f: (f / weights).write_bytes(b""), "empty"),
        ("pickled", lambda f: (f / weights).rename(f / "adapter_model.bin"), "pickled"),
        ("future", lambda f: edit(f, "forget.json", lambda m: m.update(format=2)), "format 2 is unknown"),
        ("away", lambda f: edit(f, "forget.json", lambda m: m["files"].update({"../x": None})), "leaves the folder"),
    ):
        with pytest.raises(UserError, match=message):
            ForgetModel.from_pretrained(base_dir, [adapter_dir, broken(name, change)])
    assert read_adapter(adapter_dir).manifest.format == json.loads((adapter_dir / "forget.json").read_text())["format"]


@pytest.mark.parametrize("order", [("e1", "l1", "l2"), ("l1", "e1", "l2")])
def test_in_half_precision_the_factors_stay_float32(
    moe_dir: Path, parts: dict[str, Path], order: tuple[str, ...]
) -> None:
    stack = ForgetModel.from_pretrained(moe_dir, {n: parts[n] for n in order}, dtype="bfloat16")
    kinds = {p.dtype for n, p in stack.model.named_parameters() if "lora_" in n and ".base_layer." not in n}
    assert kinds == {torch.float32}
    full = logits(ForgetModel.from_pretrained(moe_dir, {n: parts[n] for n in order}).model)
    assert torch.allclose(logits(stack.model).float(), full, atol=0.05 * float(full.abs().max()))
    with stack.disabled():
        assert torch.equal(logits(stack.model), logits(load_base(moe_dir, "bfloat16")))
    assert stack.remove("l1").verdict == "cannot tell"  # loading rounded the base: its files are float32
