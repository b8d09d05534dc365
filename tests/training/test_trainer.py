"""`UnlearnTrainer`: resume, evaluation while training, references, logs, and what it refuses."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote
from peft import LoraConfig, PeftModel, PeftType
from safetensors.torch import load_file

from peft_unlearn import registry
from peft_unlearn.data.collate import PairedRows, StreamSampler
from peft_unlearn.errors import Diverged, UserError
from peft_unlearn.evaluation.quick import ForgetAtFloor, StopOn
from peft_unlearn.forward import Pass
from peft_unlearn.training import reference
from peft_unlearn.training import trainer as trainer_module
from peft_unlearn.training.adapt import _NO, get_forget_model, peft_config
from peft_unlearn.training.checkpoints import STATE, last_checkpoint, load_adapter
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.recipe import from_recipe
from peft_unlearn.training.trainer import UnlearnTrainer

TERMS = {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}}
DATA = {"forget": tiny.rows(7, "f", seed=1), "retain": tiny.rows(9, "r", seed=2)}


def config(out: Path, **over: Any) -> UnlearnConfig:
    given = {
        "terms": TERMS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4,
        "learning_rate": 1e-2, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **over,
    }  # fmt: skip
    return UnlearnConfig(output_dir=str(out), **given)


def make(
    out: Path, model: Any = None, *, callbacks: Any = None, score: Any = None, data: Any = None, **over: Any
) -> UnlearnTrainer:
    return UnlearnTrainer(
        tiny.lora(tiny.llama()) if model is None else model, config(out, **over), data=data or DATA,
        processing_class=tiny.tokenizer(), callbacks=callbacks, score=score,
    )  # fmt: skip


def parameters(trainer: UnlearnTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_callers_config_is_left_as_it_is(tmp_path):
    given = config(tmp_path / "out", save_strategy="steps", save_steps=2)
    before = {k: repr(v) for k, v in vars(given).items()}
    runs = [UnlearnTrainer(tiny.lora(tiny.llama()), given, data=DATA, processing_class=tiny.tokenizer()) for _ in "ab"]
    for t in runs:
        t.train()
        assert (
            t.config.output_dir == given.output_dir
            and t.args.output_dir == given.work_dir == f"{tmp_path / 'out'}.work"
        )
    assert {k: repr(v) for k, v in vars(given).items() if k in before} == before
    assert not (tmp_path / "out").exists() and last_checkpoint(given.work_dir).endswith("checkpoint-4")
    assert same(parameters(runs[0]), parameters(runs[1]))


# --- the plain run ------------------------------------------------------------------------------------------------


def test_a_run_from_a_plain_model(tmp_path):
    base = tiny.llama()
    want = {n: p.clone() for n, p in base.state_dict().items()}
    trainer = UnlearnTrainer(
        base, config(tmp_path / "out", logging_steps=1), data=DATA, processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    logs = [h for h in trainer.state.log_history if "loss" in h]
    assert len(logs) == 4
    keys = {"loss/forget", "loss/retain", "grad_norm/forget", "grad_norm/retain", "cos/forget,retain", "grad_norm"}
    for entry in logs:
        assert keys <= entry.keys()
        assert entry["loss"] == pytest.approx(entry["loss/forget"] + entry["loss/retain"], rel=1e-4)
        assert -1 <= entry["cos/forget,retain"] <= 1
    assert logs[0]["loss/forget"] == pytest.approx(2 / 0.5 * 0.693147, rel=1e-4)  # NPO at its start
    with trainer.bare.disable_adapter():  # the base is bit for bit what it was
        for n, p in trainer.bare.get_base_model().state_dict().items():
            if "lora_" not in n:
                assert torch.equal(p, want[n.replace(".base_layer", "")]), n
    assert not (tmp_path / "out").exists()  # only checkpoints would be written, beside it


def test_logs_average_over_the_steps_since_the_last(tmp_path):
    each = make(tmp_path / "a", logging_steps=1)
    each.train()
    both = make(tmp_path / "b", logging_steps=2)
    both.train()
    one = [h["loss/retain"] for h in each.state.log_history if "loss/retain" in h]
    two = [h["loss/retain"] for h in both.state.log_history if "loss/retain" in h]
    assert two == pytest.approx([(one[0] + one[1]) / 2, (one[2] + one[3]) / 2])


def test_the_same_seed_gives_the_same_run(tmp_path):
    runs = []
    for k in ("a", "b"):
        t = make(tmp_path / k)
        t.train()
        runs.append(parameters(t))
    assert same(*runs)


def test_clipping_works_on_the_combined_gradient(tmp_path):
    t = make(tmp_path / "a", max_steps=1, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0)
    before = parameters(t)
    t.train()
    moved = sum(float(((p - before[n]).double() ** 2).sum()) for n, p in parameters(t).items()) ** 0.5
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_a_users_objective_from_a_closure_can_be_checkpointed(tmp_path):
    registry._load()
    source = registry.Source("none", "https://example.org", 2025)

    def local(p: Pass) -> torch.Tensor:
        """Mine."""
        return -p.logp

    registry.objective("mine_for_test", unit="token", needs=("logp",), source=source)(local)
    try:
        terms = {"forget": {"ga": {}}, "retain": {"mine_for_test": {}}}
        make(tmp_path / "out", terms=terms, save_strategy="steps", save_steps=2).train()
        assert last_checkpoint(f"{tmp_path}/out.work")
    finally:
        registry._METHODS["objective"].pop("mine_for_test")


# --- pairs --------------------------------------------------------------------------------------------------------


def test_pairs_are_a_pure_function_of_seed_epoch_row():
    sets = {"forget": [{"i": i} for i in range(7)], "retain": [{"i": i} for i in range(5)]}
    rows = PairedRows(sets, "forget", 2, seed=3)
    first = [rows[i] for i in range(60)]
    again = PairedRows(sets, "forget", 2, seed=3)
    order = list(range(60))
    random.Random(0).shuffle(order)
    shuffled = {i: again[i] for i in order}
    assert [shuffled[i] for i in range(60)] == first
    assert [PairedRows(sets, "forget", 2, seed=4)[i] for i in range(60)] != first
    for epoch in range(4):  # every anchor row once per pass, the others equally often
        part = [x["forget"][0]["i"] for x in first[7 * epoch : 7 * epoch + 7]]
        assert sorted(part) == list(range(7))
    seen = [r["i"] for x in first[:25] for r in x["retain"]]
    assert {seen.count(i) for i in range(5)} == {10}
    assert [x["forget"][0]["i"] for x in first[:7]] != [x["forget"][0]["i"] for x in first[7:14]]


def test_stream_of_epochs_is_unbroken():
    sampler = StreamSampler(11, 8)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert seen == list(range(48)) and len(sampler) == 16


def test_anchor_retain(tmp_path):
    t = make(tmp_path / "a", anchor="retain")
    assert len(t.rows) == 9 and len(t.rows[0]["forget"]) == 1
    t.train()


# --- resume -------------------------------------------------------------------------------------------------------

_CHILD = """
import sys, time
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import TrainerCallback
from test_trainer import make
out, resume, pause = Path(sys.argv[1]), sys.argv[2] == "resume", float(sys.argv[3])

