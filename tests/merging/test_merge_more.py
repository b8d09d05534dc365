"""Several adapters, other weights, what stands beside the merged weights, and every input that is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stacks import delta
from tinyfolder import adapted, logits, save_base, write
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from peft_unlearn.cli import app
from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.merge_record import read_record
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.safetensors_io import INDEX, checkpoint_tensors
from peft_unlearn.merging.gate import MergeRefused
from peft_unlearn.merging.merge import merge
from peft_unlearn.stack.stackfile import add, revoke
from peft_unlearn.tuners.delta import Deltas


@pytest.fixture(scope="module")
def second(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("second") / "other"
    write(out, base_dir, seed=5)
    return out


def copied(folder: Path, out: Path, unhashed: str = "") -> Path:
    """A copy to damage; `unhashed` is a file that its manifest says nothing of."""
    shutil.copytree(folder, out)
    if unhashed:
        manifest = json.loads((out / "forget.json").read_text())
        manifest["files"][unhashed] = None
        (out / "forget.json").write_text(json.dumps(manifest))
    return out


def configured(folder: Path, out: Path, **config: Any) -> Path:
    copied(folder, out, "adapter_config.json")
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return out


def test_a_sum_of_two_with_signs(base_dir: Path, adapter_dir: Path, second: Path, tmp_path: Path) -> None:
    report = merge({"a": adapter_dir, "b": second}, base_dir, tmp_path / "m", "float32", scale={"a": 2.0, "b": -0.5})
    base, found = (load_file(d / "model.safetensors") for d in (base_dir, tmp_path / "m"))
    a, b = Deltas(read_adapter(adapter_dir)), Deltas(read_adapter(second))
    for name in a:
        wanted = base[name].double() + 2 * delta(a, name).double() - 0.5 * delta(b, name).double()
        assert torch.allclose(found[name].double(), wanted, atol=1e-6)
    assert report.scale == {"a": 2.0, "b": -0.5} and "a 2, b -0.5" in str(report)
    record = read_record(tmp_path / "m") or {}
    assert [(r["name"], r["scale"]) for r in record["adapters"]] == [("a", 2.0), ("b", -0.5)]
    assert record["digest"] == report.digest == digest_checkpoint(tmp_path / "m") and len(record["layers"]) == 4
    assert record["base"]["digest"] == digest_checkpoint(base_dir) == report.base_digest


@pytest.mark.parametrize("named", ["forget-stack.yaml", "prod", "folder"])
def test_a_stack_file(named: str, base_dir: Path, adapter_dir: Path, second: Path, tmp_path: Path) -> None:
    file = tmp_path / named
    if named == "folder":
        file.mkdir()
    add(file, adapter_dir, request_id="1", reason="r", name="a")
    add(file, second, request_id="2", reason="r", name="b", scale=0.5)
    merge(file, base_dir, tmp_path / "m")
    merge({"a": adapter_dir, "b": second}, base_dir, tmp_path / "n", scale={"b": 0.5})
    assert digest_checkpoint(tmp_path / "m") == digest_checkpoint(tmp_path / "n")
    revoke(file, "b")
    merge(file, base_dir, tmp_path / "o")
    merge(adapter_dir, base_dir, tmp_path / "p")
    assert digest_checkpoint(tmp_path / "o") == digest_checkpoint(tmp_path / "p") != digest_checkpoint(tmp_path / "m")
    revoke(file, "a")
    with pytest.raises(UserError, match="no adapter of this stack is active"):
        merge(file, base_dir, tmp_path / "q")


def test_sharded_and_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie=True, shard="1KB")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/model", "auto_map": {"x": "y"}}))
    write(tmp_path / "a", base)
    report = merge(tmp_path / "a", base, tmp_path / "m", dtype="bfloat16")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    entries = checkpoint_tensors(tmp_path / "m")
    assert index["weight_map"] == json.loads((base / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(e.end - e.begin for e in entries.values())
    assert set(entries) == set(checkpoint_tensors(base)) and "lm_head.weight" not in entries
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits(model), logits(adapted(base)), atol=0.02) and report.worst_cosine > 0.99
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["dtype"] == "bfloat16" and not {"_name_or_path", "auto_map"} & set(written)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == len(AutoTokenizer.from_pretrained(base))
    for path in (tmp_path / "m").iterdir():
        assert b"/home/me" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()
    with open(next((tmp_path / "m").glob("*.safetensors")), "rb") as f:
        assert json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"] == {"format": "pt"}


def test_mixed_dtypes_stay_aligned(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A float32 norm of odd length before others, and an integer: cast, sorted, and read by safetensors itself."""
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(3, dtype=torch.int64)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    write(tmp_path / "a", base)
    merge(tmp_path / "a", base, tmp_path / "m", dtype="float16")
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert {n: t.dtype for n, t in found.items() if t.dtype != torch.float16} == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.int64
    }
    assert torch.equal(found["model.norm.weight"], tensors["model.norm.weight"].half())


