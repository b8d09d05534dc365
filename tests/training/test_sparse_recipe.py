"""Sparse adapters by recipe: one folder through every command, a selection that is made anew, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote
from peft import PeftModel, PeftType, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import peft_unlearn
from peft_unlearn import ForgetModel
from peft_unlearn.analysis.calibrate import check_exact
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.rescale import bake, set_scale
from peft_unlearn.merging.compose import compose
from peft_unlearn.merging.merge import merge
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack import stackfile
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.cost import plan
from peft_unlearn.training.reference import model_digest, stack_digest
from peft_unlearn.training.trainer import UnlearnTrainer
from peft_unlearn.tuners.selection import Selection
from peft_unlearn.tuners.sparse import SparseConfig
from peft_unlearn.tuners.sparse.export import entries_of

IDS = torch.arange(24).view(2, 12) + 5
QUIET: dict[str, Any] = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    for name, seed in (("forget", 1), ("retain", 2)):
        text = "\n".join(json.dumps(r) for r in tiny.rows(6, name[0], seed))
        (where.parent / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return where


def recipe(base: Path, selection: Any = None, **adapter: Any) -> dict[str, Any]:
    return {
        "name": "test", "base": str(base), "data": {n: str(base.parent / f"{n}.jsonl") for n in ("forget", "retain")},
        "adapter": {"type": "sparse", **adapter}, "selection": selection or {"method": "random", "ratio": 0.05},
        "terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}},
        "train": {
            "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "steps",
            "save_steps": 2, "weight_decay": 0.1,
        },
        "seed": 3,
    }  # fmt: skip


def trained(recipe: dict[str, Any], out: Path, **more: Any) -> Any:
    return peft_unlearn.train(recipe, out, **QUIET, **more)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter; read only (copy it to damage it)."""
    out = tmp_path_factory.mktemp("made") / "sparse"
    trained(recipe(base), out)
    return out


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


WITHOUT = """
import sys, warnings, json
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_unlearn":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, want = sys.argv[1], torch.load(sys.argv[3])
base = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = PeftModel.from_pretrained(base, folder)
assert any("also_load_and_activate" in str(w.message) for w in seen), "half an adapter says nothing"
parts = json.load(open(folder + "/adapter_config.json"))["also_load_and_activate"]
for part in parts:
    model.load_adapter(folder, part, subfolder=part)
model.base_model.set_adapter(["default", *parts])
with torch.no_grad():
    print("difference", (model(want["ids"]).logits - want["logits"]).abs().max().item(), len(parts))
assert "peft_unlearn" not in sys.modules
"""


def test_plain_peft_loads_it_where_this_package_is_not_installed(made: Path, base: Path, tmp_path: Path) -> None:
    stack = ForgetModel.from_pretrained(str(base), made)
    torch.save({"ids": IDS, "logits": logits(stack.model)}, tmp_path / "want.pt")
    done = zygote.run([sys.executable, "-I", "-S", "-c", WITHOUT, str(made), str(base), str(tmp_path / "want.pt")])
    assert done.returncode == 0, done.stderr[-3000:]
    _, difference, parts = next(line for line in done.stdout.splitlines() if line.startswith("difference")).split()
    assert float(difference) == 0.0 and int(parts) >= 1
    card = (made / "README.md").read_text(encoding="utf-8")
    assert "model.load_adapter(ADAPTER, part, subfolder=part)" in card and "[&#x27;default" not in card


def test_one_folder_through_every_command(made: Path, base: Path, tmp_path: Path) -> None:
    found, plain = read_adapter(made), tiny.llama()
    assert found.config["peft_type"] == "SHIRA" and found.compact == made / "sparse"
    method = found.manifest.method["selection"]
    assert method["method"] == "random" and method["refresh"] == "never" and 0.049 < method["density"] <= 0.05
    assert verify(made, base).exit_code == 0
    stack = ForgetModel.from_pretrained(str(base), made)
    on, before = logits(stack.model), logits(plain)
    assert float((on - before).abs().max()) > 1e-3
    stack.scale("default", 0.0)
    assert torch.equal(logits(stack.model), before)
    stack.scale("default", -1.0)
    against = logits(stack.model)
    stack.scale("default", 1.0)
    assert torch.equal(logits(stack.model), on) and not torch.equal(against, on)
    with stack.disabled() as off:
        assert torch.equal(logits(off), before)
    for in_memory in (False, True):
        out = tmp_path / f"merged-{in_memory}"
        report = merge(made, base, out, in_memory=in_memory)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), on)
        assert report.worst_cosine is not None and report.worst_cosine > 0.9999
    assert stack.remove().verdict == "removed" and torch.equal(logits(stack.model), before)
    with pytest.raises(UserError, match=r"is a sparse adapter \(SHIRA\), and vllm reads LoRA alone"):
        peft_unlearn.export(made, tmp_path / "served", "vllm")
    points = peft_unlearn.effect(made, base=str(base), data=str(base.parent)).points
    assert (
        len(points) == 3 and points[0].to_dict() != points[-1].to_dict()
    )  # start, one checkpoint, the finished adapter
    check_exact(found)
    assert plan(recipe(base)).trainable == pytest.approx(method["entries"], rel=0.02)


