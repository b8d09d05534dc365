"""What a base model *is*, as 64 hexadecimal digits, and whether the tensors in memory are still that.

digest = sha256 over one line per tensor, tensors sorted by on-disk name (as Unicode code points)::

    JSON of [name, dtype, shape, sha256 of the tensor's little-endian bytes], separators "," and ":", ASCII, then "\\n"

with dtype spelled as safetensors spells it ("BF16"). Each tensor's bytes are read once, in small pieces; tied tensors
count as they lie on disk (once, or twice). A tensor in memory is digested after a cast back to its on-disk dtype:

- its value, cast back, has the bytes of the file: same;
- its value is not what loading the file gives, whether or not the on-disk dtype can express it: CHANGED;
- loading itself rounded (a float32 file loaded as bfloat16), or names do not map: cannot tell.

A base that is quantized in memory has no way back: the files are quantized once more in the same way, and every tensor is compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .safetensors_io import TORCH_NAMES, TensorEntry, checkpoint_tensors


@dataclass
class LiveDigest:
    """Live tensors against the files of a checkpoint.

    `digest` is that of the live tensors, None where some of them have no form in the on-disk dtype or are absent.
    `changed` holds the on-disk names whose live value differs; `unknown` name -> why nothing can be said about it.
    """

    checkpoint_digest: str
    digest: str | None
    changed: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    n_tensors: int = 0
    requantized: bool = False  # compared with the files quantized again

    @property
    def verdict(self) -> Literal["same", "changed", "cannot tell"]:
        if self.changed:
            return "changed"
        return "cannot tell" if self.unknown or self.digest is None else "same"

    @property
    def reason(self) -> str | None:
        """One sentence for `changed` and `cannot tell`, None for `same`."""
        if self.changed:
            files = "the files quantized again" if self.requantized else "the files"
            return f"{len(self.changed)} of {self.n_tensors} tensors differ from {files}: {_some(self.changed)}."
        if self.unknown:
            name, why = next(iter(self.unknown.items()))
            more = f" (and {len(self.unknown) - 1} more)" if len(self.unknown) > 1 else ""
            return f"{name}: {why}{more}."
        return None


def _some(names: list[str], n: int = 4) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def combined(rows: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(rows):
        dtype, shape, sha = rows[name]
        whole.update(json.dumps([name, dtype, list(shape), sha], separators=(",", ":")).encode() + b"\n")
    return whole.hexdigest()


def _sha_on_disk(entry: TensorEntry) -> str:
    sha = hashlib.sha256()
    for piece in entry.chunks():
        sha.update(piece)
    return sha.hexdigest()


def _pick(tensors: dict[str, TensorEntry], modules: Iterable[str] | None, where: object) -> dict[str, TensorEntry]:
    """The tensors directly of the named modules (weight, bias), or named exactly.

    Fused experts lie on disk one by one: for the module that holds them, or one of its parameters, those of all its experts.
    """
    if modules is None:
        return tensors
    wanted = set(modules)
    picked = {n: e for n, e in tensors.items() if n in wanted or n.rpartition(".")[0] in wanted}
    lost = sorted(wanted - set(picked) - {n.rpartition(".")[0] for n in picked})
    for name in list(lost):
        for lead in (f"{name}.", f"{name.rpartition('.')[0]}."):
            inside = {n: e for n, e in tensors.items() if re.match(rf"{re.escape(lead)}\d+\.", n)}
            if inside:
                picked |= inside
                lost.remove(name)
                break
    if lost:
        raise UserError(f"{where}: no tensor on disk for {_some(lost)}.")
    return picked


def digest_checkpoint(checkpoint_dir: str | Path, modules: Iterable[str] | None = None) -> str:
    """The digest (64 hex digits) of a checkpoint folder, single file or sharded; with `modules`, of those alone."""
    picked = _pick(checkpoint_tensors(checkpoint_dir), modules, checkpoint_dir)
    return combined({n: (e.dtype, e.shape, _sha_on_disk(e)) for n, e in picked.items()})


def digest_live(model: nn.Module, checkpoint_dir: str | Path, modules: Iterable[str] | None = None) -> LiveDigest:
    """Compare the tensors `model` computes with against the files of `checkpoint_dir`, one tensor at a time.

    Adapters may be loaded: their own tensors are left out and the wrapped weights are found under their base names.
    """
    entries = _pick(checkpoint_tensors(checkpoint_dir), modules, checkpoint_dir)
    on_disk = {n: (e.dtype, e.shape, _sha_on_disk(e)) for n, e in entries.items()}
    out = LiveDigest(combined(on_disk), None, n_tensors=len(entries))
    if _quantized(model):
        _as_quantized_again(model, Path(checkpoint_dir), modules, out)
        return out
    live = _by_disk_name(model, entries)
    unused = _unused_patterns(model)
    rows: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for name, entry in entries.items():
        tensor = live.get(name)
        if tensor is None and any(re.search(p, name) for p in unused):
            rows[name] = on_disk[name]  # the class declares that it does not load this tensor: nothing computes with it
            continue
        if tensor is None:
            out.unknown[name] = "it is on disk but no live tensor has that name (the layout in memory may be fused)"
            continue
        verdict, sha = _compare(tensor, entry, on_disk[name][2])
        if verdict == "changed":
            out.changed.append(name)
        elif verdict != "same":
            out.unknown[name] = verdict
        if sha is not None:
            rows[name] = (entry.dtype, entry.shape, sha)
    if modules is None:
        _account_for_extra(model, live, entries, out)
    if len(rows) == len(entries):
        out.digest = combined(rows)
    return out


def _compare(tensor: Tensor, entry: TensorEntry, disk_sha: str) -> tuple[str, str | None]:
    """("same" | "changed" | why one cannot tell, sha256 of the live value in the on-disk dtype where it has one)."""
    dtype = getattr(torch, TORCH_NAMES.get(entry.dtype, ""), None)
    if dtype is None:
        return f"its on-disk dtype {entry.dtype} is not known here", None
    if tensor.is_meta:
        return "it is not in memory (offloaded)", None
    if tuple(tensor.shape) != entry.shape:
        return "changed", None
    tensor = tensor.detach()
    full = getattr(tensor, "full_tensor", None)  # DTensor: the whole, on every rank
    tensor = (full() if full is not None else tensor).cpu().contiguous()
    back = tensor.to(dtype)
    lossless = tensor.dtype == dtype or _same_bits(back.to(tensor.dtype), tensor)
    sha = hashlib.sha256(_bytes(back)).hexdigest() if lossless else None
    if sha == disk_sha:
        return "same", sha
    # Different bytes: is it what loading this file into the live dtype gives anyway?
    if tensor.dtype != dtype and _same_bits(entry.tensor().to(tensor.dtype), tensor):
        return f"loading it as {str(tensor.dtype).removeprefix('torch.')} rounded it; load the base as float32", None
    return "changed", sha


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def _inner(model: Any) -> Any:
    """The base itself, where `model` is a PeftModel around it."""
    return getattr(model, "get_base_model", lambda: model)()


def _quantized(model: nn.Module) -> bool:
    inner = _inner(model)
    return bool(getattr(inner, "is_quantized", False)) or getattr(inner, "hf_quantizer", None) is not None


def _as_quantized_again(model: nn.Module, checkpoint_dir: Path, modules: Iterable[str] | None, out: LiveDigest) -> None:
    """Fill `out` for a base in fewer bits: its digest is that of the files where loading them in the same way gives the same tensors."""
    from .base import load_base
    from .quantized import options_of

    inner = _inner(model)
    dtype = next(p for p in inner.parameters() if p.is_floating_point()).dtype
    try:
        again = load_base(checkpoint_dir, dtype, (), options_of(inner))
    except UserError as e:
        out.unknown["the base"] = (
            f"it is quantized in memory, and cannot be compared with its files quantized again ({e})"
        )
        return
    mine, theirs = plain_tensors(model), plain_tensors(again)
    within = None if modules is None else tuple(f"{m}." for m in modules)
    names = sorted(n for n in {*mine, *theirs} if within is None or n.startswith(within))
    out.n_tensors, out.requantized = len(names), True
    out.changed = [n for n in names if n not in mine or n not in theirs or not same_tensor(mine[n], theirs[n])]
    if not out.changed:
        out.digest = out.checkpoint_digest


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`base_tensors`, of tensors that are made of others those."""
    from .quantized import plain_parts

    return {part: t for name, tensor in base_tensors(model).items() for part, t in plain_parts(name, tensor)}


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits, on whatever devices."""
    a, b = a.detach().cpu(), b.detach().cpu()
    return a.dtype == b.dtype and a.shape == b.shape and _same_bits(a, b)


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    """Every module PEFT put into `model`, by its live name (tuner layers and wrappers of saved or tied modules)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)}


