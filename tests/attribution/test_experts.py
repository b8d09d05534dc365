"""Attribution of experts on small random models: affinity and its lift, what is chosen, what is warned about, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families as f
import pytest
import tiny
import torch
import yaml

import peft_unlearn
from peft_unlearn import cli
from peft_unlearn.attribution.experts import Affinity, Experts, affinity, experts, overlap, selected, within
from peft_unlearn.attribution.selection import SelectionOverlap
from peft_unlearn.errors import UserError
from peft_unlearn.training.recipe import prepare


def rows(n: int = 7, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 2 to 12 tokens."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        ids = torch.randint(3, 64, (2 + (5 * i) % 11,), generator=g).tolist()
        out.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return out


@torch.no_grad()
def by_hand(model: Any, part: list[dict[str, list[int]]], k: int = 2) -> torch.Tensor:
    """The definition, row by row without padding: (layers, experts)."""
    out = []
    for r in part:
        logits = model(input_ids=torch.tensor([r["input_ids"]]), output_router_logits=True).router_logits
        q = torch.stack(list(logits)).double().softmax(-1)  # (layers, tokens, experts)
        kept = torch.zeros_like(q).scatter(-1, q.topk(k).indices, 1.0)
        out.append((q * kept).mean(1))
    return torch.stack(out).mean(0)


@pytest.fixture(scope="module")
def model() -> Any:
    return f.base("olmoe")


@pytest.fixture(scope="module")
def found(model: Any) -> Affinity:
    return affinity(model, rows(), rows(9, 1))


def test_affinity_is_the_definition(model, found):
    """T5: padding beside longer rows changes nothing, and none of it counts."""
    assert found.layers == [0, 1, 2] and found.forget.dtype == torch.float64
    assert f.error(found.forget, by_hand(model, rows())) <= 1e-6
    assert f.error(found.retain, by_hand(model, rows(9, 1))) <= 1e-6
    assert torch.allclose(found.lift, found.forget / found.retain)
    sizes = [sum(len(r["input_ids"]) for r in part) for part in (rows(), rows(9, 1))]
    assert found.tokens == {"forget": sizes[0], "retain": sizes[1]}
    assert found.sequences == {"forget": 7, "retain": 9}
    assert torch.allclose((4 * found.halves[0] + 3 * found.halves[1]) / 7, found.forget)


def test_order_and_batches_do_not_matter(model, found):
    back = affinity(model, rows()[::-1], rows(9, 1)[3:] + rows(9, 1)[:3])
    assert f.error(back.forget, found.forget) <= 1e-6 and f.error(back.retain, found.retain) <= 1e-6
    many = [r for _ in range(12) for r in rows()]  # several batches
    assert f.error(affinity(model, many, rows(9, 1)).forget, found.forget) <= 1e-6


@pytest.mark.parametrize("k", [1, 2, 8])
def test_sum_over_experts_is_the_mass_of_the_top_k(k):
    """T1."""
    m = f.base("olmoe", num_experts_per_tok=k)
    got = affinity(m, rows(), rows(3, 1)).forget.sum(1)
    mass = []
    with torch.no_grad():
        for r in rows():
            logits = m(input_ids=torch.tensor([r["input_ids"]]), output_router_logits=True).router_logits
            mass.append(torch.stack(list(logits)).softmax(-1).topk(k).values.sum(-1).mean(-1))
    assert f.error(got, torch.stack(mass).double().mean(0)) <= 1e-6
    assert (got <= 1 + 1e-6).all() and (k < 8 or torch.allclose(got, torch.ones(3).double(), atol=1e-6))


def test_permuted_experts_permute_it(found):
    """T6."""
    m, order = f.base("olmoe"), torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    with torch.no_grad():
        for block in m.model.layers:
            for p in (block.mlp.gate.weight, block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
                p.copy_(p[order].clone())
    got = affinity(m, rows(), rows(9, 1))
    assert f.error(got.forget, found.forget[:, order]) <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "gpt_oss", "llama4_text"])
def test_other_families(family):
    m = f.base(family)
    got = affinity(m, rows(), rows(3, 1))
    assert got.layers == sorted(k for k in got.layers) and got.forget.shape == (len(got.layers), 8)
    assert ((got.forget >= 0) & (got.forget <= 1)).all() and (got.forget.sum(1) > 1 / 8).all()
    if family == "deepseek_v2":
        assert got.layers == [1, 2]  # its first block is dense


def test_the_model_stays_as_it_was(model):
    model.train()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    affinity(model, rows(), rows(3, 1))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    model.eval()


def test_token_budget_takes_rows_evenly(model):
    assert within(rows(), 10**6) == rows()
    assert [r["input_ids"] for r in within(rows(8), 1)] == [rows(8)[i]["input_ids"] for i in (0, 4)]
    few = affinity(model, rows(50), rows(50, 1), token_budget=100)
    assert few.tokens["forget"] <= 150 and few.sequences["forget"] < 50


# --- choosing ------------------------------------------------------------------------------------------------------------


def made(forget: list[list[float]], retain: list[list[float]], layers: list[int] | None = None) -> Affinity:
    a, b = torch.tensor(forget).double(), torch.tensor(retain).double()
    return Affinity(layers or list(range(len(a))), a, b, (a, a), {"forget": 9, "retain": 9}, {"forget": 3, "retain": 3})


HUB = made([[0.5, 0.3, 0.0], [0.1, 0.2, 0.6]], [[0.5, 0.05, 0.2], [0.1, 0.2, 0.1]], [2, 5])


def test_choose():
    assert HUB.choose() == {2: [0], 5: [2]}
    assert HUB.choose(per_layer=2) == {2: [0, 1], 5: [1, 2]}
    assert HUB.choose(top=1, per_layer=None) == {5: [2]}
    assert HUB.choose(top=3, per_layer=None) == {2: [0, 1], 5: [2]}
    assert HUB.choose(layers=[2]) == {2: [0]}
    assert HUB.choose(top=1, layers=[2]) == {2: [0]}
    assert HUB.choose("contrast") == {2: [1], 5: [2]}  # the hub serves the retain set as much
    assert HUB.choose(top=2, ranking="contrast") == {2: [1], 5: [2]}
    assert HUB.choose(per_layer=2, layers=[5]) == {5: [1, 2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2, 3]}, r"blocks \[3\] have no experts; blocks with some: \[2, 5\]"),
        ({"per_layer": 4}, "per_layer 4 is more than the 3 experts"),
        ({"top": 7}, "top 7 is more than the 6 experts"),
        ({"top": 4, "layers": [5]}, "top 4 is more than the 3 experts"),
    ],
)
def test_choose_refuses(options, message):
    with pytest.raises(UserError, match=message):
        HUB.choose(**options)


def test_hubs_are_warned_about():
    (warning,) = HUB.warnings()
    assert warning.startswith("block 2: expert 0") and "a lift of only 1.0" in warning
    at = made([[0.3, 0.1]], [[0.1, 0.1]])
    assert float(at.lift[0, 0]) == pytest.approx(3.0)
    assert not made([[0.31, 0.1]], [[0.1, 0.1]]).warnings() and made([[0.29, 0.1]], [[0.1, 0.1]]).warnings()
    assert not made([[0.5, 0.1]], [[0.0, 0.1]]).warnings()  # nothing of the retain set goes there
    text = str(Experts(HUB, HUB.choose()))
    assert (
        "block 5: expert 2: 0.60, lift 6.0" in text
        and "warning: block 2" in text
        and "stability is not meaning" in text
    )


def test_stability():
    assert HUB.stability() == {"same_top": 1.0, "top6_overlap": 1.0, "spearman": pytest.approx(1.0)}
    b = made([[0.5, 0.3], [0.1, 0.2]], [[1, 1], [1, 1]])
    b.halves = (b.forget, -b.forget)
    assert b.stability()["same_top"] == 0.0 and b.stability()["spearman"] == pytest.approx(-1.0)


def test_json_holds_everything(found):
    text = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(text) == {"layers", "forget", "retain", "lift", "tokens", "sequences", "stability", "warnings"}


def test_refusals(model):
    with pytest.raises(UserError, match="has no experts"):
        affinity(tiny.llama(), rows(), rows(3, 1))
    with pytest.raises(UserError, match="at least two forget rows"):
        affinity(model, rows(1), rows(3, 1))


# --- selection shift ---------------------------------------------------------------------------------------------------------


def test_overlap_counts_slots():
    before = {0: torch.tensor([[0, 1], [2, 3]])}
    assert overlap(before, {0: torch.tensor([[1, 0], [3, 2]])}) == {0: 1.0}  # the order in the top k is nothing
    assert overlap(before, {0: torch.tensor([[0, 2], [2, 3]])}) == {0: 0.75}
    assert overlap(before, {0: torch.tensor([[4, 5], [6, 7]])}) == {0: 0.0}


def test_selected_follows_the_rows(model):
    got = selected(model, rows())
    alone = [selected(model, [r]) for r in rows()]
    for k in got:
        assert got[k].shape == (sum(len(r["input_ids"]) for r in rows()), 2)
        assert torch.equal(got[k], torch.cat([a[k] for a in alone]))


def test_the_callback_compares_with_the_base():
    m = f.adapted(f.base("olmoe"), experts={1: [2]}, train_router="full")
    shift = SelectionOverlap({"forget": rows()}, every=2)
    assert "not looked at" in str(shift)
    state = type("State", (), {"global_step": 2})()
    shift.on_step_end(None, state, None, model=m)
    shift.on_train_end(None, state, None, model=m)  # the same step: one entry
    (entry,) = shift.history
    seen = entry["overlap"]["forget"]
    assert seen[0] == 1.0 and seen[1] < 1.0 and entry["step"] == 2 and "block 1" in str(shift)
    with m.disable_adapter():
        assert set(shift.look(m, 3)["forget"].values()) == {1.0}


# --- the command, and experts: auto ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("moe") / "base"
    f.base("olmoe", vocab_size=320, max_position_embeddings=128).save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("data")
    for name, seed in (("forget", 1), ("retain", 2)):
        lines = [json.dumps(r) for r in tiny.rows(6, name, seed)]
        (where / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return where


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", *map(str, argv)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else (0 if e.code is None else 1)
        return code, *capsys.readouterr()

    return call


def test_command(run, base, data, tmp_path):
    code, out, _ = run("experts", "--base", base, "--data", data, "--json", "--out", tmp_path / "deep" / "affinity.png")
    said = json.loads(out)
    assert code == 0 and said["layers"] == [0, 1, 2] and {len(v) for v in said["chosen"].values()} == {1}
    assert (tmp_path / "deep" / "affinity.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("experts", "--base", base, "--data", data, "--ranking", "contrast")
    assert code == 0 and "lift over the retain set" in out and "warning: block" in out
    code, _, err = run("experts", "--base", base, "--data", data, "--ranking", "raw")
    assert code == 2 and "contrast" in err


def test_command_refuses_dense_models(run, data, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    code, out, err = run("experts", "--base", tmp_path / "dense", "--data", data)
    assert code == 2 and out == "" and "has no experts" in err


def recipe(base: Path, data: Path, **adapter: Any) -> dict[str, Any]:
    return {
        "name": "t", "base": str(base), "data": {"bundle": str(data)},
        "adapter": {"type": "expert_lora", "experts": "auto", "r": 2, **adapter},
        "terms": {"forget": {"npo": {}, "router_anchor": {}}, "retain": {"nll": {}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "no"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"top": 0}, "adapter.top must be a whole number from 1 on, not 0"),
        ({"per_layer": True}, "adapter.per_layer must be a whole number"),
        ({"top": 1, "per_layer": 1}, "two ways of choosing"),
        ({"layers": 2}, "adapter.layers must be a list of blocks"),
        ({"ranking": "raw"}, "adapter.ranking must be affinity or contrast"),
        ({"layer": [1]}, "has no 'layer'"),
    ],
)
def test_options_of_auto_are_checked_before_anything_loads(adapter, message, base, data, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(recipe(base, data, **adapter), tmp_path / "out")


def test_a_run_names_what_it_chose(run, base, data, tmp_path):
    """`auto` becomes names in the saved recipe, in the manifest's targets and in the terms."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(base, data, top=1, train_router="full")))
    code, out, err = run("train", tmp_path / "r.yaml", "--out", tmp_path / "a")
    assert code == 0, err
    want = experts(str(base), str(data)).affinity.choose(top=1)
    saved = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["adapter"]
    assert saved == {
        "type": "expert_lora",
        "experts": {str(k): v for k, v in want.items()},
        "r": 2,
        "train_router": "full",
    }
    manifest = json.loads((tmp_path / "a" / "forget.json").read_text())
    (k,) = want
    assert manifest["targets"] == [f"model.layers.{k}.mlp.experts", f"model.layers.{k}.mlp.gate"]
    assert manifest["method"]["terms"]["forget"]["router_anchor"]["experts"] == {str(k): want[k]}
    assert "selection overlap with the base at step 2" in err and out.strip() == str(tmp_path / "a")
    code, out, _ = run("remove", tmp_path / "a", "--base", base)
    assert code == 0 and "have the bytes of the base's files" in out
    code, out, _ = run("plan", tmp_path / "r.yaml")
    assert code == 0 and "trained" in out


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_other_families_are_saved_and_removed(family, run, data, tmp_path):
    """Fused experts lie one by one on disk, and Mixtral's under other names."""
    f.base(family, vocab_size=320, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "base", data, train_router="full")))
    code, _, err = run("train", tmp_path / "r.yaml", "--out", tmp_path / "a")
    assert code == 0, err
    digest = json.loads((tmp_path / "a" / "forget.json").read_text())["base"]["digest_targeted"]
    assert (digest is None) == (family == "mixtral")
    code, out, _ = run("remove", tmp_path / "a", "--base", tmp_path / "base")
    assert code == 0 and "have the bytes of the base's files" in out