def test_scales_and_sums(made: Path, base: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "weaker", tmp_path / "other"
    shutil.copytree(made, copy)
    set_scale(copy, 0.5)
    half = ForgetModel.from_pretrained(str(base), copy)
    assert half.scales() == {"default": 0.5}
    with pytest.raises(UserError, match=r"have no factor to be multiplied.*compose"):
        bake(copy, 0.5)
    trained({**recipe(base, {"method": "magnitude", "ratio": 0.03}, scale=2.0)}, other)
    assert json.loads((other / "sparse/adapter_config.json").read_text())["scale"] == 2.0
    both = ForgetModel.from_pretrained(str(base), [copy, other], [0.5, -1.5])
    done = compose([(copy, 1.0), (other, -1.5)], tmp_path / "sum", base=base)
    assert done.entries is not None and done.rank is None and "union of the entries" in str(done)
    composed = ForgetModel.from_pretrained(str(base), done.folder.path)
    assert float((logits(composed.model) - logits(both.model)).abs().max()) <= 1e-6
    merge([copy, other], base, tmp_path / "merged", scale=[0.5, -1.5])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((logits(merged) - logits(both.model)).abs().max()) <= 1e-6
    with pytest.raises(UserError, match="the sum is zero"):
        compose([(copy, 1.0), (copy, -1.0)], tmp_path / "none", base=base)
    with pytest.raises(UserError, match="no rank to be cut to"):
        compose([(copy, 1.0), (other, 1.0)], tmp_path / "none", base=base, rank=2)


def test_with_a_lora_below_and_beside(made: Path, base: Path, tmp_path: Path) -> None:
    low = {**recipe(base), "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "up_proj"]}}
    del low["selection"]
    trained(low, tmp_path / "lora")
    with pytest.raises(UserError, match=r"is low-rank and .* sparse: their sum is neither"):
        compose([(made, 1.0), (tmp_path / "lora", 1.0)], tmp_path / "none", base=base)
    orders = [[made, tmp_path / "lora"], [tmp_path / "lora", made]]
    stacks = [ForgetModel.from_pretrained(str(base), o) for o in orders]
    together = logits(stacks[0].model)
    assert float((logits(stacks[1].model) - together).abs().max()) <= 1e-6
    merge(orders[0], base, tmp_path / "merged")
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - together).abs().max()) <= 1e-5
    alone = logits(ForgetModel.from_pretrained(str(base), made).model)
    report = stacks[1].remove("lora")
    assert report.verdict == "removed" and float((logits(stacks[1].model) - alone).abs().max()) <= 1e-6
    # trained on top of a LoRA: the selection and the training both see it
    file = tmp_path / "forget-stack.yaml"
    stackfile.add(file, tmp_path / "lora", request_id="1", reason="test")
    top = trained(recipe(base, {"method": "gradient", "ratio": 0.02}), tmp_path / "top", stack=file)
    assert top.manifest.depends_on == [read_adapter(tmp_path / "lora").adapter_id]
    assert ForgetModel.from_pretrained(str(base), [tmp_path / "lora", tmp_path / "top"]).active()


