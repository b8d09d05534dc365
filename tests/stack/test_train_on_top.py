"""A new adapter on top of frozen active ones: they do not move, it says what it stands on, and never stands elsewhere."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stacks import expert, lora, save_moe
from tinyfolder import logits
from transformers import TrainerCallback

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.stack.below import read_below
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.stack.stackfile import add, revoke
from peft_unlearn.training.reference import stack_digest
from peft_unlearn.training.train import train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


def first_of(base: Path, out: Path, seed: int = 1, **more: Any) -> Any:
    made = lora(out, base, seed, **more)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # `stacks` writes another base's
        (out / name).write_bytes((base / name).read_bytes())
    from stacks import edit

    edit(out, "forget.json", lambda m: m["files"].update(dict.fromkeys(("tokenizer.json", "tokenizer_config.json"))))
    return made


ROWS: dict[str, str] = {}


def recipe(base: Path, **more: Any) -> dict[str, Any]:
    return {
        "base": str(base),
        "data": {"forget": ROWS["f"], "retain": ROWS["r"]},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "down_proj"]},
        "terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.05, "use_cpu": True, "save_strategy": "no"},
        "seed": 3,
        **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def rows(tmp_path: Path) -> None:
    import json

    for tag, seed in (("f", 1), ("r", 2)):
        path = tmp_path / f"{tag}.jsonl"
        path.write_text("\n".join(json.dumps(r) for r in tiny.rows(4, tag, seed)), encoding="utf-8")
        ROWS[tag] = str(path)


def quiet(_: str) -> None:
    pass


class Watch(TrainerCallback):
    """What every parameter was after each step, and what was logged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []
        self.model: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_frozen_below_and_written_down(base: Path, tmp_path: Path) -> None:
    below = first_of(base, tmp_path / "first", scale=0.5)
    watch = Watch()
    made = train(recipe(base, stack=[str(tmp_path / "first")]), tmp_path / "second", progress=quiet, callbacks=[watch])
    assert made is not None and made.manifest.depends_on == [below.adapter_id]
    assert made.manifest.targets == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert made.recipe["stack"] == [{"adapter": below.adapter_id, "scale": 0.5}]
    assert made.manifest.method["stack"] == [{"id": below.adapter_id, "scale": 0.5}]
    assert str(tmp_path) not in (tmp_path / "second" / "recipe.yaml").read_text()
    start, end = watch.seen[0], watch.seen[-1]
    assert any("lora_B.below" in n for n in start)
    for n in start:
        moved = not torch.equal(start[n], end[n])
        assert moved == (".default." in n and "lora_" in n), n
    from safetensors.torch import load_file

    file = load_file(tmp_path / "first" / "adapter_model.safetensors")
    for n, t in file.items():
        assert torch.equal(end[n.replace(".weight", ".below.weight")], t)
    # With what it stands on, it is what was trained; the dependency runs at its own manifest's scale.
    both = ForgetModel.from_pretrained(base, {"first": tmp_path / "first", "second": tmp_path / "second"})
    assert both.scales() == {"first": 0.5, "second": 1.0} and both.chain("second") == ["first", "second"]
    watch.model.eval()
    assert torch.allclose(logits(both.model), logits(watch.model), atol=1e-6)


def test_loaded_without_its_dependency(base: Path, tmp_path: Path) -> None:
    first_of(base, tmp_path / "first")
    train(recipe(base, stack=[str(tmp_path / "first")]), tmp_path / "second", progress=quiet)
    with pytest.raises(UserError, match=r"was trained on top of 1 adapter\(s\) that are not below it"):
        ForgetModel.from_pretrained(base, tmp_path / "second")
    with pytest.raises(UserError, match="first is given after it"):
        ForgetModel.from_pretrained(base, [tmp_path / "second", tmp_path / "first"])
    with pytest.warns(UserWarning, match="trained over first at scale 1, and first now runs at 0.3"):
        ForgetModel.from_pretrained(base, [tmp_path / "first", tmp_path / "second"], scales=[0.3, 1])