def test_stochastic_rounding_keeps_small_changes_in_the_mean(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    write(tmp_path / "small", base, size=3e-5)
    with pytest.raises(MergeRefused, match="--rounding stochastic"):
        merge(tmp_path / "small", base, tmp_path / "m", dtype="bfloat16")
    how: dict[str, Any] = {"dtype": "bfloat16", "rounding": "stochastic"}
    with pytest.raises(MergeRefused, match="noise of rounding") as refused:  # some hundred weights a layer: too few
        merge(tmp_path / "small", base, tmp_path / "m", **how)
    assert "--rounding stochastic" not in str(refused.value)
    how["force"] = True
    deltas, before = Deltas(read_adapter(tmp_path / "small")), load_file(base / "model.safetensors")
    kept: dict[str, list[torch.Tensor]] = {n: [] for n in deltas}
    runs = 12
    for seed in range(runs):
        report = merge(tmp_path / "small", base, tmp_path / f"m{seed}", seed=seed, **how)
        merged = load_file(tmp_path / f"m{seed}" / "model.safetensors")
        for name in kept:
            kept[name].append(merged[name].double() - before[name].double())
    assert "gain" in str(report) and "low by nature" in str(report) and (report.worst_cosine or 0) < 0.9
    assert all(torch.equal(merged[n], before[n]) for n in before if n not in kept)
    for name, found in kept.items():
        d = delta(deltas, name).double()
        gains = torch.stack([(k * d).sum() / d.norm() ** 2 for k in found])
        assert abs(gains.mean() - 1) < 5 * gains.std() / runs**0.5 + 1e-3, name
        assert gains.std() > 0.02  # single runs do scatter: that the mean is right says something
    same = merge(tmp_path / "small", base, tmp_path / "again", seed=3, **how)
    assert same.digest == digest_checkpoint(tmp_path / "m3") != digest_checkpoint(tmp_path / "m4")


def test_a_layer_that_was_not_moved_and_what_a_killed_run_left(
    adapter_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    weights = "adapter_model.safetensors"
    still = copied(adapter_dir, tmp_path / "still", weights)
    name = "layers.1.mlp.down_proj"
    save_file(
        {n: torch.zeros_like(t) if name in n and "lora_B" in n else t for n, t in load_file(still / weights).items()},
        still / weights,
    )
    report = merge(still, base_dir, tmp_path / "m", dtype="bfloat16")
    (row,) = [r for r in report.layers if name in r.name]
    assert (row.cosine, row.gain, row.changed, row.relative) == (None, None, 0.0, 0.0) and "none" in str(report)
    left = tmp_path / ".m.merge-0123456789abcdef"  # killed after the rename: its journal is all there is
    (left / "journal").mkdir(parents=True)
    with pytest.raises(UserError, match="never replaces"):
        merge(still, base_dir, tmp_path / "m", dtype="float16")
    assert not left.exists()


def test_onto_other_weights(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    """A quantized base, written back as floats: the sum is made on its numbers, and the record says so."""
    onto = tmp_path / "quantized"
    shutil.copytree(base_dir, onto)
    tensors = {n: (t.float() * 16).round().div(16).bfloat16() for n, t in load_file(onto / "model.safetensors").items()}
    save_file(tensors, onto / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="other weights"):
        merge(adapter_dir, onto, tmp_path / "m")
    merge(adapter_dir, out=tmp_path / "m", onto=onto, dtype="float32")
    deltas = Deltas(read_adapter(adapter_dir))
    found = load_file(tmp_path / "m" / "model.safetensors")
    for name, t in tensors.items():
        assert torch.allclose(found[name], t.float() + (delta(deltas, name) if name in deltas else 0), atol=1e-6)
    record = read_record(tmp_path / "m") or {}
    assert record["onto"] == digest_checkpoint(onto) != record["base"]["digest"]


def test_a_base_that_is_damaged(adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    sharded = save_base(tmp_path / "base", shard="1KB")
    shards = sorted(sharded.glob("*.safetensors"))

    def damaged(name: str, change: Any) -> Path:
        out = tmp_path / name
        shutil.copytree(sharded, out)
        change(out)
        return out

    def index(change: Any) -> Any:
        def run(out: Path) -> None:
            value = json.loads((out / INDEX).read_text())
            change(value["weight_map"])
            (out / INDEX).write_text(json.dumps(value))

        return run

    def flip(out: Path) -> None:
        raw = bytearray((out / shards[3].name).read_bytes())
        raw[-1] ^= 64
        (out / shards[3].name).write_bytes(bytes(raw))

    key = "model.layers.0.self_attn.q_proj.weight"
    for name, change, message in (
        ("short", lambda o: (o / shards[2].name).write_bytes(shards[2].read_bytes()[:-7]), "truncated"),
        ("gone", lambda o: (o / shards[2].name).unlink(), "is missing"),
        ("flipped", flip, "other weights"),
        ("outside", index(lambda w: w.update({key: "../../x.safetensors"})), "leaves the folder"),
        ("wrong", index(lambda w: w.update({key: w["lm_head.weight"]})), "not in the shard named"),
        ("fewer", index(lambda w: w.pop(key)), "--in-memory"),
        ("notjson", lambda o: (o / INDEX).write_text("{"), "not a readable index"),
    ):
        with pytest.raises(UserError, match=message):
            merge(adapter_dir, damaged(name, change), tmp_path / "m")
        assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*")), name


def test_an_adapter_that_is_damaged_or_no_sum(adapter_dir: Path, base_dir: Path, tmp_path: Path) -> None:
    weights = adapter_dir / "adapter_model.safetensors"
    flipped = copied(adapter_dir, tmp_path / "flipped")
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    (flipped / weights.name).write_bytes(bytes(raw))
    narrow = copied(adapter_dir, tmp_path / "narrow", weights.name)
    cut = {n: (t[:-1] if "q_proj.lora_B" in n else t).contiguous() for n, t in load_file(weights).items()}
    save_file(cut, narrow / weights.name)
    for folder, message in (
        (flipped, "is not the file that was written"),
        (narrow, "the adapter's delta for it is"),
        (configured(adapter_dir, tmp_path / "rank", r=3), "do not fit the rank 3"),
        (configured(adapter_dir, tmp_path / "regex", rank_pattern={"(": 2}), "no pattern"),
        (configured(adapter_dir, tmp_path / "m2s", modules_to_save=["lm_head"]), "fully trained modules"),
        (configured(adapter_dir, tmp_path / "tok", trainable_token_indices=[1]), "trained token embeddings"),
        (configured(adapter_dir, tmp_path / "lb", lora_bias=True), "a LoRA bias"),
        (configured(adapter_dir, tmp_path / "pissa", init_lora_weights="pissa"), "changes the base's weights"),
    ):
        with pytest.raises(UserError, match=message):
            merge(folder, base_dir, tmp_path / "m")
        assert not (tmp_path / "m").exists()


def test_requests_that_make_no_sense(adapter_dir: Path, base_dir: Path, second: Path, tmp_path: Path) -> None:
    merge(adapter_dir, base_dir, tmp_path / "done")
    quantized = tmp_path / "quantized"
    shutil.copytree(base_dir, quantized)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    (tmp_path / "file").touch()
    foreign = tmp_path / "foreign"
    write(foreign, save_base(tmp_path / "otherbase", seed=9))
    for args, message in (
        ((second, tmp_path / "done", tmp_path / "m"), "itself a merged model"),
        ((adapter_dir, quantized, tmp_path / "m"), r"quantized \(mxfp4\)"),
        ((adapter_dir, base_dir, tmp_path / "file"), "is a file"),
        ((adapter_dir, base_dir, tmp_path / "m", "float32", 0.0), "every scale is 0"),
        ((adapter_dir, base_dir, tmp_path / "m", "float32", float("nan")), "finite"),
        (([adapter_dir, second], base_dir, tmp_path / "m", "float32", 1.0), "1 given for 2"),
        (([adapter_dir, foreign], base_dir, tmp_path / "m"), "different bases"),
        (
            (adapter_dir, base_dir, tmp_path / "m", "float16", 1e8),
            r"down_proj.weight: the merged weight does not fit float16",
        ),
    ):
        with pytest.raises(UserError, match=message):
            merge(*args)
    with pytest.raises(UserError, match="nothing is rounded"):
        merge(adapter_dir, base_dir, tmp_path / "m", "float32", rounding="stochastic")
    with pytest.raises(UserError, match="expected one of nearest"):
        merge(adapter_dir, base_dir, tmp_path / "m", rounding="up")
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


def test_the_command(adapter_dir: Path, base_dir: Path, second: Path, tmp_path: Path) -> None:
    run = CliRunner()

    def call(*args: Any) -> Any:
        return run.invoke(app, ["merge", *map(str, args), "--base", str(base_dir)])

    found = call(
        adapter_dir, second, "--out", tmp_path / "m", "--scale", "forget=1", "--scale", "other=-1", "--check", "--json"
    )
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout[found.stdout.index("{") :])
    assert report["check"]["difference"] < 1e-4 < report["check"]["effect"] and report["check"]["same_top"] == 4
    assert report["scale"] == {"forget": 1.0, "other": -1.0} and report["digest"] == digest_checkpoint(tmp_path / "m")
    text = call(adapter_dir, "--out", tmp_path / "n", "--scale", "2", "--dtype", "bfloat16").stdout
    assert "stored as bfloat16, scale 2" in text and "cosine" in text
    for args, message in (
        ((), "name the adapters' folders"),
        ((adapter_dir, "--out", "x", "--scale", "two"), "expected a number"),
        ((adapter_dir, "--out", "x", "--scale", "1", "--scale", "2"), "say whose"),
        ((adapter_dir, "--out", "x", "--scale", "a=1", "--scale", "a=2"), "given twice"),
    ):
        assert message in str(call(*args).exception)
