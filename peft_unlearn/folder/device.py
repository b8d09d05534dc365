"""Where models are judged: on the accelerator where there is one, or where the user says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    import torch

_chosen = "auto"


def choose(given: str) -> str:
    """Judge on this device from now on: auto, cpu, cuda, cuda:1, mps, xpu, .. (torch's names).

    Raises:
        UserError: a name that torch does not know, or a device that is not there.
    """
    global _chosen
    if given != "auto":
        device_of(given)
    _chosen = given
    return given


def device_of(given: str | None = None) -> torch.device:
    """The device of that name; default the chosen one, and without a choice the accelerator, else the CPU."""
    import torch

    name = given or _chosen
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return here or torch.device("cpu")
    there = ["cpu"] if here is None else ["cpu", *(f"{here.type}:{i}" for i in range(torch.accelerator.device_count()))]
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: torch knows no such device; here are {', '.join(there)}.") from None
    if found.type != "cpu" and str(found) not in (*there, here.type if here else "cpu"):
        raise UserError(
            f"device {name!r}: this machine has none, or torch was built without it; here are {', '.join(there)}."
        )
    return found


def placed(model: Any, given: str | None = None) -> Any:
    """The model on the device; one that was loaded in fewer bits, or over several devices, lies where it was loaded."""
    fixed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return model if fixed else model.to(device_of(given))
