"""From one adapter folder to the scale at which it forgets most and still keeps what it must; written into the folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.plan import Progress
from ..evaluation.subjects import bundle_for, embedded_retain_model
from ..folder.manifest import Manifest, Probes, probes
from ..folder.read import AdapterFolder, read_adapter
from ..folder.rescale import bake as bake_in
from ..folder.rescale import set_scale
from ..folder.results import check_writable, write_file
from ..folder.write import update_eval
from ..stack.model import ForgetModel
from .calibrate import FLOOR, METRIC, Levels, check_exact, dialed, make_read, search

FORMAT = 1
BLOCK = "calibration"  # of eval.json


def calibrate(
    folder: str | Path,
    *,
    retain_floor: float = FLOOR,
    metric: str = METRIC,
    max_scale: float = 1.0,
    bake: bool = False,
    n: int | None = None,
    base: str | None = None,
    data: str | None = None,
    progress: Progress | None = None,
    write: bool = True,
) -> dict[str, Any]:
    """Search the scale (`evaluation.calibrate.search`), store it in forget.json and the search as block "calibration" of eval.json.

    With `n` (only so many rows of each set) or write=False nothing is stored. Where no scale will do, forget.json stays as it is
    and ``scale`` is null. bake: lora_alpha takes the scale in, so that plain PEFT runs at it (`folder.rescale.bake`).
    """
    found = read_adapter(folder)
    check_exact(found)
    if bake and (n is not None or not write):
        raise UserError("bake writes into the adapter; it takes a search on all rows (no --n)")
    if write and n is None:
        check_writable(found.path)
    bundle = bundle_for([found], data)
    stack = ForgetModel.from_pretrained(base, {"adapter": found.path})
    read = make_read(bundle, stack.tokenizer, metric, n)
    at = dialed(stack, "adapter")
    levels = base_levels(stack, read)
    result = search(read, at, levels, retain_floor, max_scale, progress)
    block: dict[str, Any] = {
        "format": FORMAT,
        "metric": metric,
        **result.as_json(),
        "max_scale": max_scale,
        "as_trained": next((p.as_json() for p in result.curve if p.scale == 1.0), None),
        "retain_only": _levels_of(embedded_retain_model(found.manifest.base.ref, bundle), read),
        "scale_before": found.manifest.scale,
        "baked": False,
        "stored": False,
        "n": {"forget": levels.forget.n, "retain": levels.retain.n},
        "adapter_id": found.adapter_id,
    }
    if not write or n is not None:
        return block
    block["stored"] = True
    if result.chosen is not None:
        scale = result.chosen.scale
        if bake and scale != 1.0:
            block["baked"] = True
            bake_in(found.path, scale, _probes_at(found.manifest, at(scale), stack.tokenizer))
        else:
            set_scale(found.path, scale)
    _store(found, block)
    return block


def base_levels(stack: ForgetModel, read: Any) -> Levels:
    with stack.disabled() as model:
        return read(model)


def _levels_of(subject: Any, read: Any) -> dict[str, Any] | None:
    if subject is None:
        return None
    with subject() as model:
        return read(model).as_json()


def _probes_at(manifest: Manifest, at: AbstractContextManager[Any], tokenizer: Any) -> Probes | None:
    if manifest.probes is None:
        return None
    with at as model:
        return probes(model, tokenizer, manifest.probes.prompts)


def _store(found: AdapterFolder, block: dict[str, Any]) -> None:
    """The block beside whatever eval.json has. Numbers that were measured at another scale get that scale beside them; after
    baking it is in units of what scale 1 means now."""
    stored = dict(read_adapter(found.path).eval or {"format": 1, "adapter_id": found.adapter_id, "subjects": {}})
    if block["scale"] is not None and (block["baked"] or block["scale"] != block["scale_before"]):
        unit = block["scale"] if block["baked"] else 1.0
        if stored.get("subjects"):
            stored["scale"] = stored.get("scale", block["scale_before"]) / unit
        attacks = stored.get("attacks")
        if isinstance(attacks, dict) and isinstance(attacks.get("scale"), dict):
            stored["attacks"] = {**attacks, "scale": {k: v / unit for k, v in attacks["scale"].items()}}
    update_eval(found.path, {**stored, BLOCK: block})


def picture(block: dict[str, Any], out: str | Path) -> Path:
    """Draw the curve to a PNG file."""
    from ..reporting.pictures import calibration

    return write_file(out, calibration(block))


def describe(block: dict[str, Any]) -> str:
    """The result in lines for people."""
    from ..reporting.pictures import named

    metric, points = named(block["metric"]), block["curve"]
    lines = [f"scale   forget   retain   ({metric}; {block['n']['forget']} and {block['n']['retain']} rows)"]
    for p in points:
        mark = " <" if p["scale"] == block["scale"] else ""
        cells = ("   none" if p[side]["value"] is None else f"{p[side]['value']:7.3f}" for side in ("forget", "retain"))
        lines.append(f"{p['scale']:5.3f}  {'  '.join(cells)}{mark}")
    kept = f"floor {100 * block['floor']:g} % of the base's retain value, {block['wanted']:.3f}"
    if block["scale"] is None:
        return "\n".join([*lines, f"no: {block['reason']} ({kept})"])
    low, high = block["retention"]["ci95"] or (None, None)
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    chosen = block["chosen"]
    return "\n".join(
        [
            *lines,
            f"scale {block['scale']:.4g} (weight on the original {block['weight_on_original']:.4g}): {block['how']}",
            f"forget {chosen['forget']['value']:.3f}, retain {100 * block['retention']['value']:.1f} % of the base's{interval}; {kept}",
        ]
    )


def notes(block: dict[str, Any]) -> list[str]:
    """What a user should know beside the result."""
    out = []
    if not block["monotone"]:
        rise = max(block["rises"], key=lambda side: block["rises"][side])
        out.append(
            f"note: the curves do not only fall (the {rise} value rises by {block['rises'][rise]:.3f} from one grid point to the next): "
            "the best grid point was taken, not a bisected one"
        )
    if block["baked"]:
        out.append(
            f"note: lora_alpha was multiplied by {block['scale']:g}, so plain PEFT runs at the calibrated strength; forget.json says "
            "scale 1 and method.baked_scale"
        )
    if not block["stored"]:
        out.append("note: a look at some of the rows: nothing was stored")
    elif block["scale"] is not None and block["scale"] != block["scale_before"]:
        out.append(
            "note: numbers stored in eval.json before were taken at the old scale; `peft-unlearn eval` renews them"
        )
    return out