class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        print("step", state.global_step, flush=True)
        time.sleep(pause)

t = make(out, callbacks=[Tell()], **{over!r})
t.train(resume_from_checkpoint=resume or None)
t.bare.save_pretrained(out)
"""
# 7 rows, 4 per step: an epoch is two steps, so a checkpoint at step 3 lies in the middle of the second one.
_LONG = {
    "max_steps": 11,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


def child(tmp_path: Path, out: Path, resume: bool = False, pause: float = 0.0) -> zygote.Process:
    here = Path(__file__).resolve()
    script = tmp_path / "child.py"
    script.write_text(_CHILD.format(paths=[*map(str, here.parents[:3])], over=_LONG))
    return zygote.start([sys.executable, str(script), str(out), "resume" if resume else "start", str(pause)])


def finish(process: zygote.Process) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out


def test_resume_after_kill_is_byte_for_byte(tmp_path):
    whole = make(tmp_path / "whole", **_LONG)
    whole.train()
    whole.bare.save_pretrained(tmp_path / "whole")
    killed = tmp_path / "killed"
    at = random.SystemRandom().choice([4, 5, 7, 8])  # strictly between two checkpoints, in a later epoch
    process = child(tmp_path, killed, pause=0.2)
    for line in process.stdout:
        if line.strip() == f"step {at}":
            process.kill()  # SIGKILL
            break
    process.communicate()
    assert process.returncode == -9
    work = Path(f"{killed}.work")
    last = at - at % 3
    assert last_checkpoint(work) == str(work / f"checkpoint-{last}"), f"killed at {at}"
    # and a checkpoint that the kill left half-written: everything but the seal, and a torn adapter
    half = work / f"checkpoint-{last + 3}"
    (work / f"checkpoint-{last}" / "trainer_state.json").read_text()
    half.mkdir()
    for f in (work / f"checkpoint-{last}").iterdir():
        if f.name != STATE:
            (half / f.name).write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    told = finish(child(tmp_path, killed, resume=True))
    assert told.split()[1] == str(last + 1), f"killed at {at}"
    a, b = (d / "adapter_model.safetensors" for d in (tmp_path / "whole", killed))
    assert a.read_bytes() == b.read_bytes(), f"killed at step {at}"


def test_resume_in_process_and_refusals(tmp_path):
    over = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "lr_scheduler_type": "constant"}
    whole = make(tmp_path / "a", **over)
    whole.train()
    again = make(tmp_path / "a", **over)
    again.train(resume_from_checkpoint=f"{tmp_path}/a.work/checkpoint-3")
    assert same(parameters(whole), parameters(again))
    (tmp_path / "a.work/checkpoint-3" / STATE).unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        make(tmp_path / "a", **over).train(resume_from_checkpoint=f"{tmp_path}/a.work/checkpoint-3")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        make(tmp_path / "nothing", **over).train(resume_from_checkpoint=True)
    for other in ({"seed": 5}, {"terms": {"forget": {"ga": {}}}}, {"gradient_accumulation_steps": 1}):
        with pytest.raises(UserError, match="another run"):
            make(tmp_path / "a", **{**over, **other}).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="another run"):
        data = {**DATA, "retain": tiny.rows(9, "x", seed=3)}
        make(tmp_path / "a", data=data, **over).train(resume_from_checkpoint=True)


_PDU = {"forget": {"ga": {}}, "retain": {"nll": {}}}


@pytest.mark.parametrize(
    "method",
    [
        {"rule": "primal_dual", "terms": _PDU}, {"rule": "gru"}, {"rule": {"pcgrad": {"scope": "layer"}}},
        {"smoothing": {"rs": {"n": 2, "sigma": 0.01}}}, {"smoothing": {"sam": {"space": "base"}}},
        {"averaging": {"wa": {"start": 2, "every": 1}}}, {"step_size": {"gen": {"every": 2}}},
    ],
    ids=str,
)  # fmt: skip
def test_state_of_rules_and_their_kin_stands_in_checkpoints(tmp_path, method):
    over = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, **method}
    whole = make(tmp_path / "a", **over)
    whole.train()
    again = make(tmp_path / "a", **over)
    again.train(resume_from_checkpoint=f"{tmp_path}/a.work/checkpoint-3")
    assert same(parameters(whole), parameters(again))


def test_a_kill_before_the_seal_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    """save_total_limit=1: the old checkpoint may go only when the new one is whole."""
    over = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 6}
    calls = []

    def dies(folder: Path, state: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(folder, state)

    real = trainer_module.write_state
    monkeypatch.setattr(trainer_module, "write_state", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", **over).train()
    assert last_checkpoint(f"{tmp_path}/a.work") == f"{tmp_path}/a.work/checkpoint-2"
    monkeypatch.undo()
    t = make(tmp_path / "a", **over)
    t.train(resume_from_checkpoint=True)
    assert [p.name for p in Path(f"{tmp_path}/a.work").glob("checkpoint-*")] == ["checkpoint-6"]
    assert t.args.save_total_limit == 1


def test_an_earlier_runs_seal_does_not_vouch_for_a_new_half_written_checkpoint(tmp_path, monkeypatch):
    over = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path / "a", **over).train()
    assert last_checkpoint(f"{tmp_path}/a.work")

    def dies(folder: Path, state: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "write_state", dies)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a", **{**over, "learning_rate": 1e-3}).train()
    assert last_checkpoint(f"{tmp_path}/a.work") is None


def stacked(name: str = "new") -> Any:
    """A frozen active adapter "default" under the one to be trained."""
    model = tiny.lora(tiny.llama(), target_modules=["q_proj"])
    return get_forget_model(model, {"r": 3, "target_modules": ["q_proj", "v_proj"]}, adapter_name=name)


@pytest.mark.parametrize("kind", ["named", "stack"])
def test_resume_and_best_checkpoint_load_the_trained_adapter(tmp_path, kind):
    """The Trainer's own loader takes the first active adapter: on a stack that is the frozen one."""

    def model() -> Any:
        torch.manual_seed(5)
        return stacked() if kind == "stack" else get_forget_model(tiny.llama(), {"r": 3}, adapter_name="new")

    over = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    whole = make(tmp_path / "a", model(), **over)
    frozen = {n: p.clone() for n, p in whole.bare.named_parameters() if not p.requires_grad}
    whole.train()
    again = make(tmp_path / "a", model(), **over)
    active = list(again.bare.base_model.active_adapters)
    again.train(resume_from_checkpoint=f"{tmp_path}/a.work/checkpoint-3")
    assert same(parameters(whole), parameters(again))
    assert list(again.bare.base_model.active_adapters) == active
    now = {n: p for n, p in again.bare.named_parameters() if not p.requires_grad}
    assert same(now, frozen)

    scores = iter([0.5, 0.1, 0.9])
    best = make(
        tmp_path / "b", model(), score=lambda m: {"forget/value_accuracy": next(scores)}, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_forget/value_accuracy",
        greater_is_better=False, save_strategy="steps", save_steps=2, max_steps=6,
    )  # fmt: skip
    best.train()
    assert best.state.best_global_step == 4
    want = load_file(tmp_path / "b.work/checkpoint-4/new/adapter_model.safetensors")
    got = {n.replace(".new", ""): p for n, p in parameters(best).items()}
    assert same(got, want)


