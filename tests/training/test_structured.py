"""Structures of a LoRA chosen by scores of the base's weights, and FILA's start: ordinary LoRAs of which the rest never moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_unlearn
from peft_unlearn.attribution.weights import select
from peft_unlearn.errors import UserError
from peft_unlearn.training import fila
from peft_unlearn.training.mask import UpdateMask
from peft_unlearn.training.structured import shared_out
from peft_unlearn.tuners.selection import Selection

QUIET = {"progress": lambda *_: None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    tiny.llama().save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> dict[str, Any]:
    for name, n, seed in (("forget", 6, 1), ("retain", 6, 2)):
        text = "\n".join(json.dumps(r) for r in tiny.rows(n, name[0], seed))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {
        "name": "test", "base": str(base), "data": {n: str(tmp_path / f"{n}.jsonl") for n in ("forget", "retain")},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "terms": {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}},
        "train": {
            "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "steps",
            "save_steps": 2, "weight_decay": 0.1,
        },
        "seed": 3,
    }  # fmt: skip


def trained(recipe: dict[str, Any], out: Path, **more: Any) -> dict[str, torch.Tensor]:
    peft_unlearn.train(recipe, out, **QUIET, **more)  # type: ignore[arg-type]
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("unit", ["row", "column"])
def test_only_the_chosen_rows_or_columns_move(recipe: dict[str, Any], tmp_path: Path, unit: str) -> None:
    found = trained(recipe | {"selection": {"method": "wagle", "ratio": 0.2, "unit": unit}}, tmp_path / "out")
    kept = Selection.load(tmp_path / "out.work/selection.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    chosen = {n.removesuffix(".weight") for n, i in kept.indices.items() if len(i)}
    assert {k.split(".lora_")[0].removeprefix("base_model.model.") for k in found} == chosen and config["r"] == 4
    for name in chosen:
        mask = torch.zeros(kept.shapes[f"{name}.weight"], dtype=torch.bool)
        mask.view(-1)[kept.indices[f"{name}.weight"]] = True
        a, b = (found[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        delta = b @ a
        if unit == "row":
            assert not b[~mask.any(1)].any() and bool(b[mask.any(1)].any(1).all()), "weight decay included"
            assert not delta[~mask].any()
        else:
            start = tiny_start(recipe, chosen)[name]
            assert torch.equal(a[:, ~mask.any(0)], start[:, ~mask.any(0)]), "bit for bit, weight decay included"
            assert not torch.equal(a[:, mask.any(0)], start[:, mask.any(0)])


def tiny_start(recipe: dict[str, Any], chosen: set[str]) -> dict[str, torch.Tensor]:
    """A of the untrained adapter."""
    from transformers import set_seed

    model = AutoModelForCausalLM.from_pretrained(recipe["base"])
    set_seed(recipe["seed"])
    adapted = peft_unlearn.get_forget_model(model, {"r": 4, "lora_alpha": 8, "target_modules": sorted(chosen)})
    return {n: adapted.get_base_model().get_submodule(n).lora_A["default"].weight.detach() for n in chosen}


def test_ranks_follow_the_scores(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = trained(recipe | {"selection": {"method": "snip", "unit": "rank"}}, tmp_path / "out")
    ranks = {
        k.split(".lora_A")[0].removeprefix("base_model.model."): t.shape[0] for k, t in found.items() if "lora_A" in k
    }
    scores = Selection.load(tmp_path / "out.work/selection.safetensors").about["scores"]
    assert sum(ranks.values()) == 4 * len(scores) and len(set(ranks.values())) > 1
    best = max(scores, key=lambda n: scores[n]).removesuffix(".weight")
    assert ranks[best] == max(ranks.values())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(recipe["base"]), str(tmp_path / "out"))
    layers = [
        m for n, m in model.named_modules() if hasattr(m, "lora_A") and n.removeprefix("base_model.model.") in ranks
    ]
    assert {m.scaling["default"] for m in layers} == {2.0}, "alpha / r is the same everywhere"


def test_modules_are_whole(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = trained(recipe | {"selection": {"method": "gradient", "ratio": 0.3, "unit": "module"}}, tmp_path / "out")
    assert len({k.split(".lora_")[0] for k in found}) == int(0.3 * 14)


def test_ranks_are_shared_out_to_the_last(recipe: dict[str, Any]) -> None:
    shapes = {"a": (64, 3), "b": (64, 64), "c": (64, 64)}
    assert shared_out(12, {"a": 1.0, "b": 1.0, "c": 4.0}, shapes) == {"a": 3, "b": 3, "c": 6}
    assert shared_out(20, {"a": 100.0, "b": 1.0, "c": 1.0}, shapes) == {"a": 3, "b": 9, "c": 8}
    assert shared_out(9, {"a": 0.0, "b": 0.0, "c": 0.0}, shapes) == {"a": 3, "b": 3, "c": 3}
    assert sum(shared_out(1000, {"a": 1.0, "b": 2.0, "c": 3.0}, shapes).values()) == 3 + 64 + 64
    assert shared_out(2, {"a": 0.0, "b": 0.0, "c": 1.0}, shapes) == {"a": 0, "b": 0, "c": 2}


@pytest.mark.slow
def test_resumed_bit_for_bit_with_both_masks(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"selection": {"method": "wagle", "ratio": 0.2, "unit": "row"}}
    recipe["adapter"]["init_lora_weights"] = "fila"
    whole = trained(recipe, tmp_path / "out")
    shutil.rmtree(tmp_path / "out.work/checkpoint-4")
    again = trained(recipe, tmp_path / "out", resume=True)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    halves = [b.chunk(2, 1) for n, b in whole.items() if "lora_B" in n]
    still = torch.cat(
        [(ours == -theirs).all(1) for ours, theirs in halves]
    )  # rows that were not chosen are as FILA left them
    assert 0 < int(still.sum()) < len(still)


@pytest.mark.parametrize("clip_first", [False, True])
def test_clipping_before_or_after_the_mask(clip_first: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    mask = UpdateMask({p: torch.tensor([True, True, False, False])}, clip_first)
    p.grad = torch.tensor([3.0, 4.0, 0.0, 12.0])
    mask.on_gradient()
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    mask.on_pre_optimizer_step(None, None, None)
    assert torch.allclose(p.grad, torch.tensor([3.0, 4.0, 0.0, 0.0]) / (13.0 if clip_first else 5.0))


# --- FILA -------------------------------------------------------------------------------------------------------------


def test_factors_are_the_weighted_best_of_their_rank() -> None:
    g = torch.Generator().manual_seed(0)
    w, importance = torch.randn(12, 9, generator=g), torch.rand(12, 9, generator=g) + 0.1
    a, b = fila.factors(w, importance, 3, 2.0)
    assert a.shape == (3, 9) and b.shape == (12, 3)
    rho = importance.double().sum(1).sqrt()[:, None]
    u, s, vt = torch.linalg.svd(rho * w.double())
    want = (u[:, :3] * s[:3]) @ vt[:3] / (rho + fila.EPS)
    assert torch.allclose(2.0 * (b @ a).double(), want, atol=1e-5)
    full = fila.factors(w, importance, 9, 2.0)
    assert torch.allclose(2.0 * full[1] @ full[0], w, atol=1e-3), "at full rank all of W"
    with pytest.raises(UserError, match="wants rank 10 of a weight that has 9"):
        fila.factors(w, importance, 10, 2.0)


def test_fila_starts_at_the_base_and_ends_as_a_lora_on_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    adapter = {**recipe["adapter"], "init_lora_weights": "fila"}
    seen: dict[str, Any] = {}

    from transformers import TrainerCallback

    class Start(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            ids = torch.arange(3, 40)[None]
            with torch.no_grad():
                seen["start"] = model(input_ids=ids).logits
                with model.disable_adapter():
                    seen["base"] = model(input_ids=ids).logits
            seen["factors"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    done = peft_unlearn.train({**recipe, "adapter": adapter}, tmp_path / "out", callbacks=[Start()], **QUIET)  # type: ignore[arg-type]
    assert done is not None
    plain = AutoModelForCausalLM.from_pretrained(recipe["base"])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = plain(input_ids=ids).logits
        assert torch.equal(seen["base"], base), "with the adapter off it is the base"
        assert torch.allclose(seen["start"], base, atol=1e-4) and not torch.equal(seen["start"], base)
        found = load_file(tmp_path / "out/adapter_model.safetensors")
        for live, start in seen["factors"].items():
            end = found[live.replace(".default", "")]
            along = 0 if "lora_A" in live else 1
            ours, theirs = start.chunk(2, along), end.chunk(2, along)
            assert torch.equal(ours[0].abs(), ours[1].abs()), "the same factors twice, B with both signs"
            assert torch.equal(theirs[1], ours[1]) and not torch.equal(theirs[0], ours[0])
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
        assert loaded.peft_config["default"].r == 8  # type: ignore[attr-defined]
        want = base_with(recipe, found)(input_ids=ids).logits
        assert torch.allclose(loaded(input_ids=ids).logits, want, atol=1e-5)
    assert peft_unlearn.verify(str(tmp_path / "out"), base=recipe["base"]).exit_code == 0


def base_with(recipe: dict[str, Any], found: dict[str, torch.Tensor]) -> Any:
    """W + s (B A - B0 A0), added up by hand."""
    model = AutoModelForCausalLM.from_pretrained(recipe["base"])
    for key, a in found.items():
        if "lora_A" in key:
            b = found[key.replace("lora_A", "lora_B")]
            w = model.get_parameter(key.split(".lora_A")[0].removeprefix("base_model.model.") + ".weight")
            w.data += 2.0 * (b @ a)
    return model


def test_entries_of_a_fila_start_can_be_ranked(base: Path) -> None:
    """What the refusal of a fresh LoRA offers works."""
    from peft_unlearn.data.collate import encode

    tok = tiny.tokenizer()
    rows = {
        n: [encode(f"{r['question']}\n", r["answer"], tok)[0] for r in tiny.rows(4, n)] for n in ("forget", "retain")
    }
    model = tiny.lora(tiny.llama(), moved=False)
    fila.start(model, "default", rows["forget"], rows["retain"])
    found = select(model, rows, method="snip", ratio=0.1, space="adapter")
    assert found.density == pytest.approx(0.1, rel=2e-3)


# --- bad input --------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"selection": {"method": "wagle", "ratio": 0.1, "unit": "entry"}}, "where B is zero A has no gradient"),
    ({"selection": {"method": "wagle", "unit": "row"}}, r"selection.ratio 0.0 must lie in \(0, 1\]"),
    ({"selection": {"method": "wagle", "ratio": 0.1, "unit": "rank"}}, "leaves none out by a ratio"),
    ({"selection": {"method": "wagle", "ratio": 0.1, "refresh": 3}}, "selection.refresh goes with adapter.type sparse"),
    ({"selection": {"method": "wagle", "ratio": 0.1, "clip": "never"}}, "selection.clip"),
    ({"selection": {"method": "wagle", "ratio": 0.1, "gama": 1}}, "gama"),
    ({"selection": "wagle"}, "settings are a mapping"),
    ({"adapter": {"type": "lora", "init_lora_weights": "fila", "use_dora": True}}, "use_dora: init_lora_weights fila"),
    ({"adapter": {"type": "sparse", "init_lora_weights": "fila"}, "selection": {"method": "random", "ratio": 0.1}}, "init_lora_weights"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), REFUSED)
def test_refused_before_anything_is_loaded(
    recipe: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        peft_unlearn.train({**recipe, **wrong}, tmp_path / "out", **QUIET)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
