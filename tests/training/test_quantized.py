"""Bases in fewer bits: trained on, recognised, stacked, judged, taken off; what cannot be exact is refused before anything is loaded.

With bitsandbytes and torchao where they are installed (`pip install 'peft-unlearn[qlora]' torchao`); the rest needs neither.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import peft_unlearn
from peft_unlearn.errors import Errors, UserError
from peft_unlearn.folder import quantized
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.digest import digest_checkpoint, digest_live, plain_tensors
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack.model import ForgetModel, remove
from peft_unlearn.training.adapt import get_forget_model
from peft_unlearn.training.recipe import prepare

DATA = {"forget": tiny.rows(6, "f", seed=1), "retain": tiny.rows(6, "r", seed=2)}
TERMS = {"forget": {"npo": {"beta": 0.5}}, "retain": {"nll": {}}}
HELD = {"nf4": {"load_in_4bit": True}, "int8": {"load_in_8bit": True}, "torchao": {"torchao": "int8"}}


def _needs(options: dict[str, Any]) -> None:
    library = "torchao" if "torchao" in options else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "base"
    tiny.llama(0).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def recipe(place: Path, **over: Any) -> dict[str, Any]:
    for name, rows in DATA.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    train = {
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {
        "data": {n: str(place / f"{n}.jsonl") for n in DATA}, "adapter": {"type": "lora", "r": 4}, "terms": TERMS, "train": train, **over
    }  # fmt: skip


@pytest.fixture(scope="module", params=list(HELD))
def made(request: pytest.FixtureRequest, base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(options, the adapter's folder) of a run on a base held in that way."""
    options = HELD[request.param]
    _needs(options)
    place = tmp_path_factory.mktemp(request.param)
    peft_unlearn.train(recipe(place, base_options=options), place / "out", base=str(base_dir), progress=lambda _: None)
    return options, place / "out"


# --- with the libraries -----------------------------------------------------------------------------------------------


def test_the_manifest_says_what_it_was_trained_on(made: Any, base_dir: Path) -> None:
    options, out = made
    method = read_adapter(out).manifest.method
    held = method["quantized"]
    assert held["options"] == quantized.understood(options, Errors()) and held["dtype"] == "float32"
    assert held["digest"] == quantized.identity(digest_checkpoint(base_dir), held["options"], "float32")
    assert read_adapter(out).recipe["base_options"] == options
    assert held["probes"]["base"] != read_adapter(out).manifest.probes.base  # two precisions, two sets of logits


def test_it_verifies_on_both_precisions(made: Any, base_dir: Path) -> None:
    found = verify(made[1], base_dir)
    assert found.verdict == "ok", str(found)
    names = [c.name for c in found.checks]
    assert "probes, adapter on" in names and "probes, adapter on, quantized" in names
    said = next(c.detail for c in found.checks if c.name == "trained on")
    assert quantized.name_of(made[0]) in said and "float32" in said


def test_a_wrong_quantization_record_is_found(made: Any, base_dir: Path) -> None:
    place = made[1] / "forget.json"
    text = place.read_text()
    try:
        raw = json.loads(text)
        raw["method"]["quantized"]["digest"] = "0" * 64
        place.write_text(json.dumps(raw))
        found = verify(made[1], base_dir)
        assert found.verdict == "failed" and any(c.name == "quantized" and c.verdict == "failed" for c in found.checks)
    finally:
        place.write_text(text)


def test_it_runs_as_trained_and_on_the_files(made: Any, base_dir: Path) -> None:
    options, out = made
    ids = torch.tensor([[1, 5, 9, 20]])
    with torch.no_grad():
        low = ForgetModel.from_pretrained(base_dir, out, dtype="auto")
        full = ForgetModel.from_pretrained(base_dir, out, dtype="float32")
        assert quantized.options_of(low.model)[next(iter(options))] and not quantized.options_of(full.model)
        gap = (low.model(input_ids=ids).logits - full.model(input_ids=ids).logits).abs().max()
    assert 0 < float(gap) < 1
    report = low.remove()
    assert report.ok and report.quantized and "quantized again" in str(report), str(report)
    assert report.probe_difference is not None and report.probe_difference < 1e-5
    assert "quantized" not in remove(out, base_dir).to_dict()


def test_a_changed_tensor_is_seen(made: Any, base_dir: Path) -> None:
    model = load_base(base_dir, options=quantized.understood(made[0], Errors()))
    assert digest_live(model, base_dir).verdict == "same"
    name = next(n for n in plain_tensors(model) if "q_proj" in n and n.endswith(("weight", "qdata")))
    tensor = plain_tensors(model)[name]
    tensor.view(torch.int8).reshape(-1)[0] ^= 1
    found = digest_live(model, base_dir)
    assert found.verdict == "changed" and found.changed == [name] and "quantized again" in str(found.reason)


def test_two_on_one_base_and_one_comes_off(made: Any, base_dir: Path, tmp_path: Path) -> None:
    options, out = made
    again = recipe(tmp_path, base_options=options, seed=5)
    peft_unlearn.train(again, tmp_path / "two", base=str(base_dir), progress=lambda _: None)
    stack = ForgetModel.from_pretrained(base_dir, {"a": out, "b": tmp_path / "two"}, dtype="auto")
    assert stack.remove("a").ok and stack.active() == ["b"]
    full = recipe(tmp_path, seed=6)
    peft_unlearn.train(full, tmp_path / "full", base=str(base_dir), progress=lambda _: None)
    with pytest.raises(UserError, match=r"several ways .*b: floating point.*--dtype"):
        ForgetModel.from_pretrained(base_dir, {"a": out, "b": tmp_path / "full"}, dtype="auto")
    ForgetModel.from_pretrained(base_dir, {"a": out, "b": tmp_path / "full"}, dtype="float32")