def test_the_reference_is_the_stack(base: Path, tmp_path: Path) -> None:
    """At the first step the policy is the reference: NPO's loss is exactly that of a ratio of one."""
    first_of(base, tmp_path / "first", lora_alpha=40)
    spec = recipe(base, stack=[str(tmp_path / "first")])
    spec["train"] = {**spec["train"], "max_steps": 1, "logging_steps": 1}
    for reference in ("before", "base"):
        watch = Watch()
        train({**spec, "reference": reference}, tmp_path / reference, progress=quiet, callbacks=[watch])
        loss = next(v for log in watch.logs for k, v in log.items() if k.endswith("forget"))
        neutral = 2 / 0.5 * math.log(2)
        assert (abs(loss - neutral) < 1e-4) == (reference == "before")


def test_from_a_stack_file(base: Path, tmp_path: Path) -> None:
    a = first_of(base, tmp_path / "a", 1)
    b = first_of(base, tmp_path / "b", 2)
    file = tmp_path / "s.yaml"
    for name in "ab":
        add(file, tmp_path / name, request_id=name, reason="r", scale=0.5)
    made = train(recipe(base), tmp_path / "all", stack=file, progress=quiet)
    assert made is not None and made.manifest.depends_on == [a.adapter_id, b.adapter_id]
    # The recipe that was saved runs again: it names the adapters by id, and the file has them.
    again = train(
        {**made.recipe, **{k: recipe(base)[k] for k in ("base", "data")}},
        tmp_path / "again",
        stack=file,
        progress=quiet,
    )
    assert again is not None and again.adapter_id == made.adapter_id
    with pytest.raises(UserError, match="--stack FILE"):
        train({**made.recipe, **{k: recipe(base)[k] for k in ("base", "data")}}, tmp_path / "no", progress=quiet)
    add(file, tmp_path / "all", request_id="c", reason="r")
    with pytest.raises(UserError, match="all was trained on top of a"):
        revoke(file, "a")
    revoke(file, "a", cascade=True)
    with pytest.raises(UserError, match="has no active adapter"):
        train(
            {**made.recipe, **{k: recipe(base)[k] for k in ("base", "data")}},
            tmp_path / "no",
            stack=file,
            progress=quiet,
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("top", ["lora", "expert"])
def test_of_another_kind(tmp_path: Path, top: str) -> None:
    base = save_moe(tmp_path / "moe")
    expert(tmp_path / "e", base, 1, {1: [0, 3]})
    lora(tmp_path / "l", base, 2, ("q_proj",))
    below, adapter = (
        ("e", {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]})
        if top == "lora"
        else ("l", {"type": "expert_lora", "r": 2, "experts": {"0": [0, 1, 2, 3, 4, 5, 6, 7]}})
    )
    made = train(recipe(base, stack=[str(tmp_path / below)], adapter=adapter), tmp_path / "top", progress=quiet)
    assert made is not None and len(made.manifest.depends_on) == 1
    assert all(("self_attn" in t) == (top == "lora") for t in made.manifest.targets)
    both = ForgetModel.from_pretrained(base, [tmp_path / below, tmp_path / "top"])
    with both.disabled():
        assert torch.equal(logits(both.model), logits(load_base(base)))
    from peft_unlearn.folder.manifest import probe_difference

    probes = made.manifest.probes
    assert probes is not None and probe_difference(both.model, both.tokenizer, probes.prompts, probes.adapter) < 1e-4


