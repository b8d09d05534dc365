"""Which device models are judged on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from peft_unlearn.cli import app
from peft_unlearn.errors import UserError
from peft_unlearn.folder import device
from peft_unlearn.folder.device import choose, device_of, placed


@pytest.fixture(autouse=True)
def chosen() -> Iterator[None]:
    yield
    choose("auto")


def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_the_accelerator_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    two_cards(monkeypatch)
    assert device_of() == torch.device("cuda")
    assert [device_of(n) for n in ("cpu", "cuda", "cuda:1")] == [torch.device(n) for n in ("cpu", "cuda", "cuda:1")]
    choose("cpu")
    assert device_of() == torch.device("cpu")
    with pytest.raises(UserError, match=r"'cuda:2'.*here are cpu, cuda:0, cuda:1"):
        choose("cuda:2")
    assert device_of() == torch.device("cpu")  # what was chosen stays


def test_without_one_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_of() == torch.device("cpu")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match="this machine has none"):
            choose(name)
    with pytest.raises(UserError, match="knows no such device"):
        choose("gpu")


def test_what_was_spread_while_loading_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    two_cards(monkeypatch)
    model = torch.nn.Linear(1, 1)
    model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    assert placed(model) is model and model.weight.device.type == "cpu"
    assert placed(torch.nn.Linear(1, 1), "cpu").weight.device.type == "cpu"


def test_a_command_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["eval", "nowhere", "--device", "tpu-7"])
    assert isinstance(result.exception, UserError) and "device 'tpu-7'" in str(result.exception)
    monkeypatch.setattr(device, "_chosen", "auto")
