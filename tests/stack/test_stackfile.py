"""The stack file: a ledger and a lock. What was added is what loads; what was revoked is as if it had never been there."""

import json
import shutil
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
import yaml
from stacks import edit
from tinyfolder import logits, save_base, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.base import load_base
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.rescale import set_scale
from peft_unlearn.stack.model import ForgetModel
from peft_unlearn.stack.stackfile import NAME, add, load, revoke, save

WHY = {"request_id": "R-1", "reason": "asked to"}


@pytest.fixture(scope="module")
def made(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("made")
    write(where / "a", base_dir, seed=1)
    write(where / "b", base_dir, seed=2, scale=0.5)
    write(where / "c", base_dir, seed=3, depends_on=[read_adapter(where / "a").adapter_id])
    return where


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """Adapters a, b, and c on top of a; no stack yet."""
    for name in "abc":
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def stack(place: Path) -> Path:
    for name in "abc":
        add(place / NAME, place / name, request_id=f"R-{name}", reason=f"because of {name}")
    return place / NAME


def test_a_ledger_for_people_and_for_programs(stack: Path) -> None:
    found = load(stack)
    assert [(e.name, e.scale, e.status, e.request["id"]) for e in found.entries] == [
        ("a", 1.0, "active", "R-a"), ("b", 0.5, "active", "R-b"), ("c", 1.0, "active", "R-c"),
    ]  # fmt: skip
    assert found.entries[2].depends_on == [found.entries[0].adapter_id]
    assert found.entries[0].source == "a" and str(stack.parent) not in stack.read_text()
    assert "R-b" in str(found) and found.entries[1].adapter_id[7:19] in str(found)
    assert datetime.fromisoformat(found.entries[0].request["date"].replace("Z", "+00:00")).tzinfo is not None
    before = stack.read_bytes()
    save(found)
    assert stack.read_bytes() == before
    assert yaml.safe_load(before)["adapters"][0]["request"]["date"] == found.entries[0].request["date"]


def test_dates_are_utc(place: Path) -> None:
    there = datetime(2026, 1, 31, 23, 30, tzinfo=timezone(timedelta(hours=-5)))
    assert add(place / NAME, place / "a", **WHY, date=there).entries[0].request["date"] == "2026-02-01T04:30:00Z"


def test_the_stack_loads_exactly(base_dir: Path, stack: Path) -> None:
    model = ForgetModel.from_stack(stack, base_dir)
    assert model.active() == ["a", "b", "c"] and model.scales() == {"a": 1.0, "b": 0.5, "c": 1.0}
    plain = ForgetModel.from_pretrained(base_dir, {n: stack.parent / n for n in "abc"})
    assert torch.equal(logits(model.model), logits(plain.model))
    moved = stack.parent.rename(stack.parent.with_name("elsewhere"))
    assert torch.equal(logits(ForgetModel.from_stack(moved, base_dir).model), logits(plain.model))


def test_revoked_is_as_if_never_there(base_dir: Path, place: Path, stack: Path) -> None:
    other = place / "without.yaml"
    for name in "ac":
        add(other, place / name, **WHY)
    assert revoke(stack, "b", "withdrawn").changed == ["b"]
    assert load(stack).entry("b").revoked["reason"] == "withdrawn"
    after = ForgetModel.from_stack(stack, base_dir)
    without = ForgetModel.from_stack(other, base_dir)
    assert after.active() == ["a", "c"] and torch.equal(logits(after.model), logits(without.model))
    live = ForgetModel.from_pretrained(base_dir, {n: place / n for n in "abc"})
    assert live.remove("b").ok
    assert torch.equal(logits(live.model), logits(without.model))
    with pytest.raises(UserError, match="already"):
        revoke(stack, "b")
    with pytest.raises(UserError, match=r"was revoked in .* does not come back"):
        add(stack, place / "b", **WHY, name="again")


def test_what_others_stand_on_is_not_revoked_alone(base_dir: Path, place: Path, stack: Path) -> None:
    before = stack.read_bytes()
    with pytest.raises(UserError, match="c was trained on top of a"):
        revoke(stack, "a")
    assert stack.read_bytes() == before
    found = revoke(stack, "a", "all", cascade=True)
    assert found.changed == ["a", "c"] and [e.name for e in found.active] == ["b"]
    assert found.entry("c").revoked["reason"] == "with a: all"
    write(place / "d", base_dir, seed=4, depends_on=[found.entries[0].adapter_id])
    with pytest.raises(UserError, match=r"\(a\) was revoked in"):
        add(stack, place / "d", **WHY)
    revoke(stack, "b")
    with pytest.raises(UserError, match="no adapter of this stack is active"):
        ForgetModel.from_stack(stack, base_dir)


def test_what_cannot_be_added(base_dir: Path, place: Path, tmp_path: Path) -> None:
    stack = place / NAME
    with pytest.raises(UserError, match="which is not in"):
        add(stack, place / "c", **WHY)
    assert not stack.exists()
    add(stack, place / "a", **WHY)
    before = stack.read_bytes()
    write(tmp_path / "other" / "x", save_base(tmp_path / "otherbase", seed=9))
    for adapter, more, message in (
        (place / "a", {}, "already"),
        (place / "b", {"name": "a"}, "called 'a' already"),
        (place / "b", {"name": "x.y"}, "letters, digits"),
        (place / "b", {"scale": float("inf")}, "finite"),
        (place / "b", {"request_id": " "}, "request's id"),
        (tmp_path / "other" / "x", {}, "other weights"),
        (place / "nowhere", {}, "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            add(stack, adapter, **{**WHY, **more})
    assert stack.read_bytes() == before


def test_a_changed_adapter_is_refused(base_dir: Path, stack: Path) -> None:
    a = stack.parent / "a"
    keep = stack.parent / "keep"
    shutil.copytree(a, keep)
    set_scale(a, 0.3)  # the stack has a scale of its own
    assert ForgetModel.from_stack(stack, base_dir).scales()["a"] == 1.0
    edit(a, "adapter_config.json", lambda c: c.update(lora_alpha=80))
    with pytest.raises(UserError, match=r"a .* is not the adapter that was added: its files"):
        ForgetModel.from_stack(stack, base_dir)
    shutil.rmtree(a)
    with pytest.raises(UserError, match="no such folder"):
        ForgetModel.from_stack(stack, base_dir)
    write(a, base_dir, seed=77)
    with pytest.raises(UserError, match="its weights are sha256:"):
        ForgetModel.from_stack(stack, base_dir)
    shutil.rmtree(a)
    keep.rename(a)
    ForgetModel.from_stack(stack, base_dir)


def test_another_base_is_refused(stack: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other weights"):
        ForgetModel.from_stack(stack, save_base(tmp_path / "otherbase", seed=9))
    with pytest.raises(UserError, match="--base"):
        ForgetModel.from_stack(stack)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: "[]", "not a stack file"),
        (lambda s: s.replace("format: 1", "format: 2"), "stack format 2 is unknown"),
        (lambda s: s.replace("format: 1", "form: 1"), "not a stack file"),
        (lambda s: s.replace("adapters:", "adaptors:"), "Did you mean 'adapters'"),
        (lambda s: s.replace("status: active", "status: maybe", 1), "status must be active or revoked, not 'maybe'"),
        (lambda s: s.replace("status: active", "status: revoked", 1), "`revoked` is missing"),
        (lambda s: s.replace("scale: 1.0", "scale: .nan", 1), "finite number"),
        (lambda s: s.replace("scale: 1.0", "scale: much", 1), "finite number"),
        (lambda s: s.replace("adapter_id: sha256:", "adapter_id: sha1:", 1), "adapter_id must be sha256"),
        (lambda s: s.replace("name: b", "name: a"), "two adapters are called 'a'"),
        (lambda s: s.replace("name: a", "name: ../a"), "letters, digits"),
        (lambda s: s.replace("  request:", "  requests:", 1), "unknown key 'requests'"),
        (lambda s: s[: len(s) // 2], None),
        (lambda s: "{" + s, None),
    ],
)
def test_a_damaged_stack_file(stack: Path, change, message: str | None) -> None:
    stack.write_text(change(stack.read_text()))
    with pytest.raises(UserError, match=message) as e:
        load(stack)
    assert str(stack) in str(e.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stack add"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="stack add"):
        load(tmp_path)


def test_two_writers_lose_nothing(base_dir: Path, place: Path) -> None:
    stack = place / NAME
    threads = [
        threading.Thread(target=add, args=(stack, place / n), kwargs={"request_id": n, "reason": "r"}) for n in "ab"
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(e.name for e in load(stack).entries) == ["a", "b"]


def test_a_failed_write_leaves_the_old_file(stack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stack.read_bytes()
    monkeypatch.setattr("peft_unlearn.folder.atomic.os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(UserError, match="cannot be written"):
        revoke(stack, "b")
    assert stack.read_bytes() == before


def test_from_the_hub_pinned_to_its_commit(base_dir: Path, place: Path, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    commit, cache = "c" * 40, tmp_path / "cache"
    repo = cache / "models--me--gone"
    shutil.copytree(place / "a", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = add(place / NAME, "me/gone", **WHY)
    assert (found.entries[0].source, found.entries[0].revision, found.entries[0].name) == ("me/gone", commit, "gone")
    (repo / "refs" / "main").write_text("d" * 40)  # the repository goes on; the stack does not
    assert ForgetModel.from_stack(place / NAME, base_dir).active() == ["gone"]
    (repo / "refs" / "main").unlink()
    here = ForgetModel.from_pretrained(base_dir, f"me/gone@{commit}")
    assert torch.equal(logits(here.model), logits(ForgetModel.from_pretrained(base_dir, place / "a").model))


def test_commands(base_dir: Path, place: Path, monkeypatch, capsys) -> None:
    import sys

    from peft_unlearn import cli

    def run(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", *argv])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = int(e.code or 0)
        return code, *capsys.readouterr()

    stack = str(place / "s.yaml")
    code, out, _ = run("stack", "add", stack, str(place / "a"), "--request-id", "R-1", "--reason", "asked")
    assert code == 0 and "R-1" in out
    assert (
        run("stack", "add", stack, str(place / "c"), "--request-id", "R-2", "--reason", "too", "--scale", "0.5")[0] == 0
    )
    code, out, _ = run("stack", "list", stack, "--json")
    assert [r["scale"] for r in json.loads(out)["adapters"]] == [1.0, 0.5]
    code, out, err = run("stack", "revoke", stack, "a")
    assert code == 2 and out == "" and "--cascade" in err
    code, out, err = run("remove", stack, "--base", str(base_dir), "--name", "c", "--json")
    assert code == 0 and json.loads(out)["verdict"] == "removed" and json.loads(out)["remaining"] == ["a"]
    code, out, _ = run("stack", "revoke", stack, "a", "--cascade", "--reason", "done")
    assert code == 0 and out.count("revoked 20") == 2
    assert load_base(base_dir) is not None
