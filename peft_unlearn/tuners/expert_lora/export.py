"""Expert adapters as stock PEFT files, and back.

Stock LoRA on a fused parameter of E experts (``target_parameters``) has factors for all of them: ``A (E * r, in)``, expert
by expert, and ``B (out, r * E)``, rank by rank. The chosen experts' factors go to their places and the others are zero:
the same function, loadable without this package, E / n times the size. A router is an entry of its own rank: low-rank
factors as they are, a whole delta D as ``I D`` (or ``D I``), which is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ...errors import UserError
from ...folder.atomic import staged
from ...folder.read import AdapterFolder
from ..delta import Deltas
from ..peft_type import PREFIX
from ..stock import COMPACT, write_stock
from .blocks import MoeBlock, is_llama4, moe_blocks
from .config import ExpertLoraConfig
from .layer import PROJECTIONS, ExpertsLayer, RouterLayer, TunerLayer


def export_stock(peft_model: nn.Module, out_dir: str | Path, adapter_name: str = "default") -> Path:
    """Write `adapter_name` as a stock PEFT folder, atomically, with the compact form in its subfolder ``expert_lora/``.

    The folder loads by ``PeftModel.from_pretrained`` and ``model.load_adapter`` where this package is not installed. It
    names no base model, and holds the adapter at scale 1 wherever its scale stands. Never replaces a folder that is not empty.

    Raises:
        UserError: the model has no such expert adapter, or something stands at `out_dir`.
    """
    _config(peft_model, adapter_name)
    with staged(out_dir, lambda _: "is not empty") as stage:
        save_into(stage, peft_model, adapter_name)
    return Path(out_dir)


def save_into(
    stage: Path, model: nn.Module, adapter_name: str, base_name: str = "", revision: str | None = None
) -> None:
    """Write both forms of an expert adapter into an existing folder: stock on top, compact in ``expert_lora/``.

    base_name, revision: what both configurations call the base; a Hub id or nothing, never a path.
    """
    config = _config(model, adapter_name)
    stock = stock_config(model, adapter_name)
    write_stock(stage, stock, stock_tensors(model, adapter_name), base_name, revision)
    compact = {f"base_model.model.{path}.{f}": _plain(t) for path, f, t in _values(model, adapter_name)}
    (stage / COMPACT).mkdir()
    write_stock(stage / COMPACT, config, compact, base_name, revision)  # as ``save_pretrained`` names them


def stock_tensors(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The stock form's tensors by their names on disk."""
    _config(model, adapter_name)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in _layers(model, adapter_name):
        if isinstance(layer, ExpertsLayer):
            # PEFT wraps once per parameter, the one that the module holds first inmost.
            held = [n for n, _ in layer.get_base_layer().named_parameters(recurse=False)]
            for depth, projection in enumerate(sorted(PROJECTIONS, key=lambda p: -held.index(f"{p}_proj"))):
                pairs[path + ".base_layer" * depth] = _widened(layer, adapter_name, projection)
        elif isinstance(layer, RouterLayer):
            pairs[path] = _router_factors(layer, adapter_name)
    return {
        f"base_model.model.{at}.lora_{f}.weight": t for at, p in pairs.items() for f, t in zip("AB", p, strict=True)
    }


def stock_config(model: nn.Module, adapter_name: str = "default") -> LoraConfig:
    """The ``LoraConfig`` that goes with `stock_tensors`; every target is a full path."""
    config = _config(model, adapter_name)
    targets: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, Any] = {}
    for path, layer in _layers(model, adapter_name):
        if isinstance(layer, ExpertsLayer):
            targets += [f"{path}.{p}_proj" for p in PROJECTIONS]
        elif isinstance(layer, RouterLayer):
            name = f"{path}.weight"
            targets.append(name)
            rank = _router_factors(layer, adapter_name)[0].shape[0]
            ranks[name] = rank
            alphas[name] = rank if config.train_router == "full" else config.lora_alpha
    return LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        target_modules=[], target_parameters=targets, rank_pattern=ranks, alpha_pattern=alphas, task_type=config.task_type,
    )  # fmt: skip


