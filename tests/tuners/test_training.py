"""Expert adapters in `UnlearnTrainer`: the window contract, the reference, checkpoints and two processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families as f
import pytest
import tiny
import torch
from peft import PeftModel

from peft_unlearn.errors import UserError
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer
from peft_unlearn.tuners.peft_type import PREFIX

TERMS = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {"weight": 1.0}}}


def base(family: str = "olmoe") -> Any:
    return f.base(family, "grouped_mm", vocab_size=320, max_position_embeddings=128)


def run(out: Path, batch: int, accumulation: int, *, router: str = "full", resume: Any = None, **over: Any) -> Any:
    """The trainer after a few steps of NPO and NLL."""
    args = UnlearnConfig(
        output_dir=str(out), terms=TERMS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        **{"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
           "optim": "sgd", **over},
    )  # fmt: skip
    model = f.adapted(base(), experts={1: [2, 5], 2: list(range(8))}, train_router=router)
    data = {"forget": tiny.rows(11, "f", seed=1), "retain": tiny.rows(13, "r", seed=2)}
    trainer = UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in trainer.bare.named_parameters() if p.requires_grad}


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(run(tmp_path_factory.mktemp("whole") / "a", 8, 1))


def test_steps_move_the_adapter_alone(tmp_path, whole):
    trainer = run(tmp_path / "a", 8, 1)
    assert worst(trained(trainer), whole) == 0  # the same again, bit for bit
    model = trainer.bare
    start = f.adapted(base(), experts={1: [2, 5], 2: list(range(8))}, train_router="full")
    moved = {n for (n, a), b in zip(start.named_parameters(), model.parameters(), strict=True) if not torch.equal(a, b)}
    assert moved == set(whole) and all(PREFIX in n for n in moved)
    with model.disable_adapter():
        assert torch.equal(f.logits(model.eval()), f.logits(base()))


def test_reference_is_the_adapter_off():
    model, plain = f.adapted(base(), train_router="full"), base()
    batch = {**f.batch(), "attention_mask": torch.ones(3, 12, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    p = Pass(model, batch, reference=Reference("base"))
    want = plain(**f.batch()).logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:, None])[p.mask][:, 0]
    assert f.error(p.ref_logp, want) <= 5e-6
    assert f.error(p.logp, want) > 0.01


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
def test_accumulation_equals_one_batch(tmp_path, whole, batch, accumulation):
    assert worst(trained(run(tmp_path / "b", batch, accumulation)), whole) <= 1e-6


def test_checkpointed_steps_are_the_same(tmp_path, whole):
    over = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert worst(trained(run(tmp_path / "b", 8, 1, **over)), whole) <= 1e-6


def test_resume_from_a_checkpoint(tmp_path):
    over = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    straight = run(tmp_path / "a", 4, 2, **over)
    checkpoint = next((tmp_path).rglob("checkpoint-2"))
    kept = json.loads((checkpoint / "adapter_config.json").read_text())
    assert kept["peft_type"] == "PEFT_UNLEARN_EXPERT_LORA" and kept["num_experts"] == {"1": 8, "2": 8}
    again = run(tmp_path / "b", 4, 2, resume=str(checkpoint), **over)
    assert again.state.global_step == 4
    assert worst(trained(again), trained(straight)) == 0
    alone = PeftModel.from_pretrained(base(), str(next(tmp_path.rglob("a*/checkpoint-4"))))
    assert f.error(f.logits(alone), f.logits(straight.bare.eval())) <= 2e-6


def test_recipes_and_refusals():
    """`get_forget_model` takes the method by its PEFT name, and its errors arrive as the user's."""
    spec = {"type": "peft_unlearn_expert_lora", "experts": {1: [2]}, "r": 4}
    model = get_forget_model(base(), spec)
    assert model.base_model.targeted_module_names == ["model.layers.1.mlp.experts"]
    with pytest.raises(UserError, match="layer 7 has no experts"):
        get_forget_model(base(), {**spec, "experts": {7: [2]}})
    with pytest.raises(UserError, match=r"has no 'expert'. Did you mean 'experts'"):
        get_forget_model(base(), {"type": "peft_unlearn_expert_lora", "expert": {1: [2]}})
    stacked = get_forget_model(copy.deepcopy(model), {**spec, "experts": {1: [2], 2: [3]}}, adapter_name="second")
    names = [n for n, p in stacked.named_parameters() if p.requires_grad]
    assert len(names) == 8 and all(n.endswith(".second") for n in names)


_RANK = """
import sys, json, os
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_training import run, trained
out = Path({out!r})
got = trained(run(out / "work", 2, 2))
rank = int(os.environ["RANK"])
torch.save(got, out / f"rank{{rank}}.pt")
(out / f"world{{rank}}.json").write_text(json.dumps(torch.distributed.get_world_size()))
"""


def test_two_gloo_processes_equal_one(tmp_path, whole):
    here = Path(__file__).resolve()
    script = tmp_path / "rank.py"
    script.write_text(_RANK.format(paths=[str(here.parents[i]) for i in (0, 1, 2)], out=str(tmp_path)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "world0.json").read_text()) == 2
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert worst(ranks[0], ranks[1]) == 0.0
    assert worst(ranks[0], whole) <= 1e-6
