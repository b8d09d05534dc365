"""One table drives every method through the Trainer: it trains, resumes, accumulates, runs in bf16 and on two processes.

A new method needs its source file and one row here.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote

from peft_unlearn import registry
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import collate
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.gradients.window import Window
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer

# The routers' terms need a mixture of experts and are tested with it.
KINDS = ("objective", "rule", "smoothing", "averaging", "step_size")


@dataclass(frozen=True)
class Row:
    """A configuration, and what its first steps have to do.

    judge: "value" = the forget loss itself falls; "logp" = the log-likelihood of the targets falls, for losses with a weight or target that
        is held constant, so that their value may go either way; "moved" = nothing more than that.
    moved: start from a seeded non-zero lora_B (the gradient at the reference is zero).
    noise: relative difference that another split of a window may make.
    """

    config: Mapping[str, Any]
    judge: str = "moved"
    moved: bool = False
    noise: float = 3e-6
    lr: float = 1e-3
    adapter: Mapping[str, Any] = field(default_factory=dict)


def alone(name: str, judge: str = "value", moved: bool = False, adapter: Any = (), **hyper: Any) -> Row:
    return Row({"terms": {"forget": {name: hyper}}}, judge, moved, adapter=dict(adapter))


def pair(noise: float = 3e-6, forget: str = "npo", lr: float = 1e-3, **config: Any) -> Row:
    return Row({"terms": {"forget": {forget: {}}, "retain": {"nll": {}}}, **config}, noise=noise, lr=lr)


# gp and cr divide the difference of two float32 gradients by h = 1e-2 and multiply it by lam = 10: 1000 times the rounding of a
# sum, which depends on the order of its terms; cr moreover normalizes a difference of size mu. Measured: 4e-6 and 6e-5, against at most
# 8e-7 of all others.
LOWEST = {
    "layers_to_transform": [0],
    "target_modules": ["q_proj", "v_proj", "down_proj"],
}  # nothing above the layer is reached
ROWS: dict[str, Row] = {
    "nll": alone("nll"),
    "ga": alone("ga"),
    "ga_controlled": alone("ga", "logp", cap=1e-4, select=0.6, temperature=2.0),
    "wga": alone("wga", "logp"),
    "tnpo": alone("tnpo", "logp", beta=0.5),
    "wtnpo": alone("wtnpo", "logp", beta=0.5, alpha=0.5),
    "satimp": alone("satimp", "logp", beta1=0.5),
    "npo": alone("npo"),
    "simnpo": alone("simnpo"),
    "dpo": alone("dpo"),
    "idk_dpo": alone("idk_dpo"),
    "altpo": alone("altpo"),
    "idk": alone("idk"),
    "undial": alone("undial"),
    "ceu": alone("ceu", "logp"),
    "pdu": alone("pdu"),
    "inverted_hinge": alone("inverted_hinge"),
    "neg_entropy": alone("neg_entropy"),
    "kl_uniform": alone("kl_uniform"),
    "margin": alone("margin"),
    "cross_entropy": alone("cross_entropy"),
    "adapter_norm": Row({"terms": {"forget": {"npo": {}, "adapter_norm": {"weight": 0.01}}}}),
    "kl": alone("kl", moved=True),
    "neg_kl": alone("neg_kl", moved=True),
    "rmu": alone("rmu", adapter=LOWEST, layer=0),
    "masc": alone("masc", rho=0.01, eta=3.0),  # an untrained model is under the default margin
    "jensun": alone("jensun"),
    "jsd": alone("jsd", moved=True),
    "flat": alone("flat"),
    # Of a nearly uniform model two nearly equal distributions are subtracted. Measured: 5.5e-6.
    "unilogit": Row({"terms": {"forget": {"unilogit": {}}}}, "logp", noise=1e-5),
    "adaptive_rmu": alone("adaptive_rmu", adapter=LOWEST, layer=0),
    "rr": alone("rr", moved=True, adapter=LOWEST, layer=0),
    "representation_retention": alone("representation_retention", moved=True, adapter=LOWEST, layer=0),
    "sum": pair(),
    "ngdiff": pair(forget="ga", rule="ngdiff"),
    "gru": pair(rule="gru"),
    "gru_constraint": Row(
        {
            "terms": {"forget": {"ga": {}}, "retain": {"nll": {}}, "constraint": {"kl": {}}},
            "rule": {"gru": {"tau": 0.5, "add": 0.5, "cos_floor": -0.5}},
        }
    ),
    "gru_per_layer": pair(rule={"gru": {"scope": "layer"}}),
    "ngdiff_per_tensor": pair(forget="ga", rule={"ngdiff": {"scope": "tensor"}}),
    "pcgrad": pair(rule="pcgrad", forget="ga"),
    "mgda": pair(rule="mgda", forget="ga"),
    "mgda_kl": Row(
        {"terms": {"forget": {"npo": {}}, "retain": {"kl": {}}}, "rule": "mgda"}
    ),  # kl's gradient is zero at first
    "primal_dual": pair(rule={"primal_dual": {"step": 5.0}}, forget="pdu"),
    "sam": pair(smoothing={"sam": {"rho": 0.05}}),
    "sam_base": pair(smoothing={"sam": {"rho": 0.05, "space": "base"}}),
    "rs": pair(smoothing={"rs": {"sigma": 0.01}}),
    "rs_base": pair(smoothing={"rs": {"sigma": 0.01, "space": "base"}}),
    "gp": pair(smoothing="gp", noise=3e-5),
    "cr": pair(smoothing="cr", noise=5e-4),
    "gru_sam": pair(rule="gru", smoothing="sam"),
    "wa": pair(averaging={"wa": {"start": 1, "every": 1}}),
    "wa_exact": pair(averaging={"wa": {"start": 1, "every": 1, "exact": True}}),
    "gen": pair(step_size={"gen": {"every": 1}}, lr=1e-2, rule="ngdiff", forget="ga"),
    "precomputed": Row({"terms": {"forget": {"npo": {}}}, "reference": "precomputed"}, "value"),
}
STEPS = 4


def data() -> dict[str, list[dict[str, str]]]:
    forget, other = tiny.rows(8, "f", seed=1), tiny.rows(8, "f", seed=5)
    forget = [{**r, "alternate": o["answer"]} for r, o in zip(forget, other, strict=True)]
    return {"forget": forget, "retain": tiny.rows(8, "r", seed=2)}


def config(row: Row, out: Path, **over: Any) -> UnlearnConfig:
    settings = {
        "per_device_train_batch_size": 8, "max_steps": STEPS, "learning_rate": row.lr, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return UnlearnConfig(output_dir=str(out), **{**settings, **row.config, **over})


def trainer(name: str, out: Path, **over: Any) -> UnlearnTrainer:
    row = ROWS[name]
    model = tiny.lora(tiny.llama(), moved=row.moved, **row.adapter)
    return UnlearnTrainer(model, config(row, out, **over), data=data(), processing_class=tiny.tokenizer())


def parameters(t: UnlearnTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in t.bare.named_parameters() if p.requires_grad}


def mean_logp(model: Any) -> float:
    bundle, tok = ForgetRetain.load(data()), tiny.tokenizer()
    batch = collate([{"forget": [r]} for r in bundle.encode("forget", tok)], 0)["forget"]
    with torch.no_grad():
        return float(Pass(model, batch).logp.mean())


@dataclass
class Whole:
    """An uninterrupted run of four steps on one batch of all eight rows."""

    folder: Path
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    losses: list[float]
    logp: tuple[float, float]
    state: Any


@functools.cache
def whole(name: str) -> Whole:
    folder = Path(tempfile.mkdtemp(prefix="methods-", dir=_TMP[0]))
    t = trainer(name, folder / "a", save_strategy="steps", save_steps=2)
    start, before = parameters(t), mean_logp(t.bare)
    t.train()
    losses = [x["loss/forget"] for x in t.state.log_history if "loss/forget" in x]
    assert t.window is not None
    state = {"window": t.window.state_dict(), "average": t.average_state}
    return Whole(folder, start, parameters(t), losses, (before, mean_logp(t.bare)), state)


_TMP: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    _TMP[:] = [str(tmp_path_factory.mktemp("methods"))]
    yield
    whole.cache_clear()


def same_bytes(a: Any, b: Any) -> bool:
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bytes(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_bytes(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# --- the table --------------------------------------------------------------------------------------------------------


def used() -> dict[str, set[str]]:
    out: dict[str, set[str]] = {k: set() for k in KINDS}
    for row in ROWS.values():
        c = config(row, Path("unused"))
        out["objective"] |= {t.objective.name for t in c.term_list}
        for kind in KINDS[1:]:
            if (method := getattr(c, f"{kind}_method")) is not None:
                out[kind].add(method[0].name)
    return out


def test_every_method_has_a_row():
    have = used()
    for kind in KINDS:
        registered = {m.name for m in registry.methods(kind) if not {"router", "ref_router"} & set(m.needs)}
        assert registered == have[kind], f"{kind}: add a row for {sorted(registered - have[kind])}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_says_where_it_comes_from(kind):
    for m in registry.methods(kind):
        assert m.source.url.startswith("https://") and m.source.paper and 2010 < m.source.year < 2030, m.name
        assert len(m.summary) > 10 and m.faithful in ("verified", "reconstructed"), m.name
        assert kind != "objective" or (m.unit and (m.needs or m.name == "adapter_norm"))  # which reads parameters
        assert not m.check(m.resolve({p: 0 for p in m.params if m.params[p].required}))  # defaults lie in their ranges


@pytest.mark.parametrize("name", ROWS)
def test_it_trains(name):
    row, run = ROWS[name], whole(name)
    assert len(run.losses) == STEPS and all(torch.isfinite(torch.tensor(run.losses)))
    assert all(torch.isfinite(p).all() for p in run.end.values())
    assert any(not torch.equal(run.start[n], run.end[n]) for n in run.end)
    if row.judge == "value":
        assert run.losses[-1] < run.losses[0]
    elif row.judge == "logp":
        assert run.logp[1] < run.logp[0]


@pytest.mark.parametrize("name", ROWS)
def test_it_resumes_to_the_same_bytes(name):
    """Four steps are two steps and a resume: parameters, the rule's state, the generator, averages."""
    run = whole(name)
    again = trainer(name, run.folder / "b")
    again.train(resume_from_checkpoint=str(run.folder / "a.work" / "checkpoint-2"))
    assert again.window is not None
    assert same_bytes(parameters(again), run.end)
    assert same_bytes({"window": again.window.state_dict(), "average": again.average_state}, run.state)