def read_stock(folder: AdapterFolder, base: nn.Module) -> tuple[ExpertLoraConfig, dict[tuple[str, str], Tensor]]:
    """The compact form of a stock adapter on `base` (which may carry adapters): its config, and its values for `fill`.

    Experts whose delta is zero are left out (all are kept in a layer where every delta is zero and A is not).

    Raises:
        UserError: the folder holds anything that an expert adapter cannot be, or does not fit `base`.
    """
    stock = folder.config
    if stock.get("peft_type") != "LORA" or not stock.get("target_parameters") or stock.get("target_modules"):
        raise UserError(f"{folder.path}: is no LORA adapter on fused parameters alone (target_parameters).")
    found = _Stock(Deltas(folder))
    inner: Any = getattr(base, "get_base_model", lambda: base)()
    try:
        blocks = moe_blocks(inner)
        experts = {b.layer: found.experts(inner, b) for b in blocks.values()}
        routers = {b.layer: found.router(b) for b in blocks.values() if b.router}
        return found.compact(blocks, experts, routers)
    except ValueError as e:
        raise UserError(f"{folder.path}: {e}") from None


def fill(model: nn.Module, adapter_name: str, values: dict[tuple[str, str], Tensor]) -> None:
    """Copy the values of `read_stock` into the adapter that was made with its config."""
    with torch.no_grad():
        for path, factor, tensor in _values(model, adapter_name):
            tensor.copy_(values[path, factor.removeprefix(PREFIX)])


# --- writing -----------------------------------------------------------------------------------------------------------


def _config(model: Any, adapter_name: str) -> ExpertLoraConfig:
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        raise UserError(f"The model holds no adapter {adapter_name!r} (it holds: {', '.join(configs) or 'none'}).")
    if not isinstance(configs[adapter_name], ExpertLoraConfig):
        kind = getattr(configs[adapter_name].peft_type, "value", "?")
        raise UserError(f"The adapter {adapter_name!r} is of type {kind}; only expert adapters need an export.")
    return configs[adapter_name]


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """(module path in the base, layer) of every layer that holds the adapter."""
    for name, module in model.named_modules():
        if isinstance(module, TunerLayer) and adapter_name in module.scaling:
            yield name.removeprefix("base_model.model."), module


def _values(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, Tensor]]:
    """(module path, name of the factor, its tensor) of everything that the adapter trains."""
    for path, layer in _layers(model, adapter_name):
        for factor in layer.adapter_layer_names:
            if adapter_name in getattr(layer, factor):
                yield path, factor, getattr(layer, factor)[adapter_name]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _factors(layer: Any, adapter_name: str, what: str) -> tuple[Tensor, Tensor]:
    return tuple(_plain(getattr(layer, f"{PREFIX}{what}_{f}")[adapter_name]) for f in "AB")  # type: ignore[return-value]


def _widened(layer: ExpertsLayer, adapter_name: str, projection: str) -> tuple[Tensor, Tensor]:
    """Factors of all experts as stock LoRA has them, zero for those not chosen."""
    a, b = _factors(layer, adapter_name, projection)  # (n, r, in), (n, out, r)
    if is_llama4(layer):  # these are (in, out) in memory and do not say so: PEFT takes them for (out, in)
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    ids = layer.experts[adapter_name]
    wide_a = a.new_zeros(layer.num_experts, *a.shape[1:])
    wide_b = b.new_zeros(*b.shape[1:], layer.num_experts)
    wide_a[ids] = a
    wide_b[:, :, ids] = b.permute(1, 2, 0)
    return wide_a.flatten(0, 1), wide_b.flatten(1, 2)