def test_the_mask_holds_and_resume_is_bitwise(base: Path, tmp_path: Path) -> None:
    """Weight decay included: what no selection chose is as it was, to the last bit."""
    spec = {"method": "gradient", "ratio": 0.02, "refresh": 2}
    whole = trained(recipe(base, spec, target_modules=["q_proj", "down_proj"]), tmp_path / "a")
    method = whole.manifest.method["selection"]
    assert method["selections"] == 2 and method["refresh"] == 2
    first = Selection.load(tmp_path / "a.work/selection.safetensors")
    assert first.count < method["entries"] < 2 * first.count  # two selections that overlap
    shutil.copytree(tmp_path / "a.work", tmp_path / "b.work")
    shutil.rmtree(tmp_path / "b.work/checkpoint-4")
    state = load_file(tmp_path / "b.work/checkpoint-2/adapter_model.safetensors")
    for name, i in first.indices.items():  # before the second selection: the first alone has moved
        values = state[f"base_model.model.{name.removesuffix('.weight')}.peft_unlearn_sparse_values"]
        assert set(values.nonzero().flatten().tolist()) <= set(i.tolist())
    again = trained(recipe(base, spec, target_modules=["q_proj", "down_proj"]), tmp_path / "b", resume=True)
    assert again.adapter_id == whole.adapter_id
    with pytest.raises(UserError, match=r"chosen anew while it trained \(selection.refresh\), and effects"):
        peft_unlearn.effect(tmp_path / "a", base=str(base), data=str(base.parent))
    for file in sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.safetensors")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    with pytest.raises(UserError, match="its ratio is not what the recipe says now"):
        trained(
            recipe(base, {**spec, "ratio": 0.03}, target_modules=["q_proj", "down_proj"]), tmp_path / "b", resume=True
        )