# --- evaluation while training ------------------------------------------------------------------------------------


def scripted(forget: list[float], retain: list[float]) -> Any:
    pairs = iter(zip(forget, retain, strict=True))

    def score(model: Any) -> dict[str, float]:
        f, r = next(pairs)
        return {"forget/value_accuracy": f, "retain/value_accuracy": r}

    return score


def test_best_checkpoint_is_forget_subject_to_a_retain_floor(tmp_path):
    """Step 2 forgets best but lost the retain set; of the others step 6 is best."""
    t = make(
        tmp_path / "a", score=scripted([0.0, 0.3, 0.2, 0.4], [0.5, 0.99, 0.96, 1.0]),
        callbacks=[ForgetAtFloor({"retain/value_accuracy": 1.0, "forget/value_accuracy": 1.0}, 0.95)],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=8, load_best_model_at_end=True,
        metric_for_best_model="forget_at_floor", greater_is_better=False,
    )  # fmt: skip
    t.train()
    assert t.state.best_global_step == 6 and t.state.best_metric == pytest.approx(0.2)
    want = load_file(f"{tmp_path}/a.work/checkpoint-6/adapter_model.safetensors")
    assert same({n.replace(".default", ""): p for n, p in parameters(t).items()}, want)
    evals = [h for h in t.state.log_history if "eval_forget_at_floor" in h]
    assert [h["step"] for h in evals] == [2, 4, 6, 8] and evals[0]["eval_forget_at_floor"] > 1


