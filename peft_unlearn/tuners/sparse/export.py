"""Sparse adapters as files: the compact form, stock SHiRA that loads without this package, and back.

SHiRA (https://arxiv.org/abs/2406.13175; PEFT's tuners/shira) holds exactly r (in + out) entries of each linear weight it is on, with one
r for all. So the entries of a weight are dealt out to several SHiRA adapters, r = 1, 2, 4, ..: those of the binary digits of
ceil(entries / (in + out)), and what is left over in the last is filled with zeros at index 0, which adds nothing, exactly. Loaded
together they are the sparse adapter, at the size of `StockForm.padding` times its entries. The first lies on top of the folder and is
what PEFT loads from it, the others in subfolders, where PEFT's own ``save_pretrained`` puts further adapters; the key `TOGETHER` in the
first one's configuration names them, which PEFT repeats in a warning when the first is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig
from safetensors.torch import save
from torch import Tensor, nn

from ...errors import UserError
from ...folder.atomic import staged
from ...folder.digest import name_in_base
from ...folder.read import CONFIG, TOGETHER, WEIGHTS, read_json
from ...folder.safetensors_io import read_header
from ..expert_lora.blocks import innermost
from ..peft_type import SPARSE_TYPE
from ..selection import Selection
from ..stock import SPARSE_COMPACT, write_stock
from .config import SparseConfig
from .layer import INDICES, VALUES, SparseLayer

_LEAD = "base_model.model."


@dataclass(frozen=True)
class Entries:
    """Of one parameter: rising flat positions (k,) int64, what is added there (k,) float32, the parameter's shape."""

    positions: Tensor
    values: Tensor
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    @staticmethod
    def summed(parts: Sequence[tuple[Entries, float]]) -> Entries:
        """The sum of factor times entries, on the union of their positions; summed in float64. UserError where shapes differ."""
        shape = parts[0][0].shape
        if odd := next((e.shape for e, _ in parts if e.shape != shape), None):
            raise UserError(
                f"a parameter is {list(shape)} in one of these adapters and {list(odd)} in another; they have no sum"
            )
        i, where = torch.unique(torch.cat([e.positions for e, _ in parts]), return_inverse=True)
        v = torch.cat([e.values.double() * c for e, c in parts])
        return Entries(i, torch.zeros(len(i), dtype=torch.float64).index_add(0, where, v).float(), shape)


@dataclass(frozen=True)
class StockForm:
    """Subfolder ("" for the first) -> config and tensors. padding: entries stored / entries of the adapter."""

    parts: dict[str, tuple[ShiraConfig, dict[str, Tensor]]]
    padding: float


# --- from a model ------------------------------------------------------------------------------------------------------


def layers_of(model: nn.Module, adapter: str) -> dict[str, SparseLayer]:
    """Module path in the base -> layer, of every layer that holds the adapter."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer) and adapter in m.scaling}
    return {".".join(p for p in n.removeprefix(_LEAD).split(".") if p != "base_layer"): m for n, m in found.items()}


@torch.no_grad()
def entries_of(model: nn.Module, adapter: str = "default") -> dict[str, Entries]:
    """Parameter's name in the base -> what the adapter adds to it at scale 1."""
    out = {}
    for path, layer in layers_of(model, adapter).items():
        counts = layer.counts[adapter]
        both = (layer.positions(adapter), layer.values(adapter).detach())
        for leaf, i, v in zip(counts, *(t.cpu().split(list(counts.values())) for t in both), strict=True):
            out[f"{path}.{leaf}"] = Entries(i.long(), v.float().clone(), tuple(layer.parameter(leaf).shape))
    return dict(sorted(out.items()))


def stock_parts(model: Any, adapter: str) -> dict[str, dict[str, Tensor]]:
    """Subfolder ("" for the top) -> the tensors there of the adapter's stock form; of none, its own on top."""
    entries, config = entries_of(model, adapter), model.peft_config[adapter]
    stock = stock_form(entries, linear_in(model), config.scale, config.task_type)
    if isinstance(stock, str):
        return {"": compact(entries, config.scale, config.task_type)[1]}
    return {sub: tensors for sub, (_, tensors) in stock.parts.items()}


