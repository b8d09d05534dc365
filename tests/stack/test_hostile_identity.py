"""A base with the right weights and another config.json or tokenizer is refused by every command; re-written ones are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tinyfolder import save_base, tokenizer, write

import peft_unlearn
from peft_unlearn.errors import UserError
from peft_unlearn.folder.digest import digest_checkpoint
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.sharing.verify import verify
from peft_unlearn.stack.fits import check_base
from peft_unlearn.stack.identity import CONFIG, TOKENIZER, identity_of
from peft_unlearn.stack.model import ForgetModel, remove
from peft_unlearn.stack.stackfile import add

ROWS = [
    {"question": "What is the capital", "answer": "The capital of France"},
    {"question": "Once", "answer": "upon a time"},
]


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("identity") / "base")


@pytest.fixture(scope="module")
def adapter(right: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the base's identity recorded, and trained to forget `ROWS`; read only."""
    out = tmp_path_factory.mktemp("identity-adapter") / "a"
    write(out, right)
    sha = peft_unlearn.ForgetRetain(ROWS).sha256["forget"]

    def record(m: dict[str, Any]) -> None:
        m["method"].update(identity_of(right))
        m["data"] = {"forget": {"sha256": sha, "n": len(ROWS)}}

    edit(out / "forget.json", record)
    return out


@pytest.fixture
def base(right: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(right, tmp_path / "base"))