def test_stop_on_a_criterion(tmp_path):
    stop = StopOn(forget_below=0.1)
    over = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
    t = make(tmp_path / "a", score=scripted([0.9, 0.05, 0.0], [1.0, 1.0, 1.0]), callbacks=[stop], **over)
    t.train()
    assert t.state.global_step == 2 and "forget value_accuracy 0.0500" in str(stop.reason)
    floor = StopOn(retain_below=0.5, patience=2)
    t = make(tmp_path / "b", score=scripted([0.9] * 4, [0.4, 0.6, 0.4, 0.4]), callbacks=[floor], **over)
    t.train()
    assert t.state.global_step == 4


def test_evaluation_leaves_the_run_as_it_was(tmp_path):
    plain = make(tmp_path / "a")
    plain.train()

    def score(model: Any) -> dict[str, float]:
        assert isinstance(model, PeftModel)
        model.eval()
        torch.randn(3)  # a score may draw
        return {"forget/probability": 0.5}

    scored = make(tmp_path / "b", score=score, eval_strategy="steps", eval_steps=1)
    scored.train()
    assert same(parameters(plain), parameters(scored))
    assert scored.evaluate() == {"eval_forget/probability": 0.5}
    with pytest.raises(UserError, match="no score"):
        make(tmp_path / "c", eval_strategy="steps", eval_steps=1)
    with pytest.raises(UserError, match="no score"):
        plain.evaluate()


