"""Resume: from the last checkpoint on, past damaged ones, with the best one kept; the bytes of a run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_trainer import make, parameters, same, scripted
from transformers import TrainerCallback

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.quick import StopOn
from peft_unlearn.training.checkpoints import STATE, damage, last_checkpoint
from peft_unlearn.training.stopping import StopOnSignal, stoppable

# 7 rows, 4 per step: an epoch is two steps, so 3 and 7 lie in the middle of one and 8 at the end of one.
LONG = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "lr_scheduler_type": "linear"}


def finished(out: Path, **over: Any) -> Any:
    t = make(out, **{**LONG, **over})
    t.train()
    return t


@pytest.mark.parametrize("steps", [6, 7, 8, 9])
@pytest.mark.parametrize("more", [{}, {"averaging": {"wa": {"start": 2, "every": 1}}}], ids=["plain", "averaged"])
def test_resume_after_the_last_checkpoint_trains_nothing_more(tmp_path: Path, steps: int, more: dict[str, Any]) -> None:
    whole = finished(tmp_path / "a", max_steps=steps, save_steps=steps, **more)
    again = make(tmp_path / "a", **{**LONG, "max_steps": steps, "save_steps": steps, **more})
    out = again.train(resume_from_checkpoint=True)
    assert out.global_step == again.state.global_step == steps
    assert same(parameters(whole), parameters(again))


def test_resume_of_an_epoch_run_at_its_end(tmp_path: Path) -> None:
    over = {"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 1}
    whole = finished(tmp_path / "a", **over)
    again = make(tmp_path / "a", **{**LONG, **over})
    again.train(resume_from_checkpoint=True)
    assert whole.state.global_step == again.state.global_step == 3
    assert same(parameters(whole), parameters(again))


def test_a_run_that_a_judge_stopped_is_not_gone_on_with_by_resume(tmp_path: Path) -> None:
    def judged(out: Path) -> Any:
        return make(
            out, score=scripted([0.9, 0.1, 0.9, 0.9], [1.0] * 4), callbacks=[StopOn(forget_below=0.2)], eval_strategy="steps",
            eval_steps=2, **{**LONG, "save_steps": 2, "max_steps": 8},
        )  # fmt: skip

    whole = judged(tmp_path / "a")
    whole.train()
    assert whole.state.global_step == 4
    again = judged(tmp_path / "a")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and same(parameters(whole), parameters(again))


def test_a_longer_schedule_goes_on_from_the_last_checkpoint_by_resume(tmp_path: Path) -> None:
    finished(tmp_path / "a", max_steps=6, lr_scheduler_type="constant")
    again = make(tmp_path / "a", **{**LONG, "max_steps": 8, "lr_scheduler_type": "constant"})
    again.train(resume_from_checkpoint=True)
    whole = finished(tmp_path / "b", max_steps=8, lr_scheduler_type="constant")
    assert again.state.global_step == 8 and same(parameters(whole), parameters(again))


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter_model.safetensors", STATE)


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped"])
@pytest.mark.parametrize("name", FILES)
def test_resume_passes_over_a_damaged_checkpoint(done: Any, tmp_path: Path, name: str, how: str) -> None:
    whole, at = done
    shutil.copytree(at, tmp_path / "a.work")
    file = tmp_path / "a.work" / "checkpoint-6" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.unlink()
    if how != "missing":
        file.write_bytes({"truncated": raw[: len(raw) // 3], "empty": b"", "flipped": raw}[how])
    again = make(tmp_path / "a", **{**LONG, "max_steps": 7})
    with pytest.warns(UserWarning, match=f"checkpoint-6 is no whole checkpoint and is passed over: .*{name}"):
        again.train(resume_from_checkpoint=True)
    assert same(parameters(whole), parameters(again))
    with pytest.raises(UserError, match=f"checkpoint-3 is no whole checkpoint: .*{name}"):
        (tmp_path / "a.work" / "checkpoint-3" / name).unlink()
        make(tmp_path / "a", **{**LONG, "max_steps": 7}).train(
            resume_from_checkpoint=str(tmp_path / "a.work" / "checkpoint-3")
        )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 7 steps whose checkpoints lie at 3, 6 and, taken away as by a kill, 7; read only."""
    out = tmp_path_factory.mktemp("resume") / "a"
    t = finished(out, max_steps=7)
    shutil.rmtree(f"{out}.work/checkpoint-7")
    return t, f"{out}.work"