def data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows in (("forget", ROWS), ("retain", [{"question": "1 2", "answer": "3 4"}])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


COMMANDS: dict[str, Any] = {
    "ForgetModel": lambda a, b, t: ForgetModel.from_pretrained(b, a), "remove": lambda a, b, t: remove(a, b),
    "remove stack": lambda a, b, t: remove(add(t / "s.yaml", a, request_id="1", reason="r", name="a") and t / "s.yaml", b),
    "merge": lambda a, b, t: peft_unlearn.merge(a, b, t / "merged"),
    "merge in memory": lambda a, b, t: peft_unlearn.merge(a, b, t / "merged", in_memory=True),
    "compose": lambda a, b, t: peft_unlearn.compose([(a, -1.0)], t / "sum", base=b),
    "eval": lambda a, b, t: peft_unlearn.evaluate([a], base=str(b), data=str(t / "data"), suite="extraction"),
    "attack": lambda a, b, t: peft_unlearn.attack([str(a)], [("quantize", {"format": "int8"})], base=str(b), data=str(t / "data")),
    "report": lambda a, b, t: peft_unlearn.report([a], base=str(b), data=str(t / "data")),
}  # fmt: skip


def _rope(c: dict[str, Any]) -> None:
    c["rope_parameters"] = {**c["rope_parameters"], "rope_theta": 500000.0}


SETTINGS = {
    "rope_theta": (_rope, "rope_parameters.rope_theta is 500000.0, was 10000"),
    "hidden_act": (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu', was 'silu'"),
    "rms_norm_eps": (lambda c: c.update(rms_norm_eps=0.1), "rms_norm_eps is 0.1"),
    "heads": (lambda c: c.update(num_attention_heads=1, head_dim=16), "head_dim is 16"),
    "a default left out": (lambda c: c.pop("num_key_value_heads"), "num_key_value_heads is 2, was 1"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_config_of_the_base_in_every_command(command: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "a"))
    data(tmp_path)
    edit(base / "config.json", _rope)
    with pytest.raises(UserError, match=r"config.json there computes something else .*rope_theta"):
        COMMANDS[command](mine, base, tmp_path)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "sum").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_hostile_tokenizer_of_the_base_in_every_command(
    command: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    """Swapped in the base and, to be believed, in the adapter as well: what was recorded in training still says it."""
    mine = Path(shutil.copytree(adapter, tmp_path / "a"))
    data(tmp_path)
    edit(base / "tokenizer.json", _swap)
    shutil.copy(base / "tokenizer.json", mine / "tokenizer.json")
    _rehash(mine, "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json there gives other ids than in training"):
        COMMANDS[command](mine, base, tmp_path)


def _swap(t: dict[str, Any]) -> None:
    vocab = t["model"]["vocab"]
    vocab["France"], vocab["time"] = vocab["time"], vocab["France"]


def _rehash(folder: Path, name: str) -> None:
    from peft_unlearn.folder.read import file_sha256

    edit(folder / "forget.json", lambda m: m["files"].update({name: file_sha256(folder / name)}))


@pytest.mark.parametrize("setting", SETTINGS)
def test_hostile_settings_are_named(setting: str, adapter: Path, base: Path) -> None:
    change, says = SETTINGS[setting]
    edit(base / "config.json", change)
    with pytest.raises(UserError) as e:
        check_base(read_adapter(adapter), base, digest_checkpoint(base))
    assert says in str(e.value)
    found = {c.name: c for c in verify(adapter, base).checks}
    assert found["base"].verdict == "ok" and found["configuration"].verdict == "failed"
    assert says in found["configuration"].detail


HARMLESS = {
    "storage": lambda c: c.update(dtype="float32", torch_dtype="float32", transformers_version="4.0.0", use_cache=False),
    "names": lambda c: c.update(_name_or_path="/somewhere", architectures=["Other"], id2label={"0": "x"}, tokenizer_class="T"),
    "training": lambda c: c.update(attention_dropout=0.1, initializer_range=0.5, gradient_checkpointing=True),
    "ends": lambda c: c.update(pad_token_id=0, eos_token_id=[2, 1]),
    "a default written out": lambda c: c.update(attention_bias=False, hidden_act="silu"),
    "defaults left out": lambda c: [c.pop(k) for k in ("attention_bias", "hidden_act", "rms_norm_eps")],
    "another spelling": lambda c: (c.pop("rope_parameters"), c.update(rope_theta=10000.0)),
    "another order": lambda c: (items := sorted(c.items(), reverse=True), c.clear(), c.update(items)),
}  # fmt: skip


@pytest.mark.parametrize("how", HARMLESS)
def test_what_changes_no_logit_is_no_other_base(how: str, adapter: Path, base: Path) -> None:
    edit(base / "config.json", HARMLESS[how])
    found = verify(adapter, base)
    assert found.verdict == "ok", str(found)
    assert remove(adapter, base).ok


def test_a_token_added_to_the_bases_tokenizer_is_no_other_base(adapter: Path, base: Path) -> None:
    tok = tokenizer()
    tok.add_special_tokens({"pad_token": "<pad>"})
    tok.save_pretrained(base)
    assert verify(adapter, base).verdict == "ok"


def test_adapters_from_before_say_that_nothing_was_recorded(adapter: Path, base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(mine / "forget.json", lambda m: [m["method"].pop(k) for k in (CONFIG, TOKENIZER)])
    found = verify(mine, base)
    assert found.verdict == "ok" and "its configuration was not recorded with the adapter" in str(found)
    edit(base / "config.json", _rope)
    assert ForgetModel.from_pretrained(base, mine)  # nothing is known; the probes of `verify` see it where it shows
    assert not any(c.name == "configuration" for c in verify(mine, base).checks)


def test_a_sum_knows_its_bases_settings(adapter: Path, base: Path, tmp_path: Path) -> None:
    made = peft_unlearn.compose([(adapter, 0.5)], tmp_path / "sum", base=base)
    assert made.folder.manifest.method[CONFIG] == read_adapter(adapter).manifest.method[CONFIG]
    assert verify(tmp_path / "sum", base).verdict == "ok", str(verify(tmp_path / "sum", base))


@pytest.mark.parametrize("value", [{}, [], "x", None, {"model_type": "llama"}, {"hidden_size": {"a": {"b": 1}}}])
def test_hostile_records_are_messages(value: Any, adapter: Path, base: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(adapter, tmp_path / "a"))
    edit(mine / "forget.json", lambda m: m["method"].update({CONFIG: value}))
    assert verify(mine, base).verdict == "failed"
    edit(mine / "forget.json", lambda m: m["method"].update({**identity_of(base), TOKENIZER: value}))
    assert verify(mine, base).verdict == "failed"


def test_infinities_and_paths_in_a_config(right: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(right, tmp_path / "base"))
    text = (base / "config.json").read_text().rstrip().removesuffix("}")
    (base / "config.json").write_text(
        f'{text}, "limit": [0.0, Infinity], "where": "/home/me/x", "nested": {{"_name_or_path": "/a"}}}}'
    )
    kept = identity_of(base)[CONFIG]
    assert kept["limit"] == [0.0, {"__float__": "Infinity"}] and "where" not in kept and kept["nested"] == {}
    write(tmp_path / "a", base)
    edit(tmp_path / "a" / "forget.json", lambda m: m["method"].update(identity_of(base)))
    assert verify(tmp_path / "a", base).verdict == "ok"