def _router_factors(layer: RouterLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    deltas = getattr(layer, f"{PREFIX}router_delta")
    if adapter_name not in deltas:
        return _factors(layer, adapter_name, "router")
    delta = _plain(deltas[adapter_name])
    experts, hidden = delta.shape
    if experts <= hidden:
        return delta, torch.eye(experts, dtype=delta.dtype)
    return torch.eye(hidden, dtype=delta.dtype), delta


# --- reading -----------------------------------------------------------------------------------------------------------

Factors = tuple[Tensor, Tensor, float]  # A, B, scaling


class _Stock:
    """A stock adapter being taken apart; every delta must end up somewhere."""

    def __init__(self, deltas: Deltas) -> None:
        self.deltas, self.folder, self.config = deltas, deltas.folder.path, deltas.folder.config
        self.left = set(deltas)

    def _take(self, parameter: str) -> Factors | None:
        if parameter in self.left:
            self.left.remove(parameter)
            return self.deltas.factors(parameter)
        if any(parameter == t or parameter.endswith(f".{t}") for t in self.config["target_parameters"]):
            raise UserError(f"{self.folder}: {parameter} is a target, and its factors are not in the file.")
        return None

    def experts(self, base: nn.Module, block: MoeBlock) -> dict[str, Factors]:
        """projection -> A (E, r, in), B (E, out, r), scaling, of what the adapter targets in this block."""
        swapped, n = is_llama4(base.get_submodule(block.experts)), block.num_experts
        out = {}
        for p in PROJECTIONS:
            if (found := self._take(f"{block.experts}.{p}_proj")) is None:
                continue
            a, b, scaling = found
            if self.deltas.adapted[f"{block.experts}.{p}_proj"].experts != n:
                raise UserError(
                    f"{self.folder}: {block.experts}.{p}_proj has factors of {tuple(a.shape)} and {tuple(b.shape)}, which "
                    f"do not fit the {n} experts of this base."
                )
            a, b = a.unflatten(0, (n, -1)), b.unflatten(1, (-1, n)).permute(2, 0, 1)
            out[p] = (b.transpose(1, 2), a.transpose(1, 2), scaling) if swapped else (a, b, scaling)
        return out

    def router(self, block: MoeBlock) -> Factors | None:
        return self._take(f"{block.router}.weight")

    def compact(
        self, blocks: dict[int, MoeBlock], experts: dict[int, dict[str, Factors]], routers: dict[int, Factors | None]
    ) -> tuple[ExpertLoraConfig, dict[tuple[str, str], Tensor]]:
        """The config, and the values by (module path, factor)."""
        if self.left:
            odd = min(self.left)
            raise UserError(f"{self.folder}: {odd} is neither on experts nor on a router of this base.")
        chosen = {layer: _chosen(parts) for layer, parts in experts.items() if parts}
        trained = {layer: f for layer, f in routers.items() if f is not None}
        if trained and not set(chosen) <= set(trained):
            raise UserError(f"{self.folder}: routers are trained in some of its layers only; that cannot be imported.")
        shapes = {(a.shape[1], round(s, 12)) for parts in experts.values() for a, _, s in parts.values()}
        if len(shapes) > 1:
            raise UserError(f"{self.folder}: experts have different ranks or scalings; that cannot be imported.")
        r, scaling = next(iter(shapes), (self.config["r"], self.config["lora_alpha"] / self.config["r"]))
        values: dict[tuple[str, str], Tensor] = {}
        for layer, ids in chosen.items():
            block, parts = blocks[layer], experts[layer]
            some = next(iter(parts.values()))[0]
            for p in PROJECTIONS:
                if p not in parts:  # the other projection alone was adapted: zero factors, of a shape that broadcasts
                    values[block.experts, f"{p}_A"] = values[block.experts, f"{p}_B"] = some.new_zeros(())
                else:
                    values[block.experts, f"{p}_A"], values[block.experts, f"{p}_B"] = (f[ids] for f in parts[p][:2])
        mode: dict[str, Any] = {"train_router": "none"}
        if trained:
            mode = self._routers(blocks, trained, r * scaling, values)
        layers = {**{layer: [] for layer in trained}, **chosen}
        task = self.config.get("task_type")
        return ExpertLoraConfig(experts=layers, r=r, lora_alpha=r * scaling, task_type=task, **mode), values  # type: ignore[arg-type]

    def _routers(
        self, blocks: dict[int, MoeBlock], trained: dict[int, Factors], alpha: float, values: dict[Any, Tensor]
    ) -> dict[str, Any]:
        rank = next(iter(trained.values()))[0].shape[0]
        low = all(
            a.shape[0] == rank and math.isclose(scaling * rank, alpha) and not _is_identity(a) and not _is_identity(b)
            for a, b, scaling in trained.values()
        )
        for layer, (a, b, scaling) in trained.items():
            at = str(blocks[layer].router)
            if low:
                values[at, "router_A"], values[at, "router_B"] = a, b
            else:
                values[at, "router_delta"] = b @ a * scaling
        return {"train_router": "lora", "router_r": rank} if low else {"train_router": "full"}


def _chosen(parts: dict[str, Factors]) -> list[int]:
    """Experts whose delta is not zero; where there is none, those whose A is not."""
    tests = [
        [(a.flatten(1) != 0).any(1) & (b.flatten(1) != 0).any(1) for a, b, _ in parts.values()],
        [(a.flatten(1) != 0).any(1) for a, _, _ in parts.values()],
    ]
    for hits in tests:
        ids = torch.stack(hits).any(0).nonzero().flatten().tolist()
        if ids:
            return ids
    return []


def _is_identity(x: Tensor) -> bool:
    return x.shape[0] == x.shape[1] and bool((x == torch.eye(x.shape[0], dtype=x.dtype)).all())
