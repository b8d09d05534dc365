"""One optimizer step is a pure function of its window: any split, any checkpointing, any number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zygote
from torch import Tensor

from peft_unlearn import registry
from peft_unlearn.data.collate import encode, pad
from peft_unlearn.data.formats import to_text
from peft_unlearn.errors import Errors, UserError
from peft_unlearn.forward import Pass, Reference
from peft_unlearn.gradients.parse import parse_terms
from peft_unlearn.gradients.vector import Space, Vec
from peft_unlearn.gradients.window import Window
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer

TERMS = {"forget": {"npo": {"beta": 0.5}, "ga": {"weight": 0.3}}, "retain": {"nll": {"weight": 2.0}, "kl": {}}}


def encoded(tag: str, n: int) -> list[dict[str, Any]]:
    tok = tiny.tokenizer()
    return [encode(*to_text(r), tok)[0] for r in tiny.rows(n, tag, seed=len(tag))]


def window_of(model: Any, terms: Any = None, rule: str = "sum", **kw: Any) -> Window:
    errors = Errors()
    parsed = parse_terms(terms or TERMS, errors)
    errors.raise_if_any("test")
    return Window(model, parsed, (registry.get("rule", rule), {}), reference=Reference(), **kw)


def micro(forget: list[Any], retain: list[Any], split: Sequence[int]) -> list[dict[str, Any]]:
    out, at = [], 0
    for k in split:
        out.append({"forget": pad(forget[at : at + k], 0), "retain": pad(retain[at : at + k], 0)})
        at += k
    return out


def relative(a: Vec, b: Vec) -> float:
    pairs = list(zip(a.tensors, b.tensors, strict=True))
    top = sum(float(((x - y).double() ** 2).sum()) for x, y in pairs)
    return (top / sum(float((y.double() ** 2).sum()) for _, y in pairs)) ** 0.5


@pytest.fixture(scope="module")
def rows8() -> tuple[list[Any], list[Any]]:
    forget, retain = encoded("f", 8), encoded("rr", 8)
    assert len({len(r["input_ids"]) for r in forget}) > 2  # unequal lengths, or the test says nothing
    return forget, retain


def test_named_gradients_equal_the_literal_full_batch(rows8):
    """Every row alone through full logits, summed by hand and divided by the counts of the whole window."""
    model = tiny.lora(tiny.llama())
    params = [p for p in model.parameters() if p.requires_grad]

    def logits(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
        z = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        return z[labels != -100].log_softmax(1), labels[labels != -100]

    forget, retain = rows8
    n_tokens = {
        name: sum(y != -100 for r in rows for y in r["labels"][1:]) for name, rows in zip("fr", rows8, strict=True)
    }
    loss_f, loss_r = torch.zeros(()), torch.zeros(())
    for row in forget:
        logp, y = logits(row)
        with torch.no_grad(), model.disable_adapter():
            ref, _ = logits(row)
        pick, pick_ref = logp.gather(1, y[:, None]).sum(), ref.gather(1, y[:, None]).sum()
        loss_f = loss_f + 2 / 0.5 * torch.log1p(torch.exp(0.5 * (pick - pick_ref))) / 8
        loss_f = loss_f + 0.3 * pick / n_tokens["f"]
    for row in retain:
        logp, y = logits(row)
        with torch.no_grad(), model.disable_adapter():
            ref, _ = logits(row)
        loss_r = loss_r - 2.0 * logp.gather(1, y[:, None]).sum() / n_tokens["r"]
        loss_r = loss_r + (ref.exp() * (ref - logp)).sum() / n_tokens["r"]
    want = {"forget": Vec(torch.autograd.grad(loss_f, params)), "retain": Vec(torch.autograd.grad(loss_r, params))}

    window = window_of(model)
    split = micro(*rows8, (3, 1, 4))
    counts = window.counts(split)
    step = window.step(split)
    for name, loss in (("forget", loss_f), ("retain", loss_r)):
        got, value = window.sweep(name, split, counts)
        assert relative(got, want[name]) <= 2e-6
        assert value == pytest.approx(float(loss), rel=1e-5)
        assert step.values[name] == pytest.approx(value)
        assert step.norms[name] == pytest.approx(float(window.space.norm(want[name])), rel=1e-5)
    assert relative(step.update, want["forget"] + want["retain"]) <= 2e-6
    cos = float(window.space.dot(want["forget"], want["retain"])) / (step.norms["forget"] * step.norms["retain"])
    assert step.cosines == {"forget,retain": pytest.approx(cos, abs=1e-5)}
    assert set(step.logs()) == {
        "loss/forget", "loss/retain", "grad_norm/forget", "grad_norm/retain", "cos/forget,retain"
    }  # fmt: skip


@pytest.mark.parametrize("split", [(8,), (4, 4), (1,) * 8, (5, 1, 2)])
def test_any_split_gives_the_same_step(rows8, split):
    model = tiny.lora(tiny.llama())
    whole = window_of(model).step(micro(*rows8, (8,)))
    parts = window_of(model).step(micro(*rows8, split))
    assert relative(parts.update, whole.update) <= 1e-6
    assert parts.values == pytest.approx(whole.values, rel=1e-6)


def test_checkpointing_changes_nothing(rows8):
    model = tiny.lora(tiny.llama())
    model.train()
    plain = window_of(model).step(micro(*rows8, (4, 4)))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = window_of(model).step(micro(*rows8, (4, 4)))
    assert relative(again.update, plain.update) <= 1e-7


def test_one_graph_and_no_grad_left_behind(rows8):
    model = tiny.lora(tiny.llama())
    step = window_of(model).step(micro(*rows8, (4, 4)))
    assert all(p.grad is None for p in model.parameters())
    assert not any(t.requires_grad for t in step.update.tensors)


def test_same_name_and_batch_share_one_forward(rows8):
    model = tiny.lora(tiny.llama())
    window = window_of(model)
    window.step(micro(*rows8, (8,)))
    calls = []
    model.register_forward_pre_hook(lambda *a: calls.append(1))
    window.step(micro(*rows8, (8,)))
    assert len(calls) == 4  # forget and retain, each once as itself and once as its reference


def test_a_term_may_read_another_batch(rows8):
    model = tiny.lora(tiny.llama())
    terms = {"forget": {"ga": {}, "nll": {"batch": "retain", "weight": 0.5}}}
    got = window_of(model, terms).step(micro(*rows8, (3, 5)))
    p = Pass(model, pad(rows8[0], 0))
    q = Pass(model, pad(rows8[1], 0))
    loss = p.logp.mean() - 0.5 * q.logp.mean()
    want = Vec(torch.autograd.grad(loss, [x for x in model.parameters() if x.requires_grad]))
    assert relative(got.update, want) <= 2e-6


def test_rows_without_targets(rows8):
    model = tiny.lora(tiny.llama())
    forget = [dict(r) for r in rows8[0]]
    forget[3]["labels"] = [-100] * len(forget[3]["labels"])
    window = window_of(model)
    counts = window.counts(micro(forget, rows8[1], (4, 4)))
    assert counts[0] == 7  # sequences with a target
    empty = [{**r, "labels": [-100] * len(r["labels"])} for r in forget]
    with pytest.raises(UserError, match="forget batch has no"):
        window.step(micro(empty, rows8[1], (8,)))


def test_not_finite_names_term_and_tensors(rows8):
    model = tiny.lora(tiny.llama())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1.mlp.down_proj.lora_B" in n).fill_(float("nan"))
    with pytest.raises(UserError, match=r"gradient of forget \(npo, ga\) is not finite .*lora_"):
        window_of(model).step(micro(*rows8, (8,)))


def test_all_zero_is_refused(rows8):
    model = tiny.lora(tiny.llama())
    with pytest.raises(UserError, match="exactly zero"):
        window_of(model, {"forget": {"ga": {"weight": 0.0}}}).step(micro(*rows8, (8,)))
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trainable"):
        window_of(model)


# --- vectors ------------------------------------------------------------------------------------------------------


def test_vectors_and_space():
    torch.manual_seed(0)
    named = [
        (f"p{i}", torch.nn.Parameter(torch.randn(3, i + 1, dtype=d)))
        for i, d in enumerate([torch.float32, torch.bfloat16])
    ]
    space = Space(named)
    a, b = space.randn(torch.Generator().manual_seed(1)), space.randn(torch.Generator().manual_seed(2))
    flat = lambda v: torch.cat([t.flatten() for t in v.tensors]).double()  # noqa: E731
    for got, want in (
        (a + b, flat(a) + flat(b)), (a - b, flat(a) - flat(b)), (2 * a, 2 * flat(a)), (a * 3.0, 3 * flat(a)),
        (a / 4, flat(a) / 4), (-a, -flat(a)), (a.clone().add_(b, -0.5), flat(a) - 0.5 * flat(b)),
    ):  # fmt: skip
        torch.testing.assert_close(flat(got), want, atol=1e-6, rtol=1e-6)
    assert space.dot(a, b).dtype == torch.float64 and space.dot(a, b).ndim == 0
    torch.testing.assert_close(space.dot(a, b), flat(a) @ flat(b))
    torch.testing.assert_close(space.norm(a), flat(a).norm())
    assert all(t.dtype == torch.float32 for t in space.read().tensors + space.zeros().tensors)
    before = [p.detach().clone() for p in space.params]
    with pytest.raises(ZeroDivisionError), space.shifted(a):
        assert not torch.equal(space.params[0], before[0])
        raise ZeroDivisionError
    assert all(torch.equal(p, q) for p, q in zip(space.params, before, strict=True))  # bit for bit
    space.write(a)
    assert space.params[1].dtype == torch.bfloat16 and torch.equal(space.params[0], a.tensors[0])
    assert space.sub([1]).names == ["p1"]


# --- inside the Trainer -------------------------------------------------------------------------------------------


def run(out: Path, batch: int, accumulation: int, *, n: int = 11, **over: Any) -> dict[str, Tensor]:
    """Parameters after a few steps; n = 11 rows are no multiple of the 8 of a step."""
    args = UnlearnConfig(
        output_dir=str(out), terms=TERMS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        **{"learning_rate": 1e-2, "max_steps": 3, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **over},
    )  # fmt: skip
    model = tiny.lora(tiny.llama())
    data = {"forget": tiny.rows(n, "f", seed=1), "retain": tiny.rows(13, "r", seed=2)}
    trainer = UnlearnTrainer(model, args, data=data, processing_class=tiny.tokenizer())
    trainer.train()
    return {k: p.detach().clone() for k, p in trainer.bare.named_parameters() if p.requires_grad}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize(("optim", "lr"), [("sgd", 0.1), ("adamw_torch", 1e-3)])
def test_accumulation_equals_one_batch(tmp_path, optim, lr):
    """3 steps of 8 over 11 rows: the second and third window reach over the end of an epoch."""
    whole = run(tmp_path / "a", 8, 1, optim=optim, learning_rate=lr)
    start = {n: p for n, p in tiny.lora(tiny.llama()).named_parameters() if p.requires_grad}
    assert worst(whole, start) > 1e-4
    for batch, accumulation in ((4, 2), (2, 4)):
        assert worst(run(tmp_path / f"b{batch}", batch, accumulation, optim=optim, learning_rate=lr), whole) <= 1e-6


def test_checkpointing_in_the_trainer(tmp_path):
    assert worst(run(tmp_path / "a", 4, 2), run(tmp_path / "b", 4, 2, gradient_checkpointing=True)) <= 1e-6


def test_epochs_with_a_tail(tmp_path):
    """num_train_epochs over 11 rows in windows of 8: every window is whole, however it is split."""
    over = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-3}
    assert worst(run(tmp_path / "a", 8, 1, **over), run(tmp_path / "b", 2, 4, **over)) <= 1e-6


_RANK = """
import sys, json, os
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_window import run
out = Path({out!r})
got = run(out / "work", {batch}, {accumulation}, optim="adamw_torch", learning_rate=1e-3, **{over!r})
rank = int(os.environ["RANK"])
torch.save(got, out / f"rank{{rank}}.pt")
(out / f"world{{rank}}.json").write_text(json.dumps(torch.distributed.get_world_size()))
"""


@pytest.mark.parametrize(
    ("batch", "accumulation", "over"),
    [pytest.param(4, 1, {}, marks=pytest.mark.slow), (2, 2, {"max_steps": -1, "num_train_epochs": 2})],
)
def test_two_gloo_processes_equal_one(tmp_path, batch, accumulation, over):
    one = run(tmp_path / "one", 8, 1, optim="adamw_torch", learning_rate=1e-3, **over)
    here = Path(__file__).resolve()
    script = tmp_path / "rank.py"
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    script.write_text(_RANK.format(paths=paths, out=str(tmp_path), batch=batch, accumulation=accumulation, over=over))
    for done in zygote.ranks(script):
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "world0.json").read_text()) == 2
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert worst(ranks[0], ranks[1]) == 0.0
    assert worst(ranks[0], one) <= 1e-6


def test_rule_sum_is_registered():
    assert registry.get("rule", "sum").source.url