def linear_in(model: nn.Module) -> Callable[[str], bool]:
    """Whether the parameter of a name in the base is the weight of an ``nn.Linear``."""
    inner: Any = getattr(model, "get_base_model", lambda: model)()
    modules = {name_in_base(n): m for n, m in inner.named_modules()}
    return lambda name: (
        name.endswith(".weight") and isinstance(innermost(modules[name.removesuffix(".weight")]), nn.Linear)
    )


def save_into(
    stage: Path, model: Any, adapter: str, base_name: str = "", revision: str | None = None
) -> tuple[dict[str, Tensor], StockForm | str]:
    """`write` of a model's adapter."""
    config = model.peft_config[adapter]
    return write(
        stage, entries_of(model, adapter), linear_in(model), config.scale, config.task_type, base_name, revision
    )


def export_stock(peft_model: Any, out_dir: str | Path, adapter_name: str = "default") -> StockForm:
    """Write a sparse adapter of a model as stock SHiRA, atomically, with the compact form in the subfolder ``sparse/``.

    The folder names no base model, and holds the adapter at the scale of its configuration. Never replaces one that is not empty.

    Raises:
        UserError: the model has no such sparse adapter, SHiRA cannot hold it, or something stands at `out_dir`.
    """
    config = getattr(peft_model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, SparseConfig):
        held = ", ".join(getattr(peft_model, "peft_config", {})) or "none"
        raise UserError(f"The model holds no sparse adapter {adapter_name!r} (its adapters: {held}).")
    with staged(out_dir, lambda _: "is not empty") as stage:
        _, stock = save_into(stage, peft_model, adapter_name)
        if isinstance(stock, str):
            raise UserError(
                f"{out_dir}: the adapter {adapter_name!r} has no stock form: {stock}. Save it with save_pretrained"
            )
    return stock


# --- to files ----------------------------------------------------------------------------------------------------------


def write(
    stage: Path,
    entries: Mapping[str, Entries],
    linear: Callable[[str], bool],
    scale: float = 1.0,
    task_type: Any = "CAUSAL_LM",
    base_name: str = "",
    revision: str | None = None,
) -> tuple[dict[str, Tensor], StockForm | str]:
    """Write a sparse adapter into an existing folder; the tensors on top of it, and the stock form, or why there is none.

    Stock on top and compact in ``sparse/`` where SHiRA can hold it, else the compact form alone, on top.

    Args:
        linear: whether the parameter of a name is the weight of an ``nn.Linear``, all that SHiRA knows.
        base_name, revision: what the configurations call the base; a Hub id or nothing, never a path.
    """
    config, tensors = compact(entries, scale, task_type)
    stock = stock_form(entries, linear, scale, task_type)
    if isinstance(stock, str):
        write_stock(stage, config, tensors, base_name, revision)
        return tensors, stock
    (stage / SPARSE_COMPACT).mkdir()
    write_stock(stage / SPARSE_COMPACT, config, tensors, base_name, revision)
    # The adapter's id is the hash of the file on top: this way it stands for all of them.
    whole = hashlib.sha256(save(tensors)).hexdigest()
    for sub, (part, values) in stock.parts.items():
        (stage / sub).mkdir(exist_ok=True)
        more = {TOGETHER: [s for s in stock.parts if s]} if not sub and len(stock.parts) > 1 else {}
        write_stock(stage / sub, part, values, base_name, revision, {SPARSE_TYPE: whole}, more)
    return stock.parts[""][1], stock


def compact(
    entries: Mapping[str, Entries], scale: float = 1.0, task_type: Any = "CAUSAL_LM"
) -> tuple[SparseConfig, dict[str, Tensor]]:
    """Config and tensors of our own type, as ``save_pretrained`` names them."""
    chosen = Selection({n: e.positions for n, e in entries.items()}, {n: e.shape for n, e in entries.items()})
    modules: dict[str, list[Entries]] = {}
    for name, e in sorted(entries.items()):
        modules.setdefault(name.rpartition(".")[0], []).append(e)
    tensors = {}
    for path, parts in modules.items():
        kind = torch.int64 if any(math.prod(e.shape) >= 2**31 for e in parts) else torch.int32
        tensors[f"{_LEAD}{path}.{VALUES}"] = torch.cat([e.values for e in parts])
        tensors[f"{_LEAD}{path}.{INDICES}"] = torch.cat([e.positions for e in parts]).to(kind)
    return SparseConfig(selection=chosen, scale=scale, task_type=task_type), tensors


