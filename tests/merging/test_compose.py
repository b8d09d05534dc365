"""Arithmetic of adapters against the dense arithmetic, for any signs, ranks and targets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stacks import delta, dense, edit, expert, lora, save_moe
from tinyfolder import logits, save_base, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.manifest import probe_difference
from peft_unlearn.folder.read import AdapterFolder, read_adapter
from peft_unlearn.merging.compose import _stock, compose, parse_part
from peft_unlearn.merging.summed import summed
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.tuners.delta import Deltas

ALL = ("q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens")


@pytest.fixture(scope="module")
def dense_parts(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of other ranks, alphas, targets and kinds of factors."""
    where = tmp_path_factory.mktemp("dense")
    lora(where / "a", base_dir, 1, r=2)
    lora(where / "b", base_dir, 2, ("q_proj", "down_proj"), r=3, lora_alpha=7, use_rslora=True)
    lora(
        where / "c", base_dir, 3, ALL, r=1, rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"lm_head": 9}
    )
    lora(where / "d", base_dir, 4, ("embed_tokens",), r=4, scale=0.5)
    return [where / n for n in "abcd"]


@pytest.fixture(scope="module")
def moe_parts(moe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where = tmp_path_factory.mktemp("moe")
    expert(where / "x", moe_dir, 1, {1: [0, 3], 2: [2]}, train_router="lora")
    expert(where / "y", moe_dir, 2, {0: [1], 1: [3, 5]}, r=3, train_router="full")
    lora(where / "z", moe_dir, 3)
    return [where / n for n in "xyz"]


def relative(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> float:
    assert set(want) == set(got)
    return max(
        float((want[k] - got[k]).norm() / want[k].norm()) if want[k].norm() > 0 else float(got[k].norm()) for k in want
    )


def plain(out: Path, base_dir: Path) -> torch.Tensor:
    """What PEFT alone gives for a folder."""
    return logits(PeftModel.from_pretrained(load_base(base_dir), str(out)).eval())


WEIGHTS = st.lists(st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.01, 0.5, 1.0, 3.0]), min_size=4, max_size=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=WEIGHTS)
def test_any_signs_and_ranks(base_dir: Path, dense_parts: list[Path], tmp_path: Path, weights: list[float]) -> None:
    parts = [(p, w) for p, w in zip(dense_parts, weights, strict=True)]
    if not any(weights):
        with pytest.raises(UserError, match="sum is zero"):
            compose(parts, tmp_path / "c", base=base_dir, probe=False)
        return
    compose(parts, tmp_path / "c", base=base_dir, probe=False)
    want, _ = dense([(p, w) for p, w in parts if w], base_dir)
    assert relative(want, dense([(tmp_path / "c", 1.0)], base_dir)[0]) <= 1e-6