def test_resume_where_no_checkpoint_is_whole_is_refused(done: Any, tmp_path: Path) -> None:
    shutil.copytree(done[1], tmp_path / "a.work")
    for n in (3, 6):
        (tmp_path / "a.work" / f"checkpoint-{n}" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="holds no whole checkpoint to resume from"):
        make(tmp_path / "a", **{**LONG, "max_steps": 7}).train(resume_from_checkpoint=True)


def test_resume_needs_what_save_only_model_leaves_out(tmp_path: Path) -> None:
    finished(tmp_path / "a", max_steps=3, save_only_model=True)
    with pytest.warns(UserWarning, match="optimizer.pt, scheduler.pt missing .was it saved with save_only_model"):
        assert last_checkpoint(f"{tmp_path}/a.work") is None
    assert damage(tmp_path / "a.work" / "checkpoint-3") is None  # whole for all that only reads weights


def test_resume_of_a_run_that_keeps_its_best(tmp_path: Path) -> None:
    def kept(out: Path, forget: list[float]) -> Any:
        return make(
            out, score=scripted(forget, [1.0] * 4), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
            metric_for_best_model="eval_forget/value_accuracy", greater_is_better=False,
            **{**LONG, "save_steps": 2, "max_steps": 7},
        )  # fmt: skip

    whole = kept(tmp_path / "a", [0.5, 0.1, 0.9, 0.8])
    whole.train()
    assert whole.state.best_global_step == 4
    shutil.copytree(tmp_path / "a.work", tmp_path / "moved.work")  # the paths in trainer_state.json now lead elsewhere
    shutil.rmtree(tmp_path / "a.work")
    shutil.rmtree(tmp_path / "moved.work" / "checkpoint-7", ignore_errors=True)
    again = kept(tmp_path / "moved", [0.8])
    again.train(resume_from_checkpoint=True)
    assert again.state.best_global_step == 4 and same(parameters(whole), parameters(again))
    want = load_file(tmp_path / "moved.work/checkpoint-4/adapter_model.safetensors")
    assert same({n.replace(".default", ""): p for n, p in parameters(again).items()}, want)
    (tmp_path / "moved.work/checkpoint-4/adapter_model.safetensors").unlink()
    with pytest.warns(UserWarning, match="the best checkpoint of the run so far, checkpoint-4, is not whole"):
        assert last_checkpoint(tmp_path / "moved.work") == str(tmp_path / "moved.work/checkpoint-2")


def test_resume_takes_checkpoints_without_hashes_by_presence(done: Any, tmp_path: Path) -> None:
    import torch

    place = tmp_path / "a.work" / "checkpoint-6"
    shutil.copytree(done[1], tmp_path / "a.work")
    state = torch.load(place / STATE, weights_only=True)
    del state["files"]
    torch.save(state, place / STATE)
    assert last_checkpoint(tmp_path / "a.work") == str(place)
    (place / "scheduler.pt").unlink()
    with pytest.warns(UserWarning, match="scheduler.pt missing"):
        assert last_checkpoint(tmp_path / "a.work") == str(place.with_name("checkpoint-3"))
    assert json.loads((place / "trainer_state.json").read_text())["global_step"] == 6


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_resume_takes_damaged_reference_values_anew(tmp_path: Path, how: str) -> None:
    over = {"reference": "precomputed", "max_steps": 2}
    whole = finished(tmp_path / "a", **over)
    (cache,) = (tmp_path / "a.work").glob("reference-*.safetensors")
    good = cache.read_bytes()
    bad = bytearray(good)
    bad[-2] ^= 1
    cache.write_bytes(bad if how == "flipped" else good[:-3])
    assert same(parameters(whole), parameters(finished(tmp_path / "a", **over)))
    assert cache.read_bytes() == good


def test_a_signal_ends_a_run_with_a_checkpoint_and_resume_goes_on(tmp_path: Path) -> None:
    class Send(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    over = {**LONG, "save_steps": 100, "max_steps": 6}
    handler, stop = signal.getsignal(signal.SIGTERM), StopOnSignal()
    first = make(tmp_path / "a", callbacks=[Send(), stop], **over)
    with stoppable(stop):
        first.train()
    assert stop.asked and first.state.global_step == 3 and signal.getsignal(signal.SIGTERM) is handler
    again = make(tmp_path / "a", **over)
    again.train(resume_from_checkpoint=True)
    whole = make(tmp_path / "b", **over)
    whole.train()
    assert again.state.global_step == 6 and same(parameters(whole), parameters(again))