# --- nothing trains silently --------------------------------------------------------------------------------------


@pytest.fixture
def shallow():
    """An objective that sees block 0 only: adapters beyond it are reached by no term."""
    registry._load()
    source = registry.Source("none", "https://example.org", 2025)

    @registry.objective("shallow_for_test", unit="position", needs=("hidden",), source=source)
    def shallow_for_test(p: Pass, *, layer: int = 0) -> torch.Tensor:
        """Squared norm of the hidden state at every unpadded position."""
        return p.hidden(layer)[p.attention_mask.bool()].pow(2).mean(1)

    yield {"forget": {"shallow_for_test": {}}}
    registry._METHODS["objective"].pop("shallow_for_test")


def test_adapters_that_no_term_reaches_are_refused_by_name(tmp_path, shallow):
    model = lambda: tiny.lora(tiny.llama(), moved=False, target_modules=["q_proj"])  # noqa: E731
    with pytest.raises(UserError, match=r"no term gives a gradient to 1 of 2 .*layers\.1\.self_attn\.q_proj"):
        make(tmp_path / "a", model(), terms=shallow).train()
    t = make(tmp_path / "a", model(), terms=shallow, allow_untrained=["layers.1."])
    t.train()
    assert t.state.global_step == 4
    with pytest.raises(UserError, match="no term gives a gradient"):
        make(tmp_path / "a", model(), terms=shallow, allow_untrained=["layers.0."]).train()


def test_nothing_moved_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"exactly as before training: .*layers\.0"):
        make(tmp_path / "a", learning_rate=0.0).train()


def test_not_finite_names_step_term_and_tensors(tmp_path):
    with pytest.raises(
        UserError, match=r"step \d+: the gradient of forget \(ga\) is not finite .* in \d+ tensors, first "
    ):
        make(tmp_path / "a", terms={"forget": {"ga": {}}}, learning_rate=1e15, max_grad_norm=0.0, max_steps=8).train()


# --- references ---------------------------------------------------------------------------------------------------


def first_reference(monkeypatch: Any, model: Any, out: Path, **over: Any) -> list[torch.Tensor]:
    """What `ref_logp` was on the first batch of a run."""
    seen: list[torch.Tensor] = []
    real = Pass.ref_logp.fget

    def spy(self: Pass) -> torch.Tensor:
        value = real(self)  # type: ignore[misc]
        seen.append(self.scatter(value))
        return value

    with monkeypatch.context() as m:
        m.setattr(Pass, "ref_logp", property(spy))
        t = make(out, model, max_steps=1, gradient_accumulation_steps=1, **over)
        t.train()
    batch = t.data_collator([t.rows[0], t.rows[1]])["forget"]
    return [seen[-1], batch]  # type: ignore[list-item]