def test_other_adapters_are_refused_on_it(made: Any, base_dir: Path) -> None:
    model = load_base(base_dir, options=quantized.understood(made[0], Errors()))
    with pytest.raises(UserError, match=r"adapter.type ia3 is refused on a base in (nf4|int8)"):
        get_forget_model(model, {"type": "ia3", "target_modules": ["q_proj"], "feedforward_modules": []})


def test_settings_that_a_recipe_cannot_say_are_refused(base_dir: Path) -> None:
    _needs(HELD["int8"])
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    odd = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.0)
    model = AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=odd)
    with pytest.raises(UserError, match="cannot be repeated"):
        get_forget_model(model)


# --- without ----------------------------------------------------------------------------------------------------------


def test_a_missing_library_is_named_before_anything_is_loaded(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    for options, library in (({"load_in_4bit": True}, "bitsandbytes"), ({"torchao": "int8"}, "torchao")):
        with pytest.raises(UserError, match=f"needs the library {library}.*pip install {library}"):
            prepare(recipe(tmp_path, base_options=options), tmp_path / "out", base=str(base_dir))


def test_every_complaint_about_base_options_at_once(base_dir: Path, tmp_path: Path) -> None:
    wrong = {"load_in_4bits": True, "load_in_8bit": "yes", "bnb_4bit_quant_type": "nf5"}
    with pytest.raises(UserError) as e:
        prepare(recipe(tmp_path, base_options=wrong), tmp_path / "out", base=str(base_dir))
    for part in ("no 'load_in_4bits'. Did you mean 'load_in_4bit'", "load_in_8bit must be true or false", "nf4 or fp4"):
        assert part in str(e.value), str(e.value)


def test_what_needs_the_weights_as_numbers_is_refused_with_the_reason(base_dir: Path, tmp_path: Path) -> None:
    given = recipe(
        tmp_path,
        base_options={"load_in_4bit": True},
        adapter={"type": "ia3", "target_modules": ["q_proj"], "feedforward_modules": []},
        smoothing={"sam": {"rho": 0.01, "space": "base"}},
    )
    with pytest.raises(UserError) as e:
        prepare(given, tmp_path / "out", base=str(base_dir))
    assert "adapter.type ia3 does not work on a base in nf4 (bitsandbytes)" in str(e.value)
    assert "smoothing in space base moves the weights" in str(e.value)


def test_two_ways_at_once_and_options_of_the_other_way() -> None:
    errors = Errors()
    quantized.understood({"load_in_4bit": True, "torchao": "int8", "bnb_4bit_use_double_quant": True}, errors)
    assert "load_in_4bit and torchao are two ways" in errors.messages[0] and len(errors.messages) == 2


def test_a_damaged_record_is_an_error() -> None:
    for record in ("nf4", {"options": {"load_in_4bit": True}}, {"options": {"hqq": True}, "dtype": "float32"}):
        with pytest.raises(UserError, match="names no quantized base that this version knows"):
            quantized.trained_on({"quantized": record})


def test_merging_asks_onto_which_base_and_prints_both_losses(made: Any, base_dir: Path, tmp_path: Path) -> None:
    options, out = made
    data = str(out.parent)
    with pytest.raises(UserError, match=r"--onto original .*--onto dequantized"):
        peft_unlearn.merge(out, base_dir, tmp_path / "m", data=data)
    ids = torch.tensor([[1, 5, 9, 20]])
    for onto in ("original", "dequantized"):
        report = peft_unlearn.merge(out, base_dir, tmp_path / onto, onto=onto, data=data)
        assert report.losses is not None and set(report.losses["merged"]) == {"forget", "retain"}
        assert "merged: forget loss" in str(report) and quantized.name_of(options) in str(report)
    assert not list(tmp_path.glob(".dequantized*"))
    with torch.no_grad():
        full = ForgetModel.from_pretrained(base_dir, out, dtype="float32").model(input_ids=ids).logits
        low = ForgetModel.from_pretrained(base_dir, out, dtype="auto").model(input_ids=ids).logits
        merged = {k: load_base(tmp_path / k)(input_ids=ids).logits for k in ("original", "dequantized")}
    assert torch.allclose(merged["original"], full, atol=1e-5)
    # int8 of bitsandbytes rounds what goes into a layer too, which no weights can say
    assert torch.allclose(merged["dequantized"], low, atol=2e-2 if "load_in_8bit" in options else 1e-5)
    if "load_in_8bit" not in options:
        unmerged = next(v for k, v in report.losses.items() if k.startswith("unmerged"))
        assert report.losses["merged"] == pytest.approx(unmerged, abs=1e-4)


def test_dequantized_is_refused_for_other_adapters(base_dir: Path, tmp_path: Path) -> None:
    peft_unlearn.train(recipe(tmp_path), tmp_path / "out", base=str(base_dir), progress=lambda _: None)
    with pytest.raises(UserError, match="trained on a quantized base, and these were not"):
        peft_unlearn.merge(tmp_path / "out", base_dir, tmp_path / "m", onto="dequantized")


def test_attacks_leave_a_quantized_base_as_it_was(made: Any, base_dir: Path) -> None:
    from peft_unlearn.attacks.weights import opened

    stack = ForgetModel.from_pretrained(base_dir, made[1], dtype="auto")
    with opened(stack.model, {}) as adapter:
        assert adapter == "live"
    assert digest_live(stack.model, base_dir).verdict == "same"