def test_a_trainer_made_in_python_writes_the_recipe_it_amounts_to(base, data, tmp_path):
    from peft_unlearn.folder.base import load_base
    from peft_unlearn.training.adapt import get_forget_model
    from peft_unlearn.training.config import UnlearnConfig
    from peft_unlearn.training.save import save_adapter
    from peft_unlearn.training.trainer import UnlearnTrainer

    spec = {"type": "expert_lora", "experts": {1: [2], 2: []}, "r": 2, "train_router": "lora", "router_r": 3}
    args = UnlearnConfig(
        output_dir=str(tmp_path / "a"), max_steps=2, learning_rate=0.01, per_device_train_batch_size=3, use_cpu=True,
        save_strategy="no", disable_tqdm=True, router_learning_rate=1e-3,
    )  # fmt: skip
    model = get_forget_model(load_base(base), spec)
    trainer = UnlearnTrainer(model, args, data=str(data), processing_class=tiny.tokenizer())
    with pytest.warns(UserWarning, match=r"was routed to the adapted experts of model\.layers\.1\.mlp\.experts"):
        trainer.train()
    saved = save_adapter(trainer, base=str(base)).recipe
    assert saved["adapter"] == {
        "type": "expert_lora", "experts": {"1": [2], "2": []}, "r": 2, "lora_alpha": 16, "train_router": "lora", "router_r": 3,
    }  # fmt: skip
    assert saved["train"]["router_learning_rate"] == 1e-3
    again = prepare(saved, tmp_path / "b", base=str(base), data=str(data))
    assert again.adapter.experts == {"1": [2], "2": []} and again.adapter.train_router == "lora"


def test_an_expert_that_no_token_visits_alone_is_refused(base, data, tmp_path):
    spec = recipe(base, data, experts={1: [2]})
    spec["terms"] = {"forget": {"npo": {}}, "retain": {"nll": {}}}
    with pytest.raises(UserError, match=r"no term gives a gradient to 1 of 1|are all exactly zero"):
        peft_unlearn.train(spec, tmp_path / "a", progress=lambda _: None)
    assert not (tmp_path / "a").exists()