@pytest.mark.parametrize("mode", ["before", "base", "adapter:default", "precomputed"])
def test_reference_modes(tmp_path, monkeypatch, mode):
    got, batch = first_reference(monkeypatch, stacked(), tmp_path / "a", reference=mode)
    fresh = stacked()
    fresh.eval()
    if mode == "base":
        with fresh.disable_adapter():
            want = Pass(fresh, batch).logp
    else:
        fresh.set_adapter("default")
        want = Pass(fresh, batch).logp
    want = Pass(fresh, batch).scatter(want.detach())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_reference_adapter_must_exist(tmp_path):
    with pytest.raises(UserError, match="no such adapter"):
        make(tmp_path / "a", reference="adapter:gone").train()


def test_precomputed_equals_before_and_is_cached(tmp_path, monkeypatch):
    live = make(tmp_path / "a", max_steps=3)
    live.train()
    calls = []
    real = reference.reference_values
    monkeypatch.setattr(
        reference, "reference_values", lambda model, rows, *more: calls.append(len(rows)) or real(model, rows, *more)
    )
    cached = make(tmp_path / "b", reference="precomputed", max_steps=3)
    cached.train()
    for n, p in parameters(live).items():
        torch.testing.assert_close(parameters(cached)[n], p, atol=1e-6, rtol=1e-6)
    assert calls == [7]  # the forget set once; the retain set has no need
    files = list(Path(f"{tmp_path}/b.work").glob("reference-*.safetensors"))
    assert len(files) == 1
    again = make(tmp_path / "b", reference="precomputed", max_steps=3)
    again.train()
    assert calls == [7] and same(parameters(again), parameters(cached))
    # Another base, other rows, another stack or a stack of another strength: another file.
    make(tmp_path / "b", tiny.lora(tiny.llama(seed=9)), reference="precomputed", max_steps=1).train()
    make(tmp_path / "b", stacked(), reference="precomputed", max_steps=1).train()
    stronger = stacked()
    stronger.peft_config["default"].lora_alpha *= 2
    make(tmp_path / "b", stronger, reference="precomputed", max_steps=1).train()
    assert len(calls) == 4
    # A name that other parameters share must not hide them from the key.
    for seed in (0, 9):
        make(
            tmp_path / "c",
            get_forget_model(tiny.llama(seed), {"r": 2}, adapter_name="l"),
            reference="precomputed",
            max_steps=1,
        ).train()
    assert len(calls) == 6


def test_precomputed_refuses_dropout_and_losses_that_need_more(tmp_path):
    with pytest.raises(UserError, match=r"dropout|drops"):
        make(tmp_path / "a", tiny.lora(tiny.llama(), lora_dropout=0.1), reference="precomputed").train()
    with pytest.raises(UserError, match="representation_retention need its inner layers"):
        config(
            tmp_path / "a",
            terms={"forget": {"ga": {}}, "retain": {"representation_retention": {"layer": 0}}},
            reference="precomputed",
        )


def test_precomputed_distributions_equal_a_live_reference(tmp_path, monkeypatch):
    terms = {"forget": {"npo": {}, "undial": {}}, "retain": {"kl": {}}}
    live = make(tmp_path / "a", max_steps=3, terms=terms)
    live.train()
    cached = make(tmp_path / "b", max_steps=3, terms=terms, reference="precomputed")
    runs = []
    monkeypatch.setattr(Pass, "_run", (lambda real: lambda p, r: runs.append(r) or real(p, r))(Pass._run))
    cached.train()
    for n, p in parameters(live).items():
        torch.testing.assert_close(parameters(cached)[n], p, atol=1e-6, rtol=1e-6)
    assert runs.count(True) == 2  # once a set, before the first step


def test_dropout_is_allowed_with_a_live_reference(tmp_path):
    trainer = make(tmp_path / "a", tiny.lora(tiny.llama(), lora_dropout=0.1))
    trainer.train()
    assert trainer.state.global_step > 0


