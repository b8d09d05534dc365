"""Writing a forget adapter's folder: staged, flushed, read back and compared, then swapped in whole.

forget.json is written last, so a stage that was cut short is never taken for an adapter. What stands at the destination
is replaced only if it is itself a complete forget adapter with nothing of anybody else's in it.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .atomic import check_free, staged, write_text
from .base import peft_base_name
from .card import ForgetCard, regenerated, render
from .eval_json import parts_of, record_measured
from .manifest import Manifest, path_like
from .read import CARD, CONFIG, EVAL, MANIFEST, RECIPE, WEIGHTS, AdapterFolder, file_sha256, read_adapter
from .recipe import dump_recipe, portable_recipe

KEPT = ("attacks", "calibration", "lm_eval")  # blocks of eval.json that `eval` does not make
_EDITABLE = (CARD, EVAL)  # may change after writing without making the adapter another one


def write_adapter(
    out: str | Path,
    peft_model: Any,
    manifest: Manifest,
    recipe: dict[str, Any],
    tokenizer: Any = None,
    eval_json: dict[str, Any] | None = None,
    card: str | None = None,
    adapter_name: str = "default",
    save: Callable[[Path], dict[str, torch.Tensor]] | None = None,
    check: Callable[[Path], None] = lambda _: None,
) -> AdapterFolder:
    """Write `out` atomically and return what was read back from it.

    peft_model: the PeftModel that holds `adapter_name`. manifest: its `files` are filled here; `recipe` is made
    portable (base and data files by name or hash). eval_json: numbers of this very adapter. card: README.md's text, a
    plain one by default. save: writes the adapter's files into the given folder itself and returns the tensors that
    adapter_model.safetensors has to hold, for adapters whose published form is not what PEFT would save. check: raises for
    a folder that must not be written, as it stands before it is swapped in. Raises `UserError` when something else
    stands at `out`, when the adapter is empty, zero or not finite, or when a machine path would be published.
    """
    wanted = {} if save is not None else _adapter_tensors(peft_model, adapter_name)
    manifest.check()
    with staged(out, why_not_replaceable) as stage:
        if save is not None:
            wanted = save(stage)
        else:
            _save_peft(peft_model, stage, adapter_name, manifest)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, stage)
        hashes = {name: row["sha256"] for name, row in manifest.data.items()}
        portable = portable_recipe(recipe, manifest.base.ref, hashes)
        (stage / RECIPE).write_text(dump_recipe(portable), encoding="utf-8")
        if eval_json is not None:
            eval_json = {**eval_json, "adapter_id": f"sha256:{file_sha256(stage / WEIGHTS)}"}
            (stage / EVAL).write_text(_json(eval_json, EVAL), encoding="utf-8")
        _same_as_in_memory(stage / WEIGHTS, wanted)
        check(stage)
        names = sorted([CARD, *(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())])
        files = {n: None if n in _EDITABLE else file_sha256(stage / n) for n in names}
        complete = replace(manifest, files=files)
        config = json.loads((stage / CONFIG).read_text(encoding="utf-8"))
        text = card if card is not None else render(ForgetCard(complete, config, eval_json))
        (stage / CARD).write_text(text, encoding="utf-8")
        (stage / MANIFEST).write_text(complete.text(), encoding="utf-8")
        _refuse_machine_paths(stage, peft_model, out)
        read_adapter(stage)
    return read_adapter(out)


def check_destination(out: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raise the `UserError` that `write_adapter` would raise for what stands at `out`: before the work, not after it.

    inputs: adapters that the work reads, none of which may be what it replaces.
    """
    out = Path(out).expanduser()
    if any(out.resolve() == Path(place).expanduser().resolve() for place in inputs):
        raise UserError(
            f"{out}: is itself one of the adapters that go into it; nothing was written. Name another folder."
        )
    check_free(out.resolve() if out.is_symlink() else out, why_not_replaceable)


def update_eval(
    folder: str | Path, eval_json: dict[str, Any], card: str | None = None, measured: Iterable[str] | None = None
) -> None:
    """Replace eval.json (and README.md) of a complete adapter, each file whole; the adapter's id does not change.

    What other commands stored beside the suite's numbers (`KEPT`) stays, unless `eval_json` brings its own or it was
    measured on other weights. README.md follows: `card`, or else its generated block made anew. measured: the parts
    (`eval_json.parts_of`) that were measured just now, default all of `eval_json`.
    """
    found = read_adapter(folder, check_hashes=False)
    old = found.eval or {}
    kept = {k: old[k] for k in KEPT if k in old and k not in eval_json and _about(old[k], old) == found.adapter_id}
    write_text(found.path / EVAL, _json({**eval_json, **kept}, EVAL))
    record_measured(eval_json, [n for n, _ in parts_of(eval_json)] if measured is None else measured)
    if card is None:  # a card that somebody broke by hand is theirs to mend; the numbers are safe
        with suppress(UserError):
            card = regenerated(read_adapter(found.path, check_hashes=False))
    if card is not None:
        write_text(found.path / CARD, card)


