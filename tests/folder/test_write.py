"""The adapter's folder is whole or absent, says nothing about this machine, and plain PEFT loads it."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zygote
from safetensors.torch import load_file, save_file
from tinyfolder import RECIPE, adapted, logits, manifest_for, tokenizer, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder import atomic
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import update_eval, write_adapter

EVAL = {"format": 1, "suite": "people", "subjects": {"base": {"forget/value_accuracy": 0.99}, "adapter": {}}}


def test_exactly_these_files_and_no_machine_path(base_dir: Path, tmp_path: Path) -> None:
    model = adapted(base_dir)
    out = tmp_path / "out"
    recipe = {**RECIPE, "base": str(base_dir), "data": {"forget": str(tmp_path / "f.jsonl")}}
    got = write_adapter(out, model, manifest_for(model, base_dir), recipe, tokenizer=tokenizer(), eval_json=EVAL)
    tokens = {"tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in out.iterdir()} == tokens | {
        "adapter_config.json", "adapter_model.safetensors", "forget.json", "recipe.yaml", "eval.json", "README.md"
    }  # fmt: skip
    for path in out.iterdir():
        text = path.read_bytes()
        for place in (base_dir, tmp_path, Path.home(), Path.cwd()):
            assert str(place).encode() + b"/" not in text and f'{place}"'.encode() not in text, (path.name, place)
    assert got.config["base_model_name_or_path"] == "" and got.recipe["base"] == got.manifest.base.ref
    assert got.recipe["data"]["forget"] == "sha256:" + "a" * 64 and got.eval == {**EVAL, "adapter_id": got.adapter_id}
    assert list(tmp_path.iterdir()) == [out]
    card = (out / "README.md").read_text()
    assert "suppresses" in card and "delete" not in card and "| base model | 0.99 |" in card


def test_same_input_same_bytes(base_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "a", base_dir)
    write(tmp_path / "b", base_dir)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_names_of_the_base_in_adapter_config(base_dir: Path, tmp_path: Path) -> None:
    model = adapted(base_dir, name="other")
    manifest = manifest_for(model, base_dir)
    for ref, revision, name in (
        ("embedded:people", None, "peft-unlearn/people"),
        ("org/model", "0" * 40, "org/model"),
        (manifest.base.ref, None, ""),
    ):
        manifest.base.ref, manifest.base.revision = ref, revision
        got = write_adapter(tmp_path / "out", model, manifest, RECIPE, adapter_name="other")
        assert (got.config["base_model_name_or_path"], got.config["revision"]) == (name, revision)
    assert not (tmp_path / "out" / "other").exists()


def test_plain_peft_gives_the_same_logits(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    code = f"""
import importlib.util, sys
assert importlib.util.find_spec("peft_unlearn") is None
import torch
torch.set_num_threads(1)
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(base_dir)!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(adapter_dir)!r}).eval()
with torch.no_grad():
    save_file({{"x": model(input_ids=torch.tensor({[[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]})).logits}}, "x.st")
assert "peft_unlearn" not in sys.modules
"""
    run = zygote.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert torch.equal(load_file(str(tmp_path / "x.st"))["x"], logits(adapted(base_dir)))


def test_nothing_else_is_replaced(base_dir: Path, adapter_dir: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    mixed = tmp_path / "mixed"
    shutil.copytree(adapter_dir, mixed)
    (mixed / "notes.txt").write_text("x")
    half = tmp_path / "half"
    shutil.copytree(adapter_dir, half)
    (half / "forget.json").unlink()
    for out, message in (
        (foreign, "not a complete forget adapter"),
        (tmp_path / "file", "is a file"),
        (mixed, "notes.txt"),
        (half, "not a complete forget adapter"),
    ):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(UserError, match=message):
            write(out, base_dir)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("exchange", [True, False])
def test_an_older_adapter_and_an_empty_folder_are_replaced(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    out = tmp_path / "out"
    out.mkdir()
    first = write(out, base_dir, seed=1)
    second = write(out, base_dir, seed=2)
    assert first.adapter_id != second.adapter_id == read_adapter(out).adapter_id
    assert list(tmp_path.iterdir()) == [out]


def test_a_failed_write_leaves_what_was(base_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = write(out, base_dir).adapter_id
    with pytest.raises(UserError, match="every lora_B is zero"):
        write(out, base_dir, size=0.0)
    model = adapted(base_dir)
    manifest = manifest_for(model, base_dir)
    with pytest.raises(UserError, match=r"eval\.json: holds a number that is not finite"):
        write_adapter(out, model, manifest, RECIPE, eval_json={"x": float("nan")})
    with pytest.raises(UserError, match=r"README\.md would name a folder of this machine"):
        write_adapter(out, model, manifest, RECIPE, card=f"see {tmp_path}/out/x")
    with pytest.raises(UserError, match="holds no adapter 'x'"):
        write_adapter(out, model, manifest, RECIPE, adapter_name="x")
    next(p for n, p in model.named_parameters() if "lora_A" in n).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        write_adapter(out, model, manifest, RECIPE)
    assert read_adapter(out).adapter_id == old and list(tmp_path.iterdir()) == [out]


def test_update_eval_keeps_the_adapter(base_dir: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "out", base_dir)
    update_eval(tmp_path / "out", EVAL, card="# mine")
    new = read_adapter(tmp_path / "out")
    assert new.adapter_id == old.adapter_id and new.eval == EVAL
    assert write(tmp_path / "out", base_dir, seed=3).eval is None  # still replaceable


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leaves_the_old_or_the_new(base_dir: Path, tmp_path: Path) -> None:
    """Children that write two adapters in turn to one place are killed at random moments."""
    out = tmp_path / "out"
    models = [adapted(base_dir, seed) for seed in (1, 2)]
    manifests = [manifest_for(m, base_dir) for m in models]
    ids = []
    start = time.monotonic()
    for m, f in zip(models, manifests, strict=True):
        ids.append(write_adapter(tmp_path / "probe", m, f, RECIPE).adapter_id)
    span = time.monotonic() - start
    shutil.rmtree(tmp_path / "probe")
    rng = random.Random(0)
    cut_short = 0
    for round_ in range(200):
        if round_ >= 14 and cut_short:  # on a busy machine the first kills may all come before the first write
            break
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    for m, f in zip(models, manifests, strict=True):
                        write_adapter(out, m, f, RECIPE)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, span * (0.5 if round_ < 5 else 2)))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        for path in tmp_path.iterdir():
            if path == out:
                assert read_adapter(out).adapter_id in ids
            else:
                cut_short += 1
                if (path / "forget.json").exists():
                    assert path.name.startswith(".out.stage-")
                else:
                    with pytest.raises(UserError):
                        read_adapter(path)
    assert cut_short > 0, "no kill hit a write; the test proves nothing"
    write_adapter(out, models[0], manifests[0], RECIPE)
    assert list(tmp_path.iterdir()) == [out]  # what the killed ones left is swept


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        change(raw)
        (folder / name).write_text(json.dumps(raw))

    return run


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(str(path))
        change(tensors)
        save_file(tensors, str(path))

    return run


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def _flip(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


W = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "forget.json").unlink(), "a PEFT adapter without forget.json"),
        (lambda d: (d / "recipe.yaml").unlink(), "recipe.yaml is missing"),
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json missing"),
        (lambda d: (d / W).unlink(), f"{W} missing"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing; the manifest lists it"),
        (_pickle, "pickled"),
        (_bytes(W, lambda b: b""), "the file is empty"),
        (_bytes(W, lambda b: b[:-5]), "truncated"),
        (_bytes(W, lambda b: b[:20]), "truncated, or not a safetensors file"),
        (_bytes(W, lambda b: b"PK\x03\x04" * 99), "not a safetensors file"),
        (_bytes(W, _flip), "is not the file that was written"),
        (_tensors(lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k]), "every lora_B is zero"),
        (_tensors(lambda t: next(iter(t.values())).fill_(float("nan"))), "NaN or infinite"),
        (_tensors(lambda t: t.update(x=torch.ones(1))), "not an adapter's tensors ('x'"),
        (_tensors(lambda t: t.update({next(iter(t)): torch.ones(0)})), "tensors are empty"),
        (_tensors(lambda t: t.clear()), "holds no tensors"),
        (_bytes("adapter_config.json", lambda b: b"{"), "adapter_config.json: not JSON"),
        (_bytes("adapter_config.json", lambda b: b""), "adapter_config.json: the file is empty"),
        (_bytes("adapter_config.json", lambda b: b"[]"), "expected a JSON object"),
        (_edit("adapter_config.json", lambda c: c.pop("peft_type")), "no `peft_type`"),
        (_edit("adapter_config.json", lambda c: c.update(r=8)), "is not the file that was written"),
        (_edit("forget.json", lambda m: m.update(format=9)), "format 9 is unknown"),
        (_edit("forget.json", lambda m: m["files"].update({"../x": None})), "leaves the folder"),
        (_bytes("forget.json", lambda b: b[:50]), "forget.json: not JSON"),
        (_bytes("recipe.yaml", lambda b: b"bse: 1"), "Did you mean 'base'"),
        (_bytes("recipe.yaml", lambda b: b"\xff"), "not UTF-8"),
    ],
)
def test_damaged_folders(adapter_dir: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(adapter_dir, folder)
    damage(folder)
    with pytest.raises(UserError) as e:
        read_adapter(folder)
    assert message in str(e.value)


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "e").mkdir()
    for name, message in (("f", "is a file"), ("e", "the folder is empty"), ("x", "no such folder")):
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path / name)


def test_files_are_readable_like_any_other(adapter_dir: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    wanted = plain.stat().st_mode & 0o777
    assert {p.name: p.stat().st_mode & 0o777 for p in adapter_dir.iterdir()} == dict.fromkeys(
        (p.name for p in adapter_dir.iterdir()), wanted
    )
