"""Whatever moment the process dies at, what stands at the destination is nothing or the whole, and the next run ends it."""

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forking
import pytest
from tinyfolder import RECIPE, adapted, manifest_for, save_base, tokenizer, write

from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.write import write_adapter
from peft_unlearn.merging.gate import MergeRefused
from peft_unlearn.merging.merge import merge

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
FEW_AND_MANY = [pytest.param(3, id="few"), pytest.param(25, id="many", marks=pytest.mark.slow)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in about twenty shards, and an adapter of it."""
    here = tmp_path_factory.mktemp("sharded")
    base = save_base(here / "base", shard="1KB")
    assert len(list(base.glob("*.safetensors"))) > 10
    write(here / "adapter", base)
    return base, here / "adapter"


@pytest.mark.parametrize("kills", FEW_AND_MANY)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merge(kills: int, rounding: str, sharded: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = sharded
    reference, out = tmp_path / "reference" / "m", tmp_path / "here" / "m"

    def run(to: Path = out) -> Any:
        return merge(adapter, base, to, dtype="bfloat16", rounding=rounding, min_cosine=-1)

    length = seconds(lambda: run(reference))
    wanted = contents(reference)
    rng, resumed, cut = random.Random(kills), 0, 0
    while cut < kills:
        alive = forking.killed(run, rng.uniform(0, 1.1 * length))
        assert alive is not None
        cut += alive
        if not out.exists():  # nothing but the hidden stage
            assert all(p.name.startswith(".m.merge-") for p in out.parent.glob("*"))
            if cut % 4:
                continue  # the next child goes on with it
            resumed += run().resumed
        assert contents(out) == wanted
        shutil.rmtree(out)
    run()
    assert contents(out) == wanted and list(out.parent.iterdir()) == [out]
    if kills > 10:
        assert resumed > 0


def test_half_of_the_shards_are_kept(
    sharded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_unlearn.merging.stream import Stream

    base, adapter = sharded
    merge(adapter, base, tmp_path / "reference")
    wanted = contents(tmp_path / "reference")
    write_shard, done = Stream.write, []

    def dies(self: Any, entries: Any, path: Path) -> Any:
        if len(done) == 6:
            write_shard(self, entries, path)  # written, and not recorded
            raise KeyboardInterrupt
        done.append(path)
        return write_shard(self, entries, path)

    monkeypatch.setattr(Stream, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, base, tmp_path / "m")
    monkeypatch.setattr(Stream, "write", write_shard)
    (stage,) = tmp_path.glob(".m.merge-*")
    assert not (tmp_path / "m").exists() and not (stage / "model" / "config.json").exists()
    shard = done[2]  # what was damaged meanwhile is written again
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(bytes(raw))
    found = merge(adapter, base, tmp_path / "m")
    assert found.resumed == 5 and contents(tmp_path / "m") == wanted
    assert not list(tmp_path.glob(".m.merge-*"))


@pytest.mark.parametrize("left", ["stage", "journal", "nothing"])
def test_killed_after_the_rename_a_repeat_says_done(
    left: str, sharded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_unlearn.merging.stage import MergeStage

    base, adapter = sharded
    out = tmp_path / "m"
    if left == "stage":
        monkeypatch.setattr(MergeStage, "discard", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, base, out, dtype="bfloat16")
        monkeypatch.undo()
        assert list(tmp_path.glob(".m.merge-*"))
    else:
        merge(adapter, base, out, dtype="bfloat16")
        if left == "journal":
            (tmp_path / ".m.merge-0123456789abcdef" / "journal").mkdir(parents=True)
    wanted = contents(out)
    first = merge(adapter, base, tmp_path / "other", dtype="bfloat16")
    found = merge(adapter, base, out, dtype="bfloat16", check=left == "journal")
    assert found.done and "had finished" in found.remarks()[0] and not first.done and not first.remarks()
    assert (found.digest, found.base_digest, found.layers) == (first.digest, first.base_digest, first.layers)
    assert contents(out) == wanted and not list(tmp_path.glob(".m.merge-*")) and "done" not in found.to_dict()
    for odd in ({"scale": 2.0}, {"dtype": "float32"}, {"rounding": "stochastic"}):
        with pytest.raises(UserError, match="never replaces"):
            merge(adapter, base, out, **{"dtype": "bfloat16", **odd})
    with pytest.raises(MergeRefused, match="would lose"):  # of a finished one too the behavior is looked at
        merge(adapter, base, out, dtype="bfloat16", min_cosine=1.1, judge=lambda *_: None)
    assert merge(adapter, base, out, dtype="bfloat16", min_cosine=1.1).check.lost is None and contents(out) == wanted
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="never replaces"):
        merge(adapter, base, out, dtype="bfloat16")


def test_other_settings_do_not_go_on_with_it(
    sharded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_unlearn.merging.stage import MergeStage

    base, adapter = sharded
    monkeypatch.setattr(MergeStage, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, base, tmp_path / "m")
    monkeypatch.undo()
    (first,) = tmp_path.glob(".m.merge-*")
    assert merge(adapter, base, tmp_path / "m", scale=2.0).resumed == 0
    assert not first.exists() and not list(tmp_path.glob(".m.merge-*"))


def test_two_at_once(sharded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_unlearn.merging.stream import Stream

    base, adapter = sharded
    write_shard = Stream.write

    def meanwhile(self: Any, entries: Any, path: Path) -> Any:
        monkeypatch.setattr(Stream, "write", write_shard)
        with pytest.raises(UserError, match="another run is writing"):
            merge(adapter, base, tmp_path / "m")
        return write_shard(self, entries, path)

    monkeypatch.setattr(Stream, "write", meanwhile)
    assert merge(adapter, base, tmp_path / "m").digest


@pytest.mark.parametrize("kills", FEW_AND_MANY)
def test_save(kills: int, base_dir: Path, tmp_path: Path) -> None:
    """The same of an adapter's folder, an older version of which stands there from the second time on."""
    model = adapted(base_dir)
    manifest, words, out = manifest_for(model, base_dir), tokenizer(), tmp_path / "here" / "a"

    def run(to: Path = out) -> Any:
        return write_adapter(to, model, manifest, RECIPE, tokenizer=words)

    length = seconds(lambda: run(tmp_path / "reference" / "a"))
    wanted = contents(tmp_path / "reference" / "a")
    rng, cut = random.Random(kills), 0
    while cut < kills:
        alive = forking.killed(run, rng.uniform(0, 1.1 * length))
        assert alive is not None
        cut += alive
        if out.exists():
            assert contents(out) == wanted
            read_adapter(out)
        else:
            assert all(p.name.startswith(".a.stage-") for p in out.parent.glob("*"))
    run()
    assert contents(out) == wanted and list(out.parent.iterdir()) == [out]