def update_block(folder: str | Path, name: str, block: dict[str, Any], measured: Iterable[str] | None = None) -> None:
    """Put `block` under `name` into eval.json and leave the rest of it as it is; an adapter without one gets one.

    measured: as of `update_eval`, default all of the block."""
    found = read_adapter(folder, check_hashes=False)
    empty = {"format": 1, "suite": None, "subjects": {}, "details": {}, "metrics": {}, "adapter_id": found.adapter_id}
    new = [n for n, _ in parts_of({name: block})] if measured is None else measured
    update_eval(found.path, {**(found.eval or empty), name: block}, measured=new)


def _about(block: Any, eval_json: dict[str, Any]) -> Any:
    """The id of the adapter that a block of eval.json was measured on."""
    own = block.get("adapter_id") if isinstance(block, dict) else None
    return own or eval_json.get("adapter_id")


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as e:
        raise UserError(f"{name}: holds a number that is not finite ({e}); use null and a reason.") from None


def _adapter_tensors(peft_model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    if adapter_name not in getattr(peft_model, "peft_config", {}):
        known = ", ".join(getattr(peft_model, "peft_config", {})) or "none"
        raise UserError(f"The model holds no adapter {adapter_name!r} (it holds: {known}).")
    tensors = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    if not tensors:
        raise UserError(f"The adapter {adapter_name!r} has no tensors.")
    return {n: t.detach() for n, t in tensors.items()}


def _save_peft(peft_model: Any, stage: Path, adapter_name: str, manifest: Manifest) -> None:
    # A folder of its own: PEFT also writes a card there, one that names the base by its local path.
    with tempfile.TemporaryDirectory(dir=stage) as scratch:
        peft_model.save_pretrained(scratch, selected_adapters=[adapter_name], save_embedding_layers=False)
        saved = Path(scratch) if adapter_name == "default" else Path(scratch, adapter_name)
        shutil.move(saved / WEIGHTS, stage / WEIGHTS)
        config = json.loads((saved / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = peft_base_name(manifest.base.ref)
    config["revision"] = manifest.base.revision
    for name, value in peft_model.peft_config[adapter_name].to_dict().items():
        if isinstance(value, set) and isinstance(config.get(name), list):
            config[name] = sorted(config[name])  # a set's order changes from process to process
    (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_tokenizer(tokenizer: Any, stage: Path) -> None:
    tokenizer.save_pretrained(str(stage))
    path = stage / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = {
        k: v for k, v in config.items()
        if k != "auto_map" and not (isinstance(v, str) and path_like(v) and k.endswith(("path", "file")))
    }  # fmt: skip
    if kept != config:
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _same_as_in_memory(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """A defect, not the user's doing, if what lies on disk is not what stands in memory: hence RuntimeError."""
    from safetensors.torch import load_file

    found = load_file(str(path))
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise RuntimeError(f"{path.name}: {len(odd)} tensor names differ from memory, first {odd[0]!r}")
    for name, tensor in wanted.items():
        there, here = found[name], tensor.cpu()
        same = there.shape == here.shape and there.dtype == here.dtype
        # NaN is not equal to itself; read_adapter reports it with its own message.
        if not same or not torch.equal(there.nan_to_num(), here.nan_to_num()):
            raise RuntimeError(f"{path.name}: {name!r} on disk is not what is in memory")


def why_not_replaceable(existing: Path) -> str | None:
    try:
        adapter = read_adapter(existing)
    except UserError as e:
        return f"holds something that is not a complete forget adapter ({e})"
    own = {MANIFEST, *adapter.manifest.files, *_EDITABLE}
    foreign = sorted({p.relative_to(existing).as_posix() for p in existing.rglob("*") if p.is_file()} - own)
    return f"holds files that are not this adapter's ({', '.join(foreign[:3])})" if foreign else None


def _refuse_machine_paths(stage: Path, peft_model: Any, out: str | Path) -> None:
    """No file for people may name this machine's folders (vocabularies are data, and may contain anything)."""
    places = {Path.home(), Path.cwd(), stage, Path(out).expanduser().absolute(), Path(tempfile.gettempdir())}
    for holder in (peft_model, getattr(peft_model, "config", None)):
        name = getattr(holder, "name_or_path", None)
        if isinstance(name, str) and path_like(name):
            places.add(Path(name).absolute())
    texts = [str(p) for p in places if len(p.parts) > 1]
    pattern = re.compile("(?<![\\w./-])(?:" + "|".join(re.escape(t) for t in texts) + ")(?![\\w.-])")
    for name in (CONFIG, MANIFEST, RECIPE, EVAL, CARD, "tokenizer_config.json"):
        path = stage / name
        if path.is_file() and (hit := pattern.search(path.read_text(encoding="utf-8"))):
            raise UserError(
                f"{name} would name a folder of this machine ({hit.group()}); nothing was written. Remove it there."
            )