def test_a_selection_from_a_file(base: Path, made: Path, tmp_path: Path) -> None:
    file = made.parent / "sparse.work/selection.safetensors"
    again = trained(recipe(base, {"file": str(file)}), tmp_path / "out")
    assert again.adapter_id == read_adapter(made).adapter_id
    assert (
        again.recipe["selection"]["file"].startswith("sha256:")
        and str(file) not in (tmp_path / "out/recipe.yaml").read_text()
    )
    with pytest.raises(UserError, match="by a hash alone"):
        trained({**recipe(base), "selection": again.recipe["selection"]}, tmp_path / "none")
    tiny.llama(seed=5).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    for wrong, words in ((recipe(tmp_path / "other", {"file": str(file)}), "the base has the digest"),
                         (recipe(base, {"file": str(tmp_path / "no")}), "cannot be read as a selection")):  # fmt: skip
        wrong["data"] = recipe(base)["data"]
        with pytest.raises(UserError, match=words):
            trained(wrong, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("selection", "adapter", "words"),
    [
        ({"method": "wagle", "ratio": 0}, {}, r"ratio 0 must lie in \(0, 1\]"),
        ({"method": "wagle", "ratio": 1.5}, {}, r"ratio 1.5 must lie in \(0, 1\]"),
        ({"method": "wagel", "ratio": 0.1}, {}, "Did you mean 'wagle'"),
        ({"method": "random", "ratio": 0.1, "gama": 1}, {}, "gama"),
        ({"ratio": 0.1}, {}, "name a method"),
        ({"file": "x", "method": "random", "ratio": 0.1}, {}, "are two selections"),
        ({"file": "x", "refresh": 2}, {}, "a refresh chooses anew"),
        ({"method": "random", "ratio": 0.1, "refresh": 0}, {}, "refresh must be never, epoch or a number of steps, not 0"),
        ({"method": "random", "ratio": 0.1, "budget": "all"}, {}, "budget must be one of|budget must be"),
        ("wagle", {}, "needs a selection, e.g. .*, not 'wagle'"),
        ({"method": "random", "ratio": 0.1}, {"r": 4}, "sparse has no 'r'"),
        ({"method": "random", "ratio": 0.1}, {"scale": 0}, "scale must be a number that is not 0"),
        ({"method": "random", "ratio": 0.1}, {"negate": 1.0}, "negate works on LoRA"),
    ],
)  # fmt: skip
def test_recipes_that_are_refused_before_anything_is_loaded(
    selection: Any, adapter: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        trained({**recipe(tmp_path / "nothing", selection, **adapter)}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_recipes_that_the_base_refuses(base: Path, tmp_path: Path) -> None:
    for selection, adapter, words in (
        ({"method": "random", "ratio": 0.1}, {"target_modules": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"method": "random", "ratio": 1e-6}, {}, "less than one"),
    ):
        with pytest.raises(UserError, match=words):
            trained(recipe(base, selection, **adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_folders(made: Path, base: Path, tmp_path: Path) -> None:
    import hashlib

    def broken(words: str, file: str, change: Any) -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made, folder)
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        manifest = json.loads((folder / "forget.json").read_text(encoding="utf-8"))
        manifest["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        (folder / "forget.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(UserError, match=words):
            ForgetModel.from_pretrained(str(base), folder)

    compact, part = "sparse/adapter_model.safetensors", f"{next(made.glob('shira_r*')).name}/adapter_model.safetensors"

    def shifted(kind: str) -> Any:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = next(n for n in sorted(tensors) if n.endswith(kind))
            tensors[name].view(-1)[-1] += 10**6 if "indices" in kind else 1

        return change

    broken("are not rising numbers below", compact, shifted("indices"))
    broken("hold two different adapters", compact, shifted("values"))
    broken("hold two different adapters", part, shifted("shira_weight"))
    # without the compact form the parts are read, all of them, and bad positions there are no places either
    folder = tmp_path / "alone"
    shutil.copytree(made, folder)
    shutil.rmtree(folder / "sparse")
    manifest = json.loads((folder / "forget.json").read_text(encoding="utf-8"))
    manifest["files"] = {n: s for n, s in manifest["files"].items() if not n.startswith("sparse/")}
    (folder / "forget.json").write_text(json.dumps(manifest), encoding="utf-8")
    want = logits(ForgetModel.from_pretrained(str(base), made).model)
    got = ForgetModel.from_pretrained(str(base), folder)
    assert torch.equal(logits(got.model), want) and type(got.model.peft_config["default"]) is SparseConfig


# --- stock SHiRA and SUPERTUNING -----------------------------------------------------------------------------------------


def test_stock_sparse_types_are_loaded_in_the_form_whose_base_can_be_reached(base: Path, tmp_path: Path) -> None:
    for kind, options in (("shira", {"r": 1}), ("supertuning", {"sparsity": 0.97})):
        if kind.upper() not in PeftType.__members__:  # peft 0.20
            continue
        spec = recipe(base)
        del spec["selection"]
        spec["adapter"] = {"type": kind, "target_modules": ["q_proj", "up_proj"], **options}
        out = tmp_path / kind
        trained(spec, out)
        stack = ForgetModel.from_pretrained(str(base), out)
        assert type(stack.model.peft_config["default"]) is SparseConfig
        plain = PeftModel.from_pretrained(tiny.llama(), str(out))
        assert float((logits(stack.model) - logits(plain)).abs().max()) <= 1e-6
        check_exact(read_adapter(out))  # it has a scale after all
        stack.scale("default", 0.0)
        assert torch.equal(logits(stack.model), logits(tiny.llama()))
        merge(out, base, tmp_path / f"{kind}-merged")
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-merged"))
        assert float((merged - logits(plain)).abs().max()) <= 1e-6


def test_what_would_see_nothing_of_the_base_is_refused(base: Path, tmp_path: Path) -> None:
    from peft_unlearn.attacks.relearn import low_rank
    from peft_unlearn.attribution.streamed import eligible

    model = get_forget_model(tiny.llama(), ShiraConfig(r=1, target_modules=["q_proj"]))
    with (
        pytest.raises(
            UserError, match="relearning with weights: lora works on the base's own layers, and PEFT's SHIRA passes by"
        ),
        low_rank(model, 2, 4.0, 0),
    ):
        pass
    with pytest.raises(UserError, match="a selection works on the base's own layers"):
        eligible(model)
    args = UnlearnConfig(
        output_dir=str(tmp_path / "out"), terms={"forget": {"npo": {}}, "retain": {"nll": {}}}, max_steps=1, use_cpu=True,
        smoothing={"sam": {"space": "base"}}, disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    data = {"forget": tiny.rows(4, "f", 1), "retain": tiny.rows(4, "r", 2)}
    with pytest.raises(UserError, match=r"smoothing in space base .* adapter\.type sparse"):
        UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer()).train()
    # the sparse adapter does not pass them by
    chosen = Selection(
        {"model.layers.0.self_attn.q_proj.weight": torch.arange(9)},
        {"model.layers.0.self_attn.q_proj.weight": (32, 32)},
    )
    model = get_forget_model(tiny.llama(), SparseConfig(selection=chosen, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    trainer = UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer())
    plain = UnlearnConfig(**{**vars_of(args), "smoothing": None})
    other = get_forget_model(tiny.llama(), SparseConfig(selection=chosen, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    without = UnlearnTrainer(other, plain, data=data, processing_class=tiny.tokenizer())
    trainer.train(), without.train()
    a, b = (entries_of(t.bare)["model.layers.0.self_attn.q_proj.weight"].values for t in (trainer, without))
    assert bool(a.any()) and not torch.equal(a, b)


def vars_of(args: UnlearnConfig) -> dict[str, Any]:
    names = (
        "output_dir",
        "terms",
        "max_steps",
        "use_cpu",
        "disable_tqdm",
        "save_strategy",
        "per_device_train_batch_size",
    )
    return {n: getattr(args, n) for n in names}


@pytest.mark.parametrize("kind", ["sparse", "shira"])
def test_positions_are_part_of_what_a_run_is_known_by(kind: str) -> None:
    def below(first: int) -> Any:
        name = "model.layers.0.self_attn.q_proj.weight"
        if kind == "sparse":
            chosen = Selection({name: torch.arange(first, first + 64)}, {name: (32, 32)})
            model: Any = get_peft_model(tiny.llama(), SparseConfig(selection=chosen), "low")
        else:
            config = ShiraConfig(r=1, target_modules=["layers.0.self_attn.q_proj"], random_seed=first)
            model = get_peft_model(tiny.llama(), config, "low")
        return get_forget_model(model, None, adapter_name="top") if kind == "sparse" else model

    a, b, again = below(0), below(1), below(0)
    assert stack_digest(a, "top") != stack_digest(b, "top") and stack_digest(a, "top") == stack_digest(again, "top")
    assert model_digest(a, "top") != model_digest(b, "top")


# --- experts, two processes ----------------------------------------------------------------------------------------------


def test_entries_of_experts_load_with_this_package_alone(tmp_path: Path) -> None:
    """SHiRA knows linear layers alone: the compact form lies on top, and says so in its card."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tuners"))
    import families as f

    base = tmp_path / "base"
    plain = f.base("olmoe", "grouped_mm", vocab_size=320, max_position_embeddings=128)
    plain.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    for name, seed in (("forget", 1), ("retain", 2)):
        text = "\n".join(json.dumps(r) for r in tiny.rows(6, name[0], seed))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    spec = recipe(base, {"method": "snip", "ratio": 0.02}, target_modules=["experts.gate_up_proj", "experts.down_proj"])
    found = trained(spec, tmp_path / "out")
    assert found.config["peft_type"] == "PEFT_UNLEARN_SPARSE" and found.compact is None
    assert "import peft_unlearn" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    stack = ForgetModel.from_pretrained(str(base), tmp_path / "out")
    on = logits(stack.model)
    assert float((on - logits(plain)).abs().max()) > 1e-4
    merge(tmp_path / "out", base, tmp_path / "merged")
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - on).abs().max()) <= 2e-6
    assert stack.remove().verdict == "removed"


_RANK = """
import os, sys
sys.path[:0] = {paths!r}
import torch
import test_sparse_recipe as t
from pathlib import Path
rank = int(os.environ["RANK"])
base = Path({base!r})
spec = t.recipe(base, {{"method": "gradient", "ratio": 0.02, "refresh": 2}})
spec["train"]["per_device_train_batch_size"] = 2
t.trained(spec, Path({out!r}) / "two")
"""


@pytest.mark.slow
def test_two_gloo_processes_equal_one(base: Path, tmp_path: Path) -> None:
    here = Path(__file__).resolve()
    script = tmp_path / "rank.py"
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    script.write_text(_RANK.format(paths=paths, base=str(base), out=str(tmp_path)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    spec = recipe(base, {"method": "gradient", "ratio": 0.02, "refresh": 2})
    spec["train"]["per_device_train_batch_size"] = 4
    one = trained(spec, tmp_path / "one")
    assert read_adapter(tmp_path / "two").manifest.effective_batch["processes"] == 2
    a, b = (load_file(tmp_path / n / "sparse/adapter_model.safetensors") for n in ("one", "two"))
    assert one.manifest.method["selection"]["selections"] == 2 and a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]) if name.endswith("indices") else float((t - b[name]).abs().max()) <= 1e-6
