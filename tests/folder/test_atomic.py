"""A full disk is a sentence, and leaves what stood there and nothing else."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_unlearn.errors import UserError
from peft_unlearn.folder.atomic import room_for, staged, write_text


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """What a full disk does to a writer, at a size of our choosing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_text(path, "old")
    with files_up_to(1000), pytest.raises(UserError, match=r"x\.json: cannot be written \(File too large\)"):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_with_tensors(tmp_path: Path) -> None:
    """safetensors has an error of its own for it."""
    out = tmp_path / "out"
    with files_up_to(1000), pytest.raises(UserError, match=r"out: cannot be written \(File too large\)"):  # noqa: SIM117
        with staged(out, lambda _: None) as stage:
            save_file({"a": torch.zeros(1000)}, str(stage / "a.safetensors"))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (OSError(errno.ENOENT, "gone"), ConnectionError("cut"), ValueError("(os error 2)"), UserError("x")):
        with pytest.raises(type(error)) as caught, room_for(tmp_path):
            raise error
        assert caught.value is error


def test_what_killed_writers_left_is_swept_and_living_ones_keep_theirs(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    from peft_unlearn.folder.atomic import check_free, part_of, sweep_parts

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    host = part_of(tmp_path / "x").name.split(".")[2].split("-")[0]
    names = {
        f".eval.json.{host}-{dead.pid}-0123abcd.part": True, f".eval.json.{dead.pid}-0123abcd.part": True,
        f".eval.json.{host}-{other.pid}-0123abcd.part": False, f".eval.json.{host}-{os.getpid()}-0123abcd.part": False,
        f".eval.json.ffffff-{dead.pid}-0123abcd.part": False, "mine.part": False, ".mine.part": False,
        f".a[b].{host}-{dead.pid}-0123abcd.part": True,
    }  # fmt: skip
    try:
        for name in names:
            (tmp_path / name).touch()
        sweep_parts(tmp_path, "a[b]")
        assert {n: (tmp_path / n).exists() for n in names} == {n: not n.startswith(".a") for n in names}
        write_text(tmp_path / "eval.json", "{}")
        left = {n for n in names if (tmp_path / n).exists()}
        assert left == {n for n, gone in names.items() if not gone}
        old = tmp_path / f".forget.json.ffffff-{dead.pid}-0123abcd.part"  # of another machine, long ago
        old.touch()
        os.utime(old, (0, 0))
        (tmp_path / f".README.md.{dead.pid}-0123abcd.part").touch()
        check_free(tmp_path, lambda _: None)
        assert {p.name for p in tmp_path.iterdir()} == left | {"eval.json"}
    finally:
        other.kill()
        other.wait()