@pytest.mark.parametrize("name", ROWS)
def test_any_split_of_the_window(name, tmp_path):
    """One batch of 8 = micro-batches of 5, 1 and 2 rows of unequal lengths, over two steps of the rule's own state."""
    row = ROWS[name]
    c = config(row, tmp_path)
    t = trainer(name, tmp_path)
    items = [t.rows[i] for i in range(8)]
    assert len({len(i["forget"][0]["input_ids"]) for i in items}) > 2
    moved = tiny.lora(tiny.llama(), moved=True, **row.adapter)  # at a fresh adapter half of the gradients are zero

    def updates(split: tuple[int, ...]) -> list[torch.Tensor]:
        assert c.rule_method is not None
        window = Window(
            moved, c.term_list, c.rule_method, scope=c.scope, smoothing=c.smoothing_method, space=c.smoothing_space,
            reference=Reference(),
        )  # fmt: skip
        out = []
        for order in (items, items[::-1]):
            parts, at = [], 0
            for k in split:
                parts.append(collate(order[at : at + k], 0))
                at += k
            out.append(torch.cat([x.flatten() for x in window.step(parts).update.tensors]))
        return out

    for a, b in zip(updates((5, 1, 2)), updates((8,)), strict=True):
        assert float(b.norm()) > 0 and float((a - b).norm()) <= row.noise * float(b.norm())


