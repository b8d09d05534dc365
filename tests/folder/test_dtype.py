"""Which number format is taken where the user names none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinyfolder import save_base

from peft_unlearn.data import embedded
from peft_unlearn.errors import UserError
from peft_unlearn.folder import dtype as subject


def test_the_bases_own_where_this_machine_is_fast_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: save_base(tmp_path / name, dtype=getattr(torch, name)) for name in subject.DTYPES}
    assert {name: subject.own_dtype(base) for name, base in kinds.items()} == {name: name for name in kinds}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr(subject, "_seconds", lambda kind, fast=fast: 1.0 if (kind == "bfloat16") == fast else 2.0)
        found = {name: subject.dtype_of("auto", base) for name, base in kinds.items()}
        assert found == {"float32": "float32", "bfloat16": "bfloat16" if fast else "float32", "float16": "float32"}
        assert subject.dtype_of("auto", embedded.base_path("people")) == "float32"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert subject.fast_dtype(kinds["bfloat16"]) == "bfloat16" != subject.dtype_of("float16", kinds["bfloat16"])
    with pytest.raises(UserError, match="expected auto, float32"):
        subject.dtype_of("int8", kinds["float32"])