def test_what_cannot_lie_below(base: Path, tmp_path: Path) -> None:
    first_of(base, tmp_path / "first")
    tiny.llama(seed=9).save_pretrained(tmp_path / "otherbase")
    tiny.tokenizer().save_pretrained(tmp_path / "otherbase")
    first_of(tmp_path / "otherbase", tmp_path / "elsewhere")
    for spec, message in (
        ("first", "stack is a list"),
        ([{"adapter": str(tmp_path / "first"), "strength": 1}], "is no adapter"),
        ([{"adapter": str(tmp_path / "first"), "scale": "much"}], "is no adapter"),
        ([str(tmp_path / "nothing")], "no such folder"),
        ([str(tmp_path / "elsewhere")], "other weights"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe(base, stack=spec), tmp_path / "no", progress=quiet)
    assert not (tmp_path / "no").exists() and not read_below(None)
    with pytest.raises(UserError, match="peft-unlearn compose"):
        train({**recipe(base), "compose": {"parts": []}}, tmp_path / "no", progress=quiet)


def test_scale_and_weights_below_are_part_of_a_run(base: Path, tmp_path: Path) -> None:
    first_of(base, tmp_path / "first")
    stack = ForgetModel.from_pretrained(base, {"first": tmp_path / "first"})
    stack.model.add_adapter("default", stack.model.peft_config["first"])
    seen = [stack_digest(stack.model, "default")]
    stack.scale("first", 0.5)
    seen.append(stack_digest(stack.model, "default"))
    next(p for n, p in stack.model.named_parameters() if "lora_B.first" in n).data.add_(1)
    seen.append(stack_digest(stack.model, "default"))
    assert len(set(seen)) == 3 and None not in seen
    assert stack_digest(tiny.lora(tiny.llama()), "default") is None


def test_saving_asks_what_lies_below(base: Path, tmp_path: Path) -> None:
    from peft_unlearn.training.adapt import get_forget_model
    from peft_unlearn.training.config import UnlearnConfig
    from peft_unlearn.training.save import save_adapter
    from peft_unlearn.training.trainer import UnlearnTrainer

    first = first_of(base, tmp_path / "first")
    model = ForgetModel.from_pretrained(base, {"first": tmp_path / "first"}).model
    model = get_forget_model(model, {"type": "lora", "r": 2, "target_modules": ["q_proj"]})
    data = {"forget": tiny.rows(4, "f", 1), "retain": tiny.rows(4, "r", 2)}
    args = UnlearnConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, use_cpu=True, learning_rate=0.05, save_strategy="no"
    )
    trainer = UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer())
    trainer.train()
    with pytest.raises(UserError, match="was trained on top of first, and depends_on names 0"):
        save_adapter(trainer, base=base)
    made = save_adapter(trainer, base=base, depends_on=[first.adapter_id])
    assert made.manifest.depends_on == [read_adapter(tmp_path / "first").adapter_id]


def test_resumed_over_another_kind_and_not_over_another_stack(tmp_path: Path) -> None:
    base = save_moe(tmp_path / "moe")
    expert(tmp_path / "e", base, 1, {1: [0, 3]})
    adapter = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    spec = recipe(base, stack=[str(tmp_path / "e")], adapter=adapter)
    spec["train"] = {**spec["train"], "save_strategy": "steps", "save_steps": 1}
    whole = train(spec, tmp_path / "top", progress=quiet)
    assert whole is not None
    shutil.rmtree(tmp_path / "top.work" / "checkpoint-2")
    resumed = train(spec, tmp_path / "top", progress=quiet, resume=True)
    assert resumed is not None and resumed.adapter_id == whole.adapter_id
    with pytest.raises(UserError, match="checkpoint of another run"):
        train(
            {**spec, "stack": [{"adapter": str(tmp_path / "e"), "scale": 0.5}]},
            tmp_path / "top",
            progress=quiet,
            resume=True,
        )


def test_a_full_disk_is_a_sentence(base: Path, tmp_path: Path) -> None:
    import resource

    steps = {**recipe(base)["train"], "save_strategy": "steps", "save_steps": 1}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError, match=r"new: cannot be written \(File too large\)"):
            train(recipe(base, train=steps), tmp_path / "new", progress=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()


def test_negation_turns_the_new_one_alone(base: Path, tmp_path: Path) -> None:
    first_of(base, tmp_path / "first")
    watch = Watch()
    spec = recipe(base, stack=[str(tmp_path / "first")])
    spec["adapter"] = {**spec["adapter"], "negate": 2.0}
    train(spec, tmp_path / "second", progress=quiet, callbacks=[watch])
    for n, p in watch.model.named_parameters():
        assert torch.equal(p, watch.seen[-1][n] * (-2 if "lora_B.default" in n else 1)), n
