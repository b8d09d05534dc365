"""The automatic learning rate: the fit, its safeguards, a probe that leaves no trace, and its life inside the Trainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from peft_unlearn import registry
from peft_unlearn.errors import UserError
from peft_unlearn.gradients.step_size import fit, peeked_update
from peft_unlearn.gradients.vector import Space
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer


def gen(loss: Any, eta: float, **hyper: Any) -> float:
    method = registry.get("step_size", "gen")
    assert not method.check(hyper)
    return method.fn(loss, eta, **{**method.resolve(hyper), "probes": hyper.get("probes") or (-1.0, 0.0, 1.0)})


def parabola(a: float, b: float, c: float = 5.0) -> Any:
    return lambda x: c - b * x + 0.5 * a * x * x


def test_fit_recovers_a_parabola():
    for a, b in ((6.0, 1.2), (-2.0, 0.3), (1e4, 3.0)):
        for scale in (1e-5, 0.1):
            xs = [m * scale for m in (-1.0, 0.0, 1.0, 2.0)]
            got = fit(xs, [parabola(a, b)(x) for x in xs])
            assert got[1] == pytest.approx(b, rel=1e-5) and got[2] == pytest.approx(1.0)
            assert got[0] == pytest.approx(a, rel=1e-3 if scale == 0.1 or a > 1e3 else 1.0)  # 5 + 1e-10 a: rounding


def test_published_safeguards():
    quadratic = parabola(6.0, 1.2)  # minimum at 0.2
    assert gen(quadratic, 0.1, smooth=0.0) == pytest.approx(0.2)
    assert gen(quadratic, 0.1) == pytest.approx(0.9 * 0.1 + 0.1 * 0.2)
    assert gen(quadratic, 0.01, smooth=0.0) == pytest.approx(0.02)  # at most twice
    assert gen(quadratic, 0.9, smooth=0.0) == pytest.approx(0.45)  # at least half
    assert gen(quadratic, 0.01, smooth=0.0, max_ratio=100.0) == pytest.approx(0.2)
    assert gen(parabola(-6.0, 1.2), 0.1) == 0.1  # T6: concave
    assert gen(parabola(6.0, -1.2), 0.1) == 0.1  # the minimum lies behind
    assert gen(parabola(0.0, 1.2), 0.1) == 0.1 or gen(parabola(0.0, 1.2), 0.1) == pytest.approx(
        0.11
    )  # straight: a is rounding
    assert gen(lambda x: 5.0, 0.1) == 0.1  # flat
    for bad in (math.inf, math.nan):
        assert gen(lambda x, bad=bad: bad if x > 0 else 1.0, 0.1) == 0.05
    wiggly = lambda x: 5 - 1.2 * x + 3 * x * x + 0.1 * math.sin(40 * x)  # noqa: E731
    assert gen(wiggly, 0.1, probes=(-2.0, -1.0, 0.0, 1.0, 2.0)) == 0.1  # R^2 below 0.99
    assert gen(wiggly, 0.1, probes=(-2.0, -1.0, 0.0, 1.0, 2.0), min_r2=0.0) != 0.1


def test_smoothing_converges_to_the_minimum():
    eta = 1e-3
    for _ in range(200):
        eta = gen(parabola(6.0, 1.2), eta)
    assert eta == pytest.approx(0.2, rel=1e-3)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}


def frozen(optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def identical(a: Any, b: Any) -> bool:
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_peek_leaves_no_trace(name, steps):
    """T5: parameters and optimizer state bit for bit; and it tells exactly what the next step does."""
    torch.manual_seed(0)
    named = [(f"p{i}", nn.Parameter(torch.randn(s))) for i, s in enumerate([(4, 3), (5,)])]
    space = Space(named)
    optimizer = OPTIMIZERS[name](space.params)

    def gradients() -> None:
        for p in space.params:
            p.grad = torch.randn_like(p)

    for _ in range(steps):
        gradients()
        optimizer.step()
    gradients()
    theta, grads, state = space.read(), [p.grad.clone() for p in space.params], frozen(optimizer)
    with peeked_update(optimizer, space) as u:
        with space.shifted(u * -0.3):
            pass
        assert all(torch.equal(p, t) for p, t in zip(space.params, theta.tensors, strict=True))
    assert all(torch.equal(p, t) for p, t in zip(space.params, theta.tensors, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(space.params, grads, strict=True))
    assert identical(frozen(optimizer), state) and list(optimizer.state) == ([] if not steps else list(optimizer.state))
    optimizer.step()
    want = theta + u * -1e-2
    for p, t in zip(space.params, want.tensors, strict=True):
        torch.testing.assert_close(p.detach(), t, atol=1e-6, rtol=1e-6)


def test_a_failing_optimizer_leaves_no_trace_either():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)

    def broken(*a: Any, step: Any = optimizer.step, **k: Any) -> None:
        step()
        raise KeyboardInterrupt

    optimizer.step = broken  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), peeked_update(optimizer, Space([("p", p)])):
        pass
    assert torch.equal(p.detach(), torch.ones(3)) and not optimizer.state


# --- inside the Trainer -------------------------------------------------------------------------------------------------


def trainer(out: Path, terms: Any = None, **over: Any) -> UnlearnTrainer:
    args = UnlearnConfig(
        output_dir=str(out), terms=terms or {"forget": {"ga": {}}, "retain": {"nll": {}}},
        **{"rule": "ngdiff", "step_size": {"gen": {"every": 2}}, "learning_rate": 1e-2, "max_steps": 10, "logging_steps": 1,
           "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **over},
    )  # fmt: skip
    data = {"forget": tiny.rows(4, "f", seed=1), "retain": tiny.rows(5, "r", seed=2)}
    return UnlearnTrainer(tiny.lora(tiny.llama()), args, data=data, processing_class=tiny.tokenizer())


def rates(t: UnlearnTrainer) -> list[float]:
    return [x["learning_rate"] for x in t.state.log_history if "learning_rate" in x]


def test_the_rate_changes_at_its_steps_and_stays(tmp_path):
    t = trainer(tmp_path / "a")
    t.train()
    got = rates(t)
    assert len(got) == 10 and all(got[i] == got[i + 1] for i in range(0, 10, 2)) and len(set(got)) > 2
    assert t.lr_scheduler.base_lrs == [got[-1]] * len(t.lr_scheduler.base_lrs)
    assert {g["lr"] for g in t.optimizer.param_groups} == {got[-1]}


@pytest.mark.parametrize(("optim", "lr"), [("adamw_torch", 1e-2), ("sgd", 1.0)])
def test_it_outlives_a_resume(tmp_path, optim, lr):
    """Between two refreshes the rate of the checkpoint goes on; the whole run is the interrupted one, byte for byte."""
    whole = trainer(tmp_path / "a", optim=optim, learning_rate=lr, save_strategy="steps", save_steps=7)
    whole.train()
    again = trainer(tmp_path / "b", optim=optim, learning_rate=lr)
    again.train(resume_from_checkpoint=str(tmp_path / "a.work" / "checkpoint-7"))
    assert rates(again)[-3:] == rates(whole)[-3:] and rates(whole)[-4] != lr
    for (n, a), b in zip(whole.bare.named_parameters(), again.bare.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_probes_do_not_touch_the_run(tmp_path, monkeypatch):
    """With the rate held, training with and without probes is bit for bit the same."""
    plain = trainer(tmp_path / "a", step_size=None)
    plain.train()
    probed = trainer(tmp_path / "b", step_size={"gen": {"every": 1, "smooth": 1.0}})
    probed.train()
    for (n, a), b in zip(plain.bare.named_parameters(), probed.bare.parameters(), strict=True):
        assert torch.equal(a, b), n


def test_configuration():
    ok = {"step_size": "gen", "terms": {"forget": {"ga": {}}, "retain": {"nll": {}}}, "use_cpu": True}
    UnlearnConfig(**ok)
    for wrong, match in (
        ({"lr_scheduler_type": "linear"}, "constant"),
        ({"warmup_steps": 3}, "constant"),
        ({"terms": {"forget": {"ga": {}}}}, "retain"),
        ({"step_size": "gne"}, "gen"),
        ({"step_size": {"gen": {"max_ratio": 1.0}}}, r"\(1, inf\)"),
        ({"step_size": {"gen": {"every": 0}}}, r"\[1, inf\)"),
    ):
        with pytest.raises(UserError, match=match):
            UnlearnConfig(**{**ok, **wrong})