_WRAPPED = ("base_layer", "original_module")  # what PEFT's modules call the weights of the base inside them


def name_in_base(live_name: str) -> str:
    """The name that a tensor or module of the base has without PEFT."""
    return ".".join(p for p in live_name.split(".") if p not in _WRAPPED).removeprefix("base_model.model.")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's persistent tensors by the name they have without PEFT; adapters' own tensors are left out."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        model = _inner(model)  # a soft prompt stands beside the base, and changes no module of it
    wrapped = [f"{name}." for name in adapter_modules(model)]
    return {
        name_in_base(name): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if all(name[len(w) :].split(".")[0] in _WRAPPED for w in wrapped if name.startswith(w))
    }


def _by_disk_name(model: nn.Module, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The base's live tensors under their on-disk names, as far as they can be found.

    Where names differ (fused experts, other prefixes) transformers' own reverse of what it did at loading is asked; it may
    copy. It cannot make a changed tensor pass, since what it gives is compared with the files byte for byte.
    """
    live = base_tensors(model)
    if all(name in live for name in entries):
        return live
    inner = _inner(model)
    try:
        from transformers.core_model_loading import revert_weight_conversion

        reverted: dict[str, Tensor] = revert_weight_conversion(inner, {n: t.detach() for n, t in live.items()})
    except Exception:  # not a documented function: whatever goes wrong in it, the answer is "cannot tell"
        reverted = {}
    if sum(name in reverted for name in entries) > sum(name in live for name in entries):
        live = reverted
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."
    for name in [n for n in live if n.startswith(prefix)]:
        short = name.removeprefix(prefix)
        if short in entries and name not in entries and short not in live:
            live[short] = live.pop(name)
    return live


def _unused_patterns(model: nn.Module) -> list[str]:
    return sorted(getattr(_inner(model), "_keys_to_ignore_on_load_unexpected", None) or [])


def _account_for_extra(
    model: nn.Module, live: dict[str, Tensor], entries: dict[str, TensorEntry], out: LiveDigest
) -> None:
    """Live tensors that no file holds are right only where they are tied to one that a file does hold."""
    known = {live[n].data_ptr(): n for n in entries if n in live and live[n].numel()}
    tied = _tied(model)
    for name, tensor in live.items():
        if name in entries or tensor.data_ptr() in known:
            continue
        source = live.get(str(tied.get(name)))
        if source is None:
            out.unknown[name] = "it is in memory but in none of the files"
        elif source.shape != tensor.shape or not _same_bits(source.detach().cpu(), tensor.detach().cpu()):
            out.changed.append(name)


def _tied(model: nn.Module) -> dict[str, str]:
    """Name of a tied tensor -> name of the one it is tied to, as the model's class declares them."""
    inner = _inner(model)
    tied = getattr(inner, "_tied_weights_keys", None)
    config = getattr(inner, "config", None)
    return dict(tied) if isinstance(tied, dict) and getattr(config, "tie_word_embeddings", False) else {}


def targeted_names(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Base names of what `adapter` (default: any) is injected into: modules, or parameters of fused experts.

    A tied module goes by the name of what it is tied to, which is the one that lies on disk.
    """
    names = set()
    tied = {k.rpartition(".")[0]: v.rpartition(".")[0] for k, v in _tied(model).items()}
    for live_name, module in adapter_modules(model).items():
        holds: Any = getattr(module, "_all_available_adapter_names", None)
        if holds is None or (adapter is not None and adapter not in holds()):
            continue
        name = name_in_base(live_name)
        parameter = getattr(module, "parameter_name", None)
        names.add(f"{name}.{parameter}" if parameter else tied.get(name, name))
    return sorted(names)
