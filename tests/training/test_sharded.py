"""A base that lies in parts on two or three ranks (FSDP2's fully_shard, over gloo) trains what one process trains, and rank 0 saves it.

accelerate takes no FSDP configuration on a CPU, so the model is sharded here by hand, as docs/your-model.md says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from peft_unlearn.errors import UserError
from peft_unlearn.sharing.verify import verify
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer

HERE = Path(__file__).resolve()
NPO = {"terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "npo": ("llama", NPO),
    "accumulation": ("llama", {**NPO, "gradient_accumulation_steps": 2}),
    "sam": ("llama", {**NPO, "smoothing": {"sam": {"rho": 0.01}}}),
    "rs": ("llama", {**NPO, "smoothing": {"rs": {}}}),
    "pcgrad": ("llama", {**NPO, "rule": "pcgrad"}),
    "rmu": (
        "llama",
        {"terms": {"forget": {"rmu": {"layer": 1}}, "retain": {"representation_retention": {"layer": 1}}}},
    ),
    "experts": ("olmoe", NPO),
}


def base(kind: str) -> Any:
    if kind == "llama":
        return tiny.llama()
    sys.path.insert(0, str(HERE.parents[1] / "tuners"))
    import families

    return families.base("olmoe", vocab_size=320)


def run(out: Path, name: str, ranks: int, sharded: bool) -> UnlearnTrainer:
    kind, over = RUNS[name]
    rows = 12 // ranks // over.get("gradient_accumulation_steps", 1)
    args = UnlearnConfig(
        output_dir=str(out), per_device_train_batch_size=rows, learning_rate=1e-3, max_steps=3, save_strategy="no", use_cpu=True,
        disable_tqdm=True, **over,
    )  # fmt: skip
    torch.manual_seed(3)
    spec = {"type": "expert_lora", "r": 2, "experts": {0: [0, 1]}} if kind == "olmoe" else {"r": 4}
    model = get_forget_model(base(kind), spec)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_B" in n:
                p.normal_(std=0.05)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    data = {"forget": tiny.rows(11, "f", seed=1), "retain": tiny.rows(13, "r", seed=2)}
    trainer = UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer())
    trainer.train()
    return trainer


def trained(trainer: UnlearnTrainer) -> dict[str, torch.Tensor]:
    from peft_unlearn.gradients.vector import whole

    return {k: whole(p.detach()).clone() for k, p in trainer.bare.named_parameters() if p.requires_grad}


_RANK = """
import sys, os
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_sharded import RUNS, base, run, trained
from peft_unlearn.training.save import save_adapter
out = Path({out!r})
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for name in {names!r}:
    t = run(out / "work", name, ranks, True)
    torch.save(trained(t), out / f"{{name}}-{{rank}}.pt")
    if name in ("npo", "experts"):
        folder = save_adapter(t, out / f"saved-{{name}}", base=out / f"base-{{RUNS[name][0]}}")
        (out / f"id-{{name}}-{{rank}}").write_text(folder.adapter_id)
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What one process trains."""
    place = tmp_path_factory.mktemp("one")
    return {name: trained(run(place, name, 1, False)) for name in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, list(RUNS)), (3, ["npo", "accumulation", "experts"])])
def test_ranks_with_a_sharded_base_equal_one_process(
    ranks: int, names: list[str], one: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for kind in ("llama", "olmoe"):
        base(kind).save_pretrained(tmp_path / f"base-{kind}")
        tiny.tokenizer().save_pretrained(tmp_path / f"base-{kind}")
    script = tmp_path / "rank.py"
    paths = [str(HERE.parents[i]) for i in (0, 1, 2)]
    script.write_text(_RANK.format(paths=paths, out=str(tmp_path), names=names))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0",
         "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)],
        env=env, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-20000:]
    for name in names:
        want = one[name]
        start = {k: v.abs().max() for k, v in want.items()}
        for rank in range(ranks):
            got = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert got.keys() == want.keys() and start
            assert max(float((got[k] - want[k]).abs().max()) for k in want) <= 1e-6, name
    for name in ("npo", "experts"):
        ids = {(tmp_path / f"id-{name}-{rank}").read_text() for rank in range(ranks)}
        assert len(ids) == 1
        found = verify(tmp_path / f"saved-{name}", tmp_path / f"base-{RUNS[name][0]}")
        assert found.verdict == "ok", str(found)


def test_what_would_hang_on_a_sharded_base_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_unlearn.training import trainer

    monkeypatch.setattr(trainer, "is_sharded", lambda p: True)
    args = UnlearnConfig(output_dir=str(tmp_path), save_strategy="steps", reference="precomputed", use_cpu=True)
    data = {"forget": tiny.rows(4, "f", seed=1), "retain": tiny.rows(4, "r", seed=2)}
    with pytest.raises(UserError) as e:
        UnlearnTrainer(tiny.lora(tiny.llama()), args, data=data, processing_class=tiny.tokenizer())
    assert "save_strategy" in str(e.value) and "reference: precomputed" in str(e.value)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP"])
def test_an_engine_that_accelerate_launch_brings_is_seen(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UserError, match=rf"ACCELERATE_USE_{engine} is set.*{engine.lower()}"):
        UnlearnConfig(output_dir="a", use_cpu=True)


def test_ranks_that_read_other_sets_in_a_step_are_told(tmp_path: Path) -> None:
    args = UnlearnConfig(output_dir=str(tmp_path), use_cpu=True, **NPO)
    from peft_unlearn.forward import Reference

    model = tiny.lora(tiny.llama())
    window = args.window(model, Reference("before"), reduce=lambda t: t.add_(1.0))  # the other rank has every set
    window.sharded = True
    with pytest.raises(UserError, match="some have no rows of a set that others have"):
        window._check_in_step([{"forget": {}}])