# --- PEFT types ---------------------------------------------------------------------------------------------------

_SETTINGS: dict[str, dict[str, Any]] = {
    "fourierft": {"n_frequency": 50}, "vblora": {"vector_length": 8, "num_vectors": 16}, "miss": {"r": 4},
    "road": {"group_size": 8}, "shira": {"r": 2}, "c3a": {"block_size": 8}, "waveft": {"n_frequency": 32},
    "psoft": {"r": 4}, "trainable_tokens": {"token_indices": [260, 261, 262, 263, 264, 265], "target_modules": ["embed_tokens"]},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "oft": {"oft_block_size": 8}, "loha": {"r": 4}, "vera": {"r": 8},
}  # fmt: skip
_COMMON = ("loha", "lokr", "ia3", "vera", "oft", "boft", "ln_tuning", "hra", "fourierft", "miss", "trainable_tokens")
_RARE = ("beft", "frod", "pvera", "glora", "vblora", "unilora", "randlora", "road", "hira", "shira", "c3a", "waveft", "osf",
         "delora", "gralora", "tinylora", "psoft", "peanut", "supertuning", "deft")  # fmt: skip


@pytest.mark.parametrize("kind", [*_COMMON, *(pytest.param(k, marks=pytest.mark.slow) for k in _RARE)])
def test_other_peft_types_train_and_load(tmp_path, kind):
    if kind.upper() not in PeftType.__members__:
        pytest.skip("not in this PEFT")
    torch.manual_seed(0)
    model = get_forget_model(tiny.llama(), {"type": kind, **_SETTINGS.get(kind, {})})
    ids = torch.randint(3, 300, (2, 6))
    t = make(tmp_path / "a", model, max_steps=2)
    t.train()
    t.bare.eval()
    t.bare.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved").eval()
    with torch.no_grad():
        got, base = t.bare(input_ids=ids).logits, tiny.llama()(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, got, atol=1e-6, rtol=1e-6)
        with t.bare.disable_adapter():
            torch.testing.assert_close(t.bare(input_ids=ids).logits, base, atol=1e-6, rtol=1e-6)
        if kind != "trainable_tokens":
            assert not torch.allclose(got, base, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(_NO))
def test_other_peft_types_are_refused_with_the_reason(kind):
    if kind not in PeftType.__members__:
        pytest.skip("not in this PEFT")
    with pytest.raises(UserError, match=r"refused: .{20}"):
        peft_config({"type": kind.lower()})


def test_every_peft_type_is_trained_or_refused():
    known = {"lora", "lily", "adamss", "prompt_tuning", *_COMMON, *_RARE, *(k.lower() for k in _NO)}
    # lily shares factors between layers (needs allow_untrained); adamss needs scikit-learn; prompt_tuning: test_input_space.py
    ours = {k for k in PeftType.__members__ if k.startswith("PEFT_UNLEARN")}
    assert {k.lower() for k in set(PeftType.__members__) - ours} <= known


# --- what is refused at the start ---------------------------------------------------------------------------------


def test_quantized_and_spread_bases_are_refused(tmp_path):
    class Quantized:
        quant_method = "bitsandbytes"

    base = tiny.llama()
    base.config.quantization_config = Quantized()
    with pytest.raises(UserError, match=r"quantized \(bitsandbytes"):
        make(tmp_path / "a", base)
    with pytest.raises(UserError, match="quantized"):
        get_forget_model(base)
    spread = tiny.llama()
    spread.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(UserError, match="several devices"):
        make(tmp_path / "a", spread)