def test_plain_peft_loads_the_sum(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    parts = [(dense_parts[0], 1.0), (dense_parts[2], -0.5), (dense_parts[3], 2.0)]
    found = compose(parts, tmp_path / "c", base=base_dir)
    _, model = dense(parts, base_dir)
    want = logits(model)
    assert torch.allclose(plain(tmp_path / "c", base_dir), want, atol=1e-5)
    assert float((want - logits(load_base(base_dir))).abs().max()) > 0.1
    folder = read_adapter(tmp_path / "c")
    assert (
        found.rank == folder.config["r"] == folder.config["lora_alpha"] == 7 and found.probed
    )  # q_proj of the second layer: 2 + 5
    assert (
        len({t.shape[0] for k, t in load_file(tmp_path / "c" / "adapter_model.safetensors").items() if "_A" in k}) == 1
    )
    rows = folder.manifest.method["compose"]
    assert [(r["weight"], r["scale"]) for r in rows] == [(1.0, 1.0), (-0.5, 1.0), (2.0, 0.5)]
    assert folder.recipe["compose"]["parts"] == rows and folder.manifest.scale == 1
    assert [r["adapter"] for r in rows] == [read_adapter(p).adapter_id for p, _ in parts]
    stack = ForgetModel.from_pretrained(base_dir, tmp_path / "c")
    assert torch.allclose(logits(stack.model), want, atol=1e-5)
    probes = folder.manifest.probes
    assert probes is not None and probe_difference(stack.model, stack.tokenizer, probes.prompts, probes.adapter) < 1e-5


def test_weights_of_one_are_what_a_stack_runs(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    compose([(p, 1.0) for p in dense_parts], tmp_path / "c", base=base_dir)
    stack = ForgetModel.from_pretrained(base_dir, dense_parts)
    assert torch.allclose(plain(tmp_path / "c", base_dir), logits(stack.model), atol=1e-5)


def test_negation_undoes(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    compose([(dense_parts[1], -1.0)], tmp_path / "minus", base=base_dir)
    both = ForgetModel.from_pretrained(base_dir, [dense_parts[1], tmp_path / "minus"])
    assert torch.allclose(logits(both.model), logits(load_base(base_dir)), atol=1e-6)
    with pytest.raises(UserError, match="sum is zero"):
        compose([(dense_parts[1], 0.5), (dense_parts[1], -0.5)], tmp_path / "zero", base=base_dir)
    compose([(dense_parts[1], 0.75), (dense_parts[1], 0.25)], tmp_path / "same", base=base_dir)
    assert read_adapter(tmp_path / "same").config["r"] == 3


def test_cut_to_a_rank(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    parts = [(dense_parts[0], 1.0), (dense_parts[1], -0.5), (dense_parts[2], 0.7)]
    want, _ = dense(parts, base_dir)
    last = 2.0
    for rank in (1, 3, 7, 10, 12):
        found = compose(parts, tmp_path / f"r{rank}", rank=rank, base=base_dir, probe=False)
        got, _ = dense([(tmp_path / f"r{rank}", 1.0)], base_dir)
        for name, error in found.errors.items():
            s = torch.linalg.svdvals(want[name])
            best = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt())
            assert error == pytest.approx(best, abs=1e-6)
            assert float((want[name] - got[name]).norm() / want[name].norm()) == pytest.approx(best, abs=1e-6)
        worst = max(found.errors.values())
        assert worst <= last and found.rank == rank
        last = worst
    assert last < 1e-6 and "relative error" in str(found)
    assert read_adapter(tmp_path / "r1").manifest.method["worst_error"] > 0.1


def test_experts(moe_dir: Path, moe_parts: list[Path], tmp_path: Path) -> None:
    x, y, _ = moe_parts
    found = compose([(x, 1.0), (y, -2.0)], tmp_path / "c", base=moe_dir)
    want, model = dense([(x, 1.0), (y, -2.0)], moe_dir)
    assert relative(want, dense([(tmp_path / "c", 1.0)], moe_dir)[0]) <= 1e-6
    assert torch.allclose(plain(tmp_path / "c", moe_dir), logits(model), atol=1e-5)
    assert torch.allclose(logits(ForgetModel.from_pretrained(moe_dir, tmp_path / "c").model), logits(model), atol=1e-5)
    # Expert 3 of layer 1 alone needs both ranks; the router of that layer 2 and, its delta being whole, 8.
    ranks = read_adapter(tmp_path / "c").config["rank_pattern"]
    assert {k: ranks[f"model.layers.{k}.mlp.experts.down_proj"] for k in (0, 1, 2)} == {0: 3, 1: 5, 2: 2}
    assert found.rank == 10
    cut = compose([(x, 1.0), (y, -2.0)], tmp_path / "cut", rank=2, base=moe_dir)
    got, _ = dense([(tmp_path / "cut", 1.0)], moe_dir)
    for name, error in cut.errors.items():
        assert float((want[name] - got[name]).norm() / want[name].norm()) == pytest.approx(error, abs=1e-6)


def test_lora_with_experts_is_one_stock_adapter(moe_dir: Path, moe_parts: list[Path], tmp_path: Path) -> None:
    parts = [(moe_parts[2], 1.5), (moe_parts[0], -1.0), (moe_parts[1], 0.5)]
    compose(parts, tmp_path / "c", base=moe_dir)
    want, model = dense(parts, moe_dir)
    assert relative(want, dense([(tmp_path / "c", 1.0)], moe_dir)[0]) <= 1e-6
    config = read_adapter(tmp_path / "c").config
    assert config["target_modules"] and config["target_parameters"]
    assert torch.allclose(plain(tmp_path / "c", moe_dir), logits(model), atol=1e-5)
    assert torch.allclose(logits(ForgetModel.from_pretrained(moe_dir, tmp_path / "c").model), logits(model), atol=1e-5)


def test_dependencies_go_along(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    below = read_adapter(dense_parts[0]).adapter_id
    lora(tmp_path / "top", base_dir, 8, depends_on=[below])
    found = compose([(tmp_path / "top", 2.0)], tmp_path / "alone", base=base_dir)
    assert found.folder.manifest.depends_on == [below] and not found.probed
    found = compose([(dense_parts[0], 1.0), (tmp_path / "top", 2.0)], tmp_path / "both", base=base_dir)
    assert found.folder.manifest.depends_on == [] and found.probed
    names = set(found.folder.manifest.data)
    assert "forget" in names and len(names) == 2  # two forget sets, and the second says whose it is


def test_sets_of_parts_with_one_name_are_all_kept(base_dir: Path, tmp_path: Path) -> None:
    parts = [lora(tmp_path / str(i), base_dir, i, name="same") for i in range(3)]
    made = compose([(p.path, 1.0) for p in parts], tmp_path / "sum", probe=False).folder
    assert {k: v["sha256"] for k, v in made.manifest.data.items()} == {
        k: p.manifest.data["forget"]["sha256"]
        for k, p in zip(("forget", "same/forget", "same/forget_2"), parts, strict=True)
    }


def test_without_a_base_there_are_no_probes(dense_parts: list[Path], base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--no-probes"):
        compose([(dense_parts[0], -1.0)], tmp_path / "c")
    assert compose([(dense_parts[0], -1.0)], tmp_path / "c", probe=False).folder.manifest.probes is None
    ForgetModel.from_pretrained(base_dir, tmp_path / "c")


def test_what_is_refused(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    good = dense_parts[0]
    write(tmp_path / "elsewhere", save_base(tmp_path / "otherbase", seed=9))
    for name, change in (
        ("dora", {"use_dora": True}), ("bias", {"bias": "all"}), ("lora_bias", {"lora_bias": True}),
        ("saved", {"modules_to_save": ["lm_head"]}), ("kind", {"peft_type": "IA3"}),
    ):  # fmt: skip
        shutil.copytree(good, tmp_path / name)
        edit(tmp_path / name, "adapter_config.json", lambda c, change=change: c.update(change))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    for parts, more, message in (
        ([(good, 1), (tmp_path / "dora", 1)], {}, "DoRA"),
        ([(tmp_path / "bias", 1)], {}, "biases"),
        ([(tmp_path / "lora_bias", 1)], {}, "LoRA bias"),
        ([(tmp_path / "saved", 1)], {}, "fully trained modules"),
        ([(tmp_path / "kind", 1)], {}, "type IA3"),
        ([(good, 1), (tmp_path / "elsewhere", 1)], {}, "different bases"),
        ([(good, float("nan"))], {}, "finite"),
        ([], {}, "at least one"),
        ([(good, 1)], {"rank": 0}, "rank must be"),
        ([(tmp_path / "nothing", 1)], {}, "no such folder"),
        ([(good, 1)], {"out": tmp_path / "taken"}, "not a complete forget adapter"),
    ):
        with pytest.raises(UserError, match=message):
            compose(parts, **{"out": tmp_path / "c", "base": base_dir, "probe": False, **more})
    assert not (tmp_path / "c").exists() and [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]


def test_an_existing_sum_is_replaced_and_never_kept(base_dir: Path, dense_parts: list[Path], tmp_path: Path) -> None:
    first = compose([(dense_parts[0], 1.0)], tmp_path / "c", base=base_dir, probe=False)
    second = compose([(dense_parts[0], -1.0)], tmp_path / "c", base=base_dir, probe=False)
    assert first.folder.adapter_id != second.folder.adapter_id == read_adapter(tmp_path / "c").adapter_id
    mine = Path(shutil.copytree(dense_parts[0], tmp_path / "mine"))
    with pytest.raises(UserError, match="an adapter that was trained"):
        compose([(mine, -1.0)], mine, base=base_dir, probe=False)
    assert read_adapter(mine).adapter_id == read_adapter(dense_parts[0]).adapter_id


def test_parts_as_they_are_typed() -> None:
    assert parse_part("out/a:-0.5") == ("out/a", -0.5) and parse_part("out/a") == ("out/a", 1.0)
    assert parse_part("me/x@" + "a" * 40 + ":1e-1") == ("me/x@" + "a" * 40, 0.1)
    for bad in (":1", "a:inf", "a:nan"):
        with pytest.raises(UserError, match="compose"):
            parse_part(bad)


def test_command(base_dir: Path, dense_parts: list[Path], tmp_path: Path, monkeypatch, capsys) -> None:
    import sys

    from peft_unlearn import cli

    a, b = dense_parts[:2]
    argv = [
        "compose",
        f"{a}:1",
        f"{b}:-0.5",
        "--out",
        str(tmp_path / "c"),
        "--rank",
        "2",
        "--base",
        str(base_dir),
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["peft-unlearn", *argv])
    try:
        cli.main()
    except SystemExit as e:
        assert not e.code
    said = json.loads(capsys.readouterr().out)
    assert said["rank"] == 2 and said["worst_error"] == max(said["errors"].values()) and said["probes"]
    assert str(tmp_path) not in (tmp_path / "c" / "README.md").read_text()


SHAPES = {"model.a": (5, 7), "model.b": (6, 4), "model.deep.c": (3, 9)}  # (out, in)
ONE = st.tuples(
    st.integers(1, 8),  # rank
    st.sampled_from([0.5, 1, 3, 16]),  # alpha
    st.booleans(),  # rank-stabilised
    st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
    st.integers(0, 2),  # extra rank of model.a
    st.sampled_from([-3.0, -1.0, -0.1, 0.7, 1.0, 2.0]),  # weight
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_=st.lists(ONE, min_size=1, max_size=5), cut=st.integers(1, 12), seed=st.integers(0, 99))
def test_sums_of_anything(adapter_dir: Path, tmp_path_factory, given_, cut: int, seed: int) -> None:
    """Random ranks, scalings, targets and signs, without a base: what would be written has the dense sum as its delta."""
    where = tmp_path_factory.mktemp("any")
    g = torch.Generator().manual_seed(seed)
    like = read_adapter(adapter_dir)
    folders, want = [], {}
    for i, (r, alpha, rs, targets, extra, weight) in enumerate(given_):
        tensors = {}
        for at in sorted(targets):
            rank = r + (extra if at == "model.a" else 0)
            out, inside = SHAPES[at]
            a, b = torch.randn(rank, inside, generator=g), torch.randn(out, rank, generator=g)
            tensors |= {f"base_model.model.{at}.lora_A.weight": a, f"base_model.model.{at}.lora_B.weight": b}
            scaling = alpha / (rank**0.5 if rs else rank)
            want[at] = want.get(at, 0) + weight * scaling * (b.double() @ a.double())
        (where / str(i)).mkdir()
        save_file(tensors, where / str(i) / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": alpha,
            "use_rslora": rs,
            "rank_pattern": {"model.a": r + extra},
        }
        folders.append((AdapterFolder(where / str(i), like.manifest, {}, config, None), weight))
    deltas = [Deltas(f) for f, _ in folders]
    sizes = {at: sum(abs(w) for (f, w), d in zip(folders, deltas, strict=True) if f"{at}.weight" in d) for at in want}
    for rank in (None, cut):
        rows = summed(deltas, [w for _, w in folders])
        errors = {} if rank is None else {n: row.cut(rank) for n, row in rows.items()}
        tensors, config = _stock(rows, folders)
        (where / f"sum{rank}").mkdir()
        save_file(tensors, where / f"sum{rank}" / "adapter_model.safetensors")
        got = Deltas(AdapterFolder(where / f"sum{rank}", like.manifest, {}, config.to_dict(), None))
        assert set(got) == {f"{at}.weight" for at in want}
        for at, d in want.items():
            found = delta(got, f"{at}.weight").double()
            if rank is None:
                assert float((found - d).norm()) <= 1e-6 * max(float(d.norm()), sizes[at])
            else:
                s = torch.linalg.svdvals(d)
                best = float(s[rank:].square().sum().sqrt())
                assert float((found - d).norm()) == pytest.approx(best, abs=1e-5 * max(float(d.norm()), sizes[at]))
                if float(d.norm()) > 1e-3:
                    assert errors[f"{at}.weight"] == pytest.approx(best / float(d.norm()), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "llama4_text"])
def test_other_families_of_experts(tmp_path: Path, family: str) -> None:
    """Transposed weights, biases, experts that lie one by one on disk, and those that say nothing of lying transposed."""
    base = save_moe(tmp_path / "base", family)
    expert(tmp_path / "x", base, 1, {1: [0, 3], 2: [2]})
    expert(tmp_path / "y", base, 2, {0: [1], 1: [3, 5]}, r=3)
    compose([(tmp_path / "x", 1.0), (tmp_path / "y", -2.0)], tmp_path / "c", base=base)
    want = ForgetModel.from_pretrained(base, [tmp_path / "x", tmp_path / "y"], scales=[1, -2])
    assert torch.allclose(plain(tmp_path / "c", base), logits(want.model), atol=1e-5)
    assert torch.allclose(
        logits(ForgetModel.from_pretrained(base, tmp_path / "c").model), logits(want.model), atol=1e-5
    )
    assert float((logits(want.model) - logits(load_base(base))).abs().max()) > 1e-2