@pytest.mark.parametrize("name", ROWS)
def test_it_runs_in_bf16(name, tmp_path):
    t = trainer(name, tmp_path, bf16=True, max_steps=1)
    start = parameters(t)
    t.train()
    end = parameters(t)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in end.values())
    assert any(not torch.equal(start[n], end[n]) for n in end)


# --- two processes ----------------------------------------------------------------------------------------------------

TOGETHER = ("gru", "ngdiff", "ngdiff_per_tensor", "primal_dual", "sam", "sam_base", "rs", "wa_exact")
_RANK = """
import os, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_methods
out, rank = Path({out!r}), int(os.environ["RANK"])
for name in {names!r}:
    t = test_methods.trainer(name, out / name, **{over!r}, per_device_train_batch_size=4)
    assert t.args.world_size == 2
    t.train()
    torch.save(test_methods.parameters(t), out / f"{{name}}-{{rank}}.pt")
"""


def test_two_gloo_processes_equal_one(tmp_path):
    """Normalization, projection, the ball of sam and the generator of rs are global; plain SGD keeps differences linear."""
    over = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    here = Path(__file__).resolve()
    script = tmp_path / "rank.py"
    paths = [*map(str, here.parents[:3])]
    script.write_text(_RANK.format(paths=paths, out=str(tmp_path), names=TOGETHER, over=over))
    for done in zygote.ranks(script):
        assert done.returncode == 0, done.stderr[-3000:]
    for name in TOGETHER:
        t = trainer(name, tmp_path / "one" / name, **over)
        start = parameters(t)
        t.train()
        one = parameters(t)
        ranks = [torch.load(tmp_path / f"{name}-{r}.pt", weights_only=True) for r in (0, 1)]
        assert same_bytes(ranks[0], ranks[1]), name
        assert max(float((one[n] - start[n]).abs().max()) for n in one) > 1e-4, name
        assert max(float((one[n] - ranks[0][n]).abs().max()) for n in one) <= 1e-6, name