def test_adapters_and_data_must_fit(tmp_path):
    with pytest.raises(UserError, match="pass one of them"):
        UnlearnTrainer(
            tiny.lora(tiny.llama()),
            config(tmp_path / "a"),
            data=DATA,
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(),
        )
    frozen = tiny.lora(tiny.llama())
    for p in frozen.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match="exactly one adapter must be trainable, and 0 are"):
        make(tmp_path / "a", frozen)
    two = stacked()
    for n, p in two.named_parameters():
        p.requires_grad_("lora_" in n)
    with pytest.raises(UserError, match=r"and 2 are \(default, new\)"):
        make(tmp_path / "a", two)
    with pytest.raises(UserError, match="read the retain set"):
        make(tmp_path / "a", data={"forget": DATA["forget"]})
    with pytest.raises(UserError, match=r"forget set: 7 problems\n  1. row 0 has \d+ tokens, more than max_length 8"):
        make(tmp_path / "a", max_length=8)


def test_a_refusal_writes_nothing(tmp_path):
    for wrong in ({"data": {"forget": DATA["forget"]}}, {"max_length": 8}):
        with pytest.raises(UserError):
            make(tmp_path / "a", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_rows_that_the_model_cannot_read_are_named_before_the_first_step(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2Config(
        vocab_size=320, n_positions=48, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    long = [*DATA["forget"][:3], {**DATA["forget"][3], "answer": "w1 " * 40}]
    padded, odd = tiny.tokenizer(), tiny.tokenizer()
    padded.add_special_tokens({"pad_token": "<|PAD|>"})  # as tutorials do, without resizing the model
    odd.add_tokens([" new"])
    for tokenizer, forget, message in (
        (tiny.tokenizer(), long, r"forget set: row 3 has \d+ tokens, and the model has positions for 48"),
        (padded, DATA["forget"], r"pads with token (\d+), and the model has embeddings for"),
        (odd, [{"question": "a new b?", "answer": "a new b"}], r"gives token (\d+), and the model has embeddings for"),
    ):
        gpt.vocab_size = len(tokenizer) - (tokenizer in (padded, odd))
        with pytest.raises(UserError, match=message):
            UnlearnTrainer(
                GPT2LMHeadModel(gpt), config(tmp_path), data={**DATA, "forget": forget},
                processing_class=tokenizer, peft_config=lora,
            )  # fmt: skip
    UnlearnTrainer(
        GPT2LMHeadModel(gpt), config(tmp_path, max_length=48, on_overflow="truncate"), data={**DATA, "forget": long},
        processing_class=tiny.tokenizer(), peft_config=lora,
    )  # fmt: skip


def test_a_run_that_loses_what_it_is_to_keep_is_stopped(tmp_path):
    over = {"save_strategy": "steps", "save_steps": 1, "retain_guard": 0.05, "learning_rate": 1.0, "max_steps": 50}
    t = make(tmp_path / "a", terms={"forget": {"ga": {}}, "retain": {"nll": {"weight": 0.01}}}, **over)
    with pytest.raises(
        Diverged, match=r"the loss of 'retain' rose from .*learning_rate to 0.2.*checkpoint-\d+ holds"
    ) as e:
        t.train()
    assert 3 <= t.state.global_step < 50 and str(tmp_path) in str(e.value)
    load_adapter(t.bare, t.config.work_dir + "/checkpoint-1", "default")  # whole
    make(tmp_path / "b", terms=t.config.terms, **{**over, "retain_guard": 1e9, "max_steps": 5}).train()


def test_losses_without_a_unit_of_nats_and_the_forget_loss_end_no_run(tmp_path):
    terms = {"forget": {"ga": {"weight": 100.0}}, "retain": {"representation_retention": {"layer": 0}}}
    make(tmp_path / "a", terms=terms, retain_guard=1e-9, learning_rate=1.0, max_steps=6).train()


def test_a_checkpoint_every_tenth_unless_the_recipe_says_otherwise(tmp_path):
    recipe = {"terms": {"forget": {"ga": {}}}, "train": {"max_steps": 20, "use_cpu": True}}
    c = from_recipe(recipe, str(tmp_path / "a"))
    assert (c.save_strategy, c.save_steps, c.save_total_limit) == ("steps", 0.1, 2)
    own = from_recipe({**recipe, "train": {**recipe["train"], "save_steps": 5}}, str(tmp_path / "a"))
    assert own.save_steps == 5 and own.save_total_limit is None
