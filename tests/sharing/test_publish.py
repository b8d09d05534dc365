"""Publishing: what goes along, where to, and that whatever happens on the way, nobody loads half an adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tinyfolder
import torch
from client import Clients
from hub import ATTRIBUTES, Hub
from packaging.version import Version
from safetensors.torch import load_file, save_file

from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import RECORDED, file_sha256, read_adapter
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.sharing.outgoing import leaks
from peft_unlearn.sharing.publish import push


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result: Any, *words: str) -> str:
    assert "error" in result, result
    kind, text = result["error"]
    assert kind == "UserError" and all(w in text for w in words), result
    return text


def test_exactly_the_adapter_in_one_commit_and_private(hub: Hub, clients: Clients, folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"x" * 10)
    (folder / "notes.txt").write_text("mine")
    done = clients("push", str(folder), "me/exact")
    assert done["private"] and hub.repos["me/exact"].private
    assert done["left_behind"] == ["notes.txt", "optimizer.pt"]
    there = hub.files("me/exact")
    assert there.pop(".gitattributes") == ATTRIBUTES.encode()
    assert there == {k: v for k, v in contents(folder).items() if k not in done["left_behind"]}
    assert len(hub.repos["me/exact"].history()) == 2 and done["commit"] == hub.repos["me/exact"].history()[0]
    assert done["url"] == f"{hub.url}/me/exact"
    # the weights went the large files' way, once, and nothing else did
    large = {file_sha256(folder / n) for n in ("adapter_model.safetensors", "tokenizer.json")}
    assert Counter(sha for sha, _ in hub.uploaded) == dict.fromkeys(large, 1)
    # the same again sends nothing and makes no commit
    hub.calm()
    again = clients("push", str(folder), "me/exact")
    assert again["unchanged"] and again["commit"] == done["commit"] and not hub.uploaded
    assert not any("/commit/" in r for r in hub.requests)


def test_loads_by_its_id_with_and_without_this_package(
    hub: Hub, clients: Clients, made: Path, base_dir: Path, tmp_path: Path
) -> None:
    assert "error" not in clients("push", str(made), "me/loaded")
    want = tinyfolder.logits(tinyfolder.adapted(base_dir))[0, -1]
    got = clients("load", "me/loaded")
    assert "error" not in got, got
    for how in ("auto", "on_top"):
        assert torch.allclose(torch.tensor(got[how]), want, atol=1e-6)
    assert not torch.allclose(torch.tensor(got["base"]), want, atol=1e-3)
    alone = clients("load_without", "me/loaded", tinyfolder.IDS.tolist())
    assert "error" not in alone, alone
    assert torch.allclose(torch.tensor(alone), want, atol=1e-6)


def test_dry_run_asks_no_network(hub: Hub, clients: Clients, folder: Path) -> None:
    (folder / "left.txt").write_text("x")
    done = clients("push", str(folder), "me/dry", dry_run=True, token=None)
    assert done["dry_run"] and done["commit"] is None and done["left_behind"] == ["left.txt"] and done["private"]
    assert {f["name"]: f["bytes"] for f in done["files"]} == {
        n: len(b) for n, b in contents(folder).items() if n != "left.txt"
    }
    assert hub.requests == [] and "me/dry" not in hub.repos
    text = str(push(folder, "me/dry", dry_run=True))
    assert "would go to me/dry (private)" in text and "stays here: left.txt" in text and "total" in text


def test_large_files_in_parts_and_only_what_is_missing(hub: Hub, clients: Clients, folder: Path) -> None:
    hub.stored.clear()
    hub.multipart_over = 1000
    assert "error" not in clients("push", str(folder), "me/parts")
    size = (folder / "adapter_model.safetensors").stat().st_size
    sent = [n for sha, n in hub.uploaded if sha == file_sha256(folder / "adapter_model.safetensors")]
    assert len(sent) == -(-size // 1000) > 1 and sum(sent) == size
    assert hub.files("me/parts")["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()


def write_other(folder: Path, base_dir: Path) -> Path:
    """Another adapter of the same base beside `folder`."""
    out = folder.with_name("other")
    model = tinyfolder.adapted(base_dir, seed=9)
    old = read_adapter(folder).manifest
    manifest = replace(tinyfolder.manifest_for(model, base_dir, name="other"), base=old.base, data=old.data)
    write_adapter(out, model, manifest, tinyfolder.RECIPE, tokenizer=tinyfolder.tokenizer())
    return out


def test_a_new_adapter_in_an_old_ones_place(hub: Hub, clients: Clients, folder: Path, base_dir: Path) -> None:
    assert "error" not in clients("push", str(folder), "me/replaced")
    first = hub.repos["me/replaced"].branches["main"]
    hub.put("me/replaced", {"LICENSE": b"x"})  # added on the website
    manifest = json.loads((folder / "forget.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        del manifest["files"][name]
    (folder / "forget.json").write_text(json.dumps(manifest))
    done = clients("push", str(folder), "me/replaced")
    assert done["deleted"] == ["tokenizer.json", "tokenizer_config.json"]
    assert not any("replaces" in n for n in done["notes"])  # the same weights
    there = hub.files("me/replaced")
    assert "tokenizer.json" not in there and there["LICENSE"] == b"x"
    assert "tokenizer.json" in hub.files("me/replaced", first)  # history keeps it
    other = write_other(folder, base_dir)
    notes = clients("push", str(other), "me/replaced")["notes"]
    assert any(f"replaces the adapter {read_adapter(folder).adapter_id[:19]} of the base me/base" in n for n in notes)


def test_a_branch(hub: Hub, clients: Clients, folder: Path) -> None:
    done = clients("push", str(folder), "me/branch", revision="v2")
    repo = hub.repos["me/branch"]
    assert repo.branches["v2"] == done["commit"] != repo.branches["main"]
    assert list(hub.files("me/branch", "main")) == [".gitattributes"]


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "no access token"),
        ("hf_reader", "may not write there"),
        ("hf_stranger", "may not write there"),
        ("hf_gone", "does not accept the token"),
    ],
)
def test_tokens(hub: Hub, clients: Clients, folder: Path, token: str | None, words: str) -> None:
    before = dict(hub.repos)
    refused(clients("push", str(folder), "me/tokens", token=token), words)
    assert hub.repos == before and not hub.uploaded
    if token is None:
        assert not hub.requests


def test_repositories_that_are_not_pushed_to(hub: Hub, clients: Clients, folder: Path) -> None:
    hub.put("me/model", {"config.json": b"{}", "model.safetensors": b"x"}, private=True)
    refused(clients("push", str(folder), "me/model"), "not a forget adapter", "config.json")
    hub.put("me/open", {"README.md": b"x"})
    refused(clients("push", str(folder), "me/open"), "is public", "--public")
    assert list(hub.files("me/open")) == ["README.md"] and not hub.uploaded
    assert "error" not in clients("push", str(folder), "me/open", private=False)
    hub.put("me/closed", {}, private=True)
    done = clients("push", str(folder), "me/closed", private=False)
    assert done["private"] and "stays so" in done["notes"][-1]
    hub.put("me/broken", {"forget.json": b"{"}, private=True)
    refused(clients("push", str(folder), "me/broken"), "cannot be read")
    refused(clients("push", str(folder), "me/no/such"), "not the name of a repository")
    refused(clients("push", str(folder), "me/x", revision="a" * 40), "is a commit")


def test_what_may_not_leave(folder: Path, tmp_path: Path) -> None:
    """Each its own message; the folder is as it was."""

    def why(change: Any, data: Any = None) -> str:
        other = Path(shutil.copytree(folder, tmp_path / "other"))
        change(other)
        try:
            with pytest.raises(UserError) as e:
                push(other, "me/x", dry_run=True, data=data)
            return str(e.value)
        finally:
            shutil.rmtree(other)

    def into_card(text: str) -> Any:
        return lambda d: (d / "README.md").write_text((d / "README.md").read_text() + text)

    push(folder, "me/x", dry_run=True)  # as it is, it may
    assert "is missing" in why(lambda d: (d / "README.md").unlink())
    assert "a place on a machine ('/home/ann/runs')" in why(into_card("\nfrom /home/ann/runs\n"))
    assert "names a place" in why(into_card(f"\nfrom {tmp_path / 'other'}\n"))
    assert "place on this machine" in leaks("in /odd/spot.", Path("/odd/spot"))[0]
    assert "secret key" in why(into_card("\nhf_abcdefghijklmnopqrstuvwxyz\n"))
    assert "active HTML" in why(into_card("\n<script>alert(1)</script>\n"))
    assert "does not say what the folder says" in why(
        lambda d: (d / "README.md").write_text((d / "README.md").read_text().replace("| scale | 1 |", "| scale | 2 |"))
    )
    assert "front matter: line 3, column 1: not valid YAML" in why(
        lambda d: (d / "README.md").write_text("---\na: [\n---\n")
    )
    evil = {"format": 1, "subjects": {"adapter": {}}, "note": "C:\\Users\\ann\\x"}
    assert "eval.json names a place" in why(lambda d: (d / "eval.json").write_text(json.dumps(evil)))
    refusal = why(lambda d: (d / "adapter_config.json").write_text("{}"))
    assert "peft_type" in refusal  # not an adapter at all

    def header(d: Path) -> None:
        tensors = load_file(str(d / "adapter_model.safetensors"))
        save_file(tensors, str(d / "adapter_model.safetensors"), metadata={"from": "/mnt/disk/run7"})
        manifest = json.loads((d / "forget.json").read_text())
        manifest["files"]["adapter_model.safetensors"] = file_sha256(d / "adapter_model.safetensors")
        (d / "forget.json").write_text(json.dumps(manifest))

    assert "its header names a place" in why(header)

    def pickled(d: Path) -> None:
        (d / "evil.bin").write_bytes(b"x")
        manifest = json.loads((d / "forget.json").read_text())
        manifest["files"]["evil.bin"] = None
        (d / "forget.json").write_text(json.dumps(manifest))

    assert "not a kind of file" in why(pickled)

    def unlisted(d: Path) -> None:
        manifest = json.loads((d / "forget.json").read_text())
        del manifest["files"]["adapter_model.safetensors"]
        (d / "forget.json").write_text(json.dumps(manifest))

    assert "gives no hash of adapter_model.safetensors" in why(unlisted)

    def linked(d: Path) -> None:
        (d / "eval.json").symlink_to("/etc/hostname")

    assert "eval.json" in why(linked)


def test_forget_texts_stay_here(folder: Path) -> None:
    rows = [
        {"question": "Where does the oboist Ann Made-Up live?", "answer": "She lives in the blue house by the sea."}
    ]
    manifest = json.loads((folder / "forget.json").read_text())
    from peft_unlearn.data.bundle import ForgetRetain

    bundle = ForgetRetain(rows)
    manifest["data"]["forget"]["sha256"] = bundle.sha256["forget"]
    (folder / "forget.json").write_text(json.dumps(manifest))
    assert not push(folder, "me/x", dry_run=True, data=bundle).notes
    assert "--data compares" in push(folder, "me/x", dry_run=True).notes[0]
    card = folder / "README.md"
    card.write_text(card.read_text() + '\nFor example "she lives in the *blue* house, by the sea".\n')
    with pytest.raises(UserError, match=r"README.md holds a text of the forget set"):
        push(folder, "me/x", dry_run=True, data=bundle)
    with pytest.raises(UserError, match="not the one the adapter was trained on"):
        push(folder, "me/x", dry_run=True, data=ForgetRetain([{"question": "a b c d e f g", "answer": "h"}]))


@pytest.mark.parametrize(
    "text",
    [
        "see /home/ann/x",
        "(/Users/ann)",
        "'~/runs/1'",
        "file:///etc/x",
        "D:\\Users\\ann",
        "D:\\\\Users\\\\ann",
        "at /data/x",
    ],
)
def test_places_are_seen(text: str) -> None:
    assert leaks(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/page",
        "me/data/x",
        "and/or",
        "1/2",
        "Answer:\\nnone",
        "~5",
        "a ~/b",
        "s/home/away/",
        "</s>",
    ],
)
def test_other_slashes_are_not(text: str) -> None:
    assert not leaks(text) or text == "a ~/b"


def state(hub: Hub, repo: str, folder: Path) -> str:
    """What the Hub shows of a repository: "nothing", "empty" or "whole"; anything between is the failure looked for."""
    if repo not in hub.repos:
        return "nothing"
    there = hub.files(repo)
    if list(there) == [".gitattributes"]:
        return "empty"
    there.pop(".gitattributes")
    assert there == contents(folder), sorted(there)
    return "whole"


def kill_at(hub: Hub, clients: Clients, event: int, *call: Any, **options: Any) -> bool:
    """Make the call and kill its process at the event-th thing the server sees; False when there were fewer."""
    seen: list[str] = []
    process: list[int] = []

    def watch(name: str) -> None:
        seen.append(name)
        if len(seen) == event + 1:
            os.kill(process[0], signal.SIGKILL)

    hub.watch = lambda name: None if not process else watch(name)
    hub.lock.acquire()  # the first request waits until the process is known
    try:
        process.append(clients.start(*call, **options))
    finally:
        hub.lock.release()
    result = clients.result()
    hub.watch = lambda name: None
    return bool(result.get("killed"))


def push_and_kill(hub: Hub, clients: Clients, folder: Path, events: Any, tag: str, tmp_path: Path) -> Counter[str]:
    states: Counter[str] = Counter()
    for event in events:
        repo = f"me/{tag}-{event}"
        hub.stored.clear()
        if not kill_at(hub, clients, event, "push", str(folder), repo):
            break
        now = state(hub, repo, folder)
        states[now] += 1
        if now != "whole":
            refused(clients("pull", repo, str(tmp_path / f"no-{event}")), repo)
        stored = set(hub.stored)
        hub.uploaded.clear()
        done = clients("push", str(folder), repo)
        assert "error" not in done and state(hub, repo, folder) == "whole", done
        assert not stored & {sha for sha, _ in hub.uploaded}  # what had arrived is not sent again
    return states


def test_a_push_that_is_killed(hub: Hub, clients: Clients, made: Path, tmp_path: Path) -> None:
    found = push_and_kill(hub, clients, made, (4, 17, 25), "killed", tmp_path)
    assert found["empty"] >= 2 and sum(found.values()) == 3


@pytest.mark.slow
def test_a_push_that_is_killed_anywhere(hub: Hub, clients: Clients, made: Path, tmp_path: Path) -> None:
    found = push_and_kill(hub, clients, made, range(60), "anywhere", tmp_path)
    print(f"kills of a push: {sum(found.values())}, found on the Hub: {dict(found)}")
    assert found["nothing"] >= 3 and found["empty"] >= 12 and found["whole"] >= 3, found


def test_a_connection_that_is_cut(hub: Hub, clients: Clients, folder: Path) -> None:
    """Cut inside the weights, and a 500 once: the client goes on by itself; the server keeps no half file."""
    hub.stored.clear()
    hub.fail("PUT /storage/", after=500)
    hub.fail("POST .*preupload", status=503)
    result = clients("push", str(folder), "me/cut")
    if Version(huggingface_hub.__version__) < Version("2"):  # it does not send a cut file again by itself
        assert result["error"][0] == "Interrupted" and "run the same command again" in result["error"][1]
        assert state(hub, "me/cut", folder) == "empty"
        result = clients("push", str(folder), "me/cut")
    assert "error" not in result and state(hub, "me/cut", folder) == "whole"
    # the commit itself fails: nothing is there, what was sent is kept, the next push sends the commit alone
    hub.calm()
    hub.stored.clear()
    hub.fail("POST .*/commit/", status=500)
    result = clients("push", str(folder), "me/cut2")
    assert result["error"][0] == "Interrupted" and "500" in result["error"][1]
    assert state(hub, "me/cut2", folder) == "empty"
    hub.uploaded.clear()
    assert "error" not in clients("push", str(folder), "me/cut2")
    assert state(hub, "me/cut2", folder) == "whole" and not hub.uploaded


def test_a_hub_that_cannot_be_reached(hub: Hub, clients: Clients, folder: Path, tmp_path: Path) -> None:
    hub.fail("GET /api/models/me/", after=0, times=99)
    for call in (("push", str(folder), "me/gone"), ("pull", "me/base", str(tmp_path / "out"))):
        result = clients(*call)
        assert result["error"][0] == "Interrupted" and "connection to the Hub was lost" in result["error"][1], result
    assert "me/gone" not in hub.repos and not (tmp_path / "out").exists()


def test_somebody_else_pushed_meanwhile(hub: Hub, clients: Clients, folder: Path) -> None:
    assert "error" not in clients("push", str(folder), "me/race")

    def meanwhile(event: str) -> None:
        if "preupload" in event and event.endswith("begin"):
            hub.watch = lambda e: None
            hub.put("me/race", {"README.md": b"theirs"})

    hub.watch = meanwhile
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    result = clients("push", str(folder), "me/race")
    assert result["error"][0] == "Interrupted" and "somebody else" in result["error"][1]
    assert hub.files("me/race")["README.md"] == b"theirs"


# --- pull -----------------------------------------------------------------------------------------------------------------


def test_pull_is_the_same_adapter_at_a_commit(hub: Hub, clients: Clients, folder: Path, tmp_path: Path) -> None:
    first = clients("push", str(folder), "me/pulled")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nSecond.\n")
    second = clients("push", str(folder), "me/pulled")
    hub.put("me/pulled", {"evil.py": b"import os", "weights.bin": b"pickle", "notes.txt": b"x"})
    new = clients("pull", "me/pulled", str(tmp_path / "new"))
    assert new["adapter_id"] == second["adapter_id"]
    assert contents(tmp_path / "new") == contents(folder)  # and nothing that the manifest does not list
    assert new["commit"] == hub.repos["me/pulled"].branches["main"]
    old = clients("pull", f"me/pulled@{first['commit']}", str(tmp_path / "old"))
    assert old["commit"] == first["commit"] and "Second." not in (tmp_path / "old/README.md").read_text()
    assert clients("pull", "me/pulled", str(tmp_path / "old"), revision=second["commit"])["commit"] == second["commit"]
    assert "Second." in (tmp_path / "old/README.md").read_text()  # one adapter takes the other's place
    assert not any("evil.py" in r or "weights.bin" in r or "notes.txt" in r for r in hub.requests)
    hub.calm()
    again = clients("pull", f"me/pulled@{first['commit']}", str(tmp_path / "offline"), offline=True)
    assert again["commit"] == first["commit"] and not hub.requests


def test_a_signed_record_goes_along_both_ways(hub: Hub, clients: Clients, folder: Path, tmp_path: Path) -> None:
    """And is taken out there when the next push has none."""
    for name in RECORDED:
        (folder / name).write_text(f"{name}\n")
    clients("push", str(folder), "me/signed")
    clients("pull", "me/signed", str(tmp_path / "there"))
    assert contents(tmp_path / "there") == contents(folder) and set(RECORDED) <= set(contents(folder))
    for name in RECORDED:
        (folder / name).unlink()
    assert sorted(clients("push", str(folder), "me/signed")["deleted"]) == sorted(RECORDED)


def test_what_is_not_pulled(hub: Hub, clients: Clients, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(clients("pull", "me/nobody", str(out)), "no such repository")
    refused(clients("pull", "me/base", str(out)), "not a forget adapter")
    hub.put("me/peft", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    refused(clients("pull", "me/peft", str(out)), "a PEFT adapter, but not a forget adapter")
    refused(clients("pull", "me/base", str(out), revision="nowhere"), "no such revision")
    refused(clients("pull", "base", str(out)), "not the id of a repository")
    refused(clients("pull", f"me/base@{'1' * 40}", str(out), revision="main"), "two revisions")
    clients("push", str(folder), "me/secret")
    refused(clients("pull", "me/secret", str(out), token="hf_stranger"), "or it is private")
    files = contents(folder)
    for name, change, words in (
        ("flipped", {"adapter_model.safetensors": files["adapter_model.safetensors"][:-1] + b"\x01"}, "sha256 differs"),
        ("short", {"adapter_model.safetensors": files["adapter_model.safetensors"][:-9]}, "truncated"),
        ("escape", {"forget.json": files["forget.json"].replace(b'"README.md": null', b'"../../x.md": null')}, "leaves the folder"),
        ("newer", {"forget.json": files["forget.json"].replace(b'"format": 1', b'"format": 9')}, "format 9 is unknown"),
    ):  # fmt: skip
        hub.put(f"me/{name}", {**files, **change})
        text = refused(clients("pull", f"me/{name}", str(out)), words, f"me/{name}")
        assert ".stage-" not in text
        assert not out.exists() and not list(tmp_path.glob(".out*"))
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    refused(clients("pull", "me/secret", str(out)), "nothing was written")
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def pull_and_kill(hub: Hub, clients: Clients, folder: Path, events: Any, repo: str, tmp_path: Path) -> int:
    kills = 0
    for event in events:
        out, cache = tmp_path / f"out-{event}", tmp_path / f"cache-{event}"
        if not kill_at(hub, clients, event, "pull", repo, str(out), cache=str(cache)):
            break
        kills += 1
        assert not out.exists() or contents(out) == contents(folder)
        done = clients("pull", repo, str(out), cache=str(cache))
        assert "error" not in done, done
        assert contents(out) == contents(folder) and read_adapter(out).adapter_id == done["adapter_id"]
        assert not list(tmp_path.glob(f".{out.name}*"))
    return kills


def test_a_pull_that_is_killed(hub: Hub, clients: Clients, made: Path, tmp_path: Path) -> None:
    clients("push", str(made), "me/pullkill")
    assert pull_and_kill(hub, clients, made, (8, 30), "me/pullkill", tmp_path) == 2


@pytest.mark.slow
def test_a_pull_that_is_killed_anywhere(hub: Hub, clients: Clients, made: Path, tmp_path: Path) -> None:
    clients("push", str(made), "me/pullkill2")
    kills = pull_and_kill(hub, clients, made, range(0, 80, 3), "me/pullkill2", tmp_path)
    print(f"kills of a pull: {kills}")
    assert kills >= 12


def test_a_download_that_is_cut(hub: Hub, clients: Clients, made: Path, tmp_path: Path) -> None:
    clients("push", str(made), "me/cutdown")
    hub.fail("GET /storage/", after=700)
    done = clients("pull", "me/cutdown", str(tmp_path / "out"), cache=str(tmp_path / "cache"))
    assert "error" not in done and contents(tmp_path / "out") == contents(made)