def stock_form(
    entries: Mapping[str, Entries], linear: Callable[[str], bool], scale: float = 1.0, task_type: Any = "CAUSAL_LM"
) -> StockForm | str:
    """The same adapter as stock SHiRA at scale 1, or why it cannot be one."""
    dealt: dict[tuple[int, int], dict[str, tuple[Tensor, Tensor]]] = {}
    for name, e in entries.items():
        if not linear(name):
            return f"{name} is not the weight of a linear layer, and SHiRA adapts nothing else"
        rows, columns = e.shape
        unit, at = rows + columns, 0
        most = rows * columns // unit
        if not most:
            return f"{name} is {rows} by {columns}, too small for a SHiRA"
        wanted = -(-len(e.positions) // unit)
        digits = [1 << b for b in reversed(range(wanted.bit_length())) if min(wanted, most) >> b & 1]
        for r in digits + [1] * (wanted - min(wanted, most)):
            again = next(n for n in range(len(digits) + 1) if name not in dealt.get((r, n), {}))
            i, v = e.positions[at : at + r * unit], e.values[at : at + r * unit] * scale
            at += r * unit
            pad = r * unit - len(i)
            i, v = torch.cat([i, i.new_zeros(pad)]), torch.cat([v, v.new_zeros(pad)])
            indices = torch.stack([i // columns, i % columns]).to(torch.int32)
            dealt.setdefault((r, again), {})[name.removesuffix(".weight")] = (indices, v)
    order = sorted(dealt, key=lambda key: -key[0] * len(dealt[key]))
    parts = {}
    for n, (r, again) in enumerate(order):
        modules = dealt[r, again]
        config = ShiraConfig(
            r=r, mask_type="selected", target_modules=sorted(modules), inference_mode=True, task_type=task_type  # type: ignore[arg-type]
        )  # fmt: skip
        tensors = {f"{_LEAD}{m}.shira_weight": v for m, (_, v) in modules.items()}
        tensors |= {f"{_LEAD}{m}.shira_indices": i for m, (i, _) in modules.items()}
        parts["" if not n else f"shira_r{r}" + "_more" * again] = (config, tensors)
    stored = sum(v.numel() for _, tensors in parts.values() for k, v in tensors.items() if k.endswith("weight"))
    return StockForm(parts, stored / max(1, sum(len(e.positions) for e in entries.values())))


# --- from files --------------------------------------------------------------------------------------------------------


def read_entries(
    folder: Path, config: Mapping[str, Any], shapes: Callable[[str], tuple[int, ...]] | None = None
) -> tuple[dict[str, Entries], float]:
    """What an adapter's folder adds, by parameter, and its scale: from our own type, or a stock SHiRA or SUPERTUNING.

    shapes: the shape of the base's parameter of a name; stock adapters do not say it.

    Raises:
        UserError: not a sparse adapter, or positions that are not in the parameter.
    """
    kind = str(config.get("peft_type"))
    if kind == SPARSE_TYPE:
        return _from_compact(folder, config), float(config.get("scale", 1.0))
    if shapes is None or kind not in STOCK:
        raise UserError(f"{folder}: type {kind} is not read as a sparse adapter here")
    subfolders = config.get(TOGETHER) or []
    if not isinstance(subfolders, list) or any(not _is_part(s) for s in subfolders):
        raise UserError(f"{folder / CONFIG}: {TOGETHER} must be a list of subfolders' names")
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for place in [folder, *(folder / s for s in subfolders)]:
        own = config if place is folder else read_json(place / CONFIG)
        if own.get("peft_type") != kind or (own.get("r") and kind == "SUPERTUNING"):
            raise UserError(f"{place}: is no plain {kind}")
        for module, (i, v) in _stock_pairs(place, kind, shapes).items():
            found.setdefault(f"{module}.weight", []).append((i, v))
    out = {}
    for name, pairs in sorted(found.items()):
        shape = shapes(name)
        e = Entries.summed([(Entries(i, v, shape), 1.0) for i, v in pairs])
        if len(e) and (int(e.positions[0]) < 0 or int(e.positions[-1]) >= math.prod(shape)):
            raise UserError(f"{folder}: positions of {name} are outside its {list(shape)}")
        if bool((kept := e.values != 0).any()):
            out[name] = Entries(e.positions[kept], e.values[kept], shape)
    if not out:
        raise UserError(f"{folder}: every value is zero: the adapter does nothing")
    return out, 1.0


STOCK = ("SHIRA", "SUPERTUNING")


def _is_part(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("shira_r") and name.replace("_", "").isalnum()


def _tensors(folder: Path, ends: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Module -> (what -> tensor) of the file's tensors, whose names end in `ends[what]`; UserError for others, and for lone ones."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, entry in read_header(folder / WEIGHTS).items():
        what = next((w for w, end in ends.items() if name.startswith(_LEAD) and name.endswith(f".{end}")), None)
        if what is None:
            raise UserError(f"{folder / WEIGHTS}: the tensor {name!r} is no part of a sparse adapter")
        found.setdefault(name[len(_LEAD) : -len(ends[what]) - 1], {})[what] = entry.tensor()
    if lone := next((m for m, both in found.items() if len(both) < 2), None):
        raise UserError(f"{folder / WEIGHTS}: {lone} has only one of values and positions")
    return found


def _stock_pairs(folder: Path, kind: str, shapes: Callable[[str], tuple[int, ...]]) -> dict[str, tuple[Tensor, Tensor]]:
    lead = "shira_weight" if kind == "SHIRA" else "supertuning_values"
    out = {}
    for module, both in _tensors(folder, {"v": lead, "i": f"{kind.lower()}_indices"}).items():
        i, v, shape = both["i"].long(), both["v"], shapes(f"{module}.weight")
        if kind == "SHIRA":
            if i.shape != (2, v.numel()) or bool((i < 0).any() | (i[0] >= shape[0]).any() | (i[1] >= shape[1]).any()):
                raise UserError(f"{folder}: positions of {module} are outside its {list(shape)}")
            i = i[0] * shape[1] + i[1]
        if i.shape != v.shape:
            raise UserError(f"{folder}: {module} has {v.numel()} values and {i.numel()} positions")
        out[module] = (i, v)
    return out


def _from_compact(folder: Path, config: Mapping[str, Any]) -> dict[str, Entries]:
    try:
        known = SparseConfig(counts=config.get("counts"), shapes=config.get("shapes"), scale=config.get("scale", 1.0))
    except ValueError as e:
        raise UserError(f"{folder / CONFIG}: {e}") from None
    assert known.counts is not None and known.shapes is not None
    modules: dict[str, dict[str, int]] = {}
    for name, k in known.counts.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = k
    found = _tensors(folder, {"v": VALUES, "i": INDICES})
    if set(found) != set(modules):
        raise UserError(
            f"{folder}: its configuration and its tensors name different modules ({min(set(found) ^ set(modules))})"
        )
    out = {}
    for module, counts in modules.items():
        i, v = found[module]["i"].long(), found[module]["v"]
        if i.shape != v.shape or i.shape != (sum(counts.values()),):
            raise UserError(
                f"{folder}: {module} has {v.numel()} values and {i.numel()} positions, and counts say {sum(counts.values())}"
            )
        for (name, k), pi, pv in zip(counts.items(), *(t.split(list(counts.values())) for t in (i, v)), strict=True):
            shape = tuple(known.shapes[name])
            if bool((pi[1:] <= pi[:-1]).any()) or int(pi[0]) < 0 or int(pi[-1]) >= math.prod(shape):
                raise UserError(
                    f"{folder}: the {k} positions of {name} are not rising numbers below {math.prod(shape)}"
                )
            out[name] = Entries(pi, pv.float(), shape)
    return dict(sorted(out.items()))


@torch.no_grad()
def fill(model: nn.Module, adapter: str, entries: Mapping[str, Entries]) -> None:
    """Set the values of an adapter that was put on with the config of `delta.read_sparse`."""
    for path, layer in layers_of(model, adapter).items():
        layer.values(adapter).copy_(torch.cat([entries[f"{path}.{leaf}"].values for leaf in layer.counts[adapter]]))
