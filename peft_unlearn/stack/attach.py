"""Adapters onto a loaded base, of several PEFT types at once, and off it again.

One `PeftModel`, of the first adapter's type. PEFT itself refuses a second type there, but only in `add_adapter`: its
layers know adapters by name and pass over names that they do not hold, and switching on and off reaches every tuner layer
whatever its type. So adapters of other types are injected into the same base, and share its dict of configs and its list
of active names. Two types on one and the same module are refused: neither would be a sum any more.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..folder.digest import adapter_modules
from ..folder.read import CONFIG, WEIGHTS, AdapterFolder
from ..tuners.delta import is_sparse
from ..tuners.names import belongs, scalings
from ..tuners.peft_type import FORGET_VECTOR, PEFT_TYPE, SPARSE_TYPE
from ..tuners.registration import register

_SUMS = ("LORA", PEFT_TYPE, SPARSE_TYPE, FORGET_VECTOR)


def attach(base: Any, folders: Mapping[str, AdapterFolder]) -> Any:
    """`base` as a PeftModel with all of `folders` active, frozen, in evaluation mode. Ignores scales.

    An expert or sparse adapter goes on in its compact form where its folder has one; that it says the same as the stock form
    beside it, which is what the adapter's id stands for, is checked bit for bit. One without is brought into that form where
    it has one: PEFT's own layer for fused parameters demands the same parameters of all adapters, and those of SHiRA and
    SUPERTUNING pass by the base layers' hooks and gradients.
    """
    model = base
    for name, folder in folders.items():
        compact = folder.compact
        where = compact or folder.path
        try:
            converted = None if where is compact and not is_sparse(folder) else _converted(model, name, folder)
            model = converted or load_by_peft(model, name, where)
        except (UserError, MemoryError):
            raise
        except Exception as e:  # of any class: what a configuration asks for fails wherever PEFT first meets it
            raise UserError(f"{folder.path}: PEFT cannot put this adapter on the base: {_brief(e)}.") from None
        if where is compact:
            _check_compact(model, name, folder)
        _refuse_nested(model, folder.path)
    activate(model, list(folders))
    return model.eval()


def load_by_peft(model: Any, name: str, where: Path) -> Any:
    """`model` with the adapter in folder `where` on it, by PEFT's own means. Raises `ValueError` unless all of it arrived."""
    with warnings.catch_warnings():
        # PEFT looks for these keys among modules alone, and then does apply them to fused parameters
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        model = _load(model, name, where)
    _check_loaded(model, name, where)
    return model


def _load(model: Any, name: str, where: Path) -> Any:
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    register()
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, str(where), adapter_name=name)
    config = PeftConfig.from_pretrained(str(where))
    if config.peft_type == model.peft_type:
        model.load_adapter(str(where), adapter_name=name)
        return model
    config.inference_mode = True
    add(model, name, config)
    device = str(next(model.parameters()).device)
    set_peft_model_state_dict(model, load_peft_weights(str(where), device=device), adapter_name=name)
    return model


def _converted(model: Any, name: str, folder: AdapterFolder) -> Any:
    """The model with a stock adapter on experts, or a sparse one, in the compact form; None where it has to be loaded as it is."""
    from peft import PeftModel, get_peft_model

    fill: Any
    config: Any
    try:
        if folder.config.get("target_parameters"):
            from ..tuners.expert_lora.export import fill, read_stock

            config, values = read_stock(folder, model)
        elif is_sparse(folder):
            from ..tuners.sparse.delta import read_sparse
            from ..tuners.sparse.export import fill

            config, values = read_sparse(folder, model)
        else:
            return None
    except UserError:
        if folder.compact is not None or folder.config["peft_type"] == SPARSE_TYPE:
            raise
        return None
    config.inference_mode = True
    if isinstance(model, PeftModel):
        add(model, name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    fill(model, name, values)
    return model


def add(model: Any, name: str, config: Any) -> None:
    """PEFT's ``model.add_adapter`` for any type of adapter: `name` is there afterwards, untrained and not active.

    Raises:
        ValueError: PEFT refuses the config on this model.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype

    if config.peft_type == model.peft_type:
        model.add_adapter(name, config)
        return
    if any(getattr(c, "is_prompt_learning", False) for c in (config, *model.peft_config.values())):
        raise ValueError("soft prompts cannot stand beside other adapters")
    tuner = model.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # that is the point
        inject_adapter_in_model(config, tuner.model, name)
    cast_adapter_dtype(tuner.model, name)
    tuner.peft_config[name] = config
    tuner.tuner_layer_cls = BaseTunerLayer  # its set_adapter has to reach the layers of every type


def activate(model: Any, names: Sequence[str]) -> None:
    """Make exactly `names` take part in the forward, in this order, all frozen."""
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        model.set_adapter(names[0])
    else:
        model.base_model.set_adapter(list(names), inference_mode=True)
    freeze(model)


def freeze(model: Any) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def _check_loaded(model: Any, name: str, where: Path) -> None:
    """Raise `ValueError` unless every tensor of the folder is in the model, and every one the model has was in the folder:
    PEFT only warns of tensors that found no place, and part of an adapter would then be missing in silence."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    config = json.loads((where / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") not in _SUMS:
        return
    file = load_file(str(where / WEIGHTS))
    live = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if odd := sorted(set(file) - set(live)):
        raise ValueError(f"{len(odd)} of its tensors have no place there, first {odd[0]}")
    if odd := sorted(set(live) - set(file)):
        raise ValueError(f"{len(odd)} tensors that its configuration asks for are not in its file, first {odd[0]}")
    for key, tensor in file.items():
        if not torch.equal(live[key].detach().cpu(), tensor.to(live[key].dtype)):
            raise ValueError(f"its tensor {key} did not arrive as it is in the file")


def check_reloads(where: Path, base: Any) -> None:
    """Raise a `UserError` unless plain PEFT puts the LoRA in folder `where` onto `base` tensor for tensor.

    It renames keys for families whose checkpoints are named otherwise, and for some of them wrongly. `base` is a model on the
    meta device, which is enough to tell: nothing but the adapter takes memory.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    name = "default"
    if (
        json.loads((where / CONFIG).read_text(encoding="utf-8"))["peft_type"] != "LORA"
    ):  # PEFT renames nothing of other types
        return
    config = PeftConfig.from_pretrained(str(where))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what did not arrive, which is told below
            model: Any = get_peft_model(base, config, name, low_cpu_mem_usage=True)
            for key, p in list(model.named_parameters()):
                if belongs(key, name):  # in memory, and no number until the file's arrives
                    owner, _, last = key.rpartition(".")
                    there = torch.full(p.shape, torch.nan, dtype=p.dtype)
                    model.get_submodule(owner)._parameters[last] = torch.nn.Parameter(there, requires_grad=False)
            set_peft_model_state_dict(model, load_peft_weights(str(where), device="cpu"), name)
        _check_loaded(model, name, where)
    except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError) as e:
        raise UserError(
            f"nothing was written: plain PEFT would not load this adapter as it was trained ({_brief(e)}). It renames the tensors "
            f"of {getattr(base.config, 'model_type', 'this family')} while loading. Adapt other modules, e.g. attention alone"
        ) from None


def _check_compact(model: Any, name: str, folder: AdapterFolder) -> None:
    from safetensors.torch import load_file

    if str(model.peft_config[name].peft_type.value) == SPARSE_TYPE:
        from ..tuners.sparse.export import stock_parts
    else:
        from ..tuners.expert_lora.export import stock_tensors

        def stock_parts(model: Any, adapter: str) -> dict[str, dict[str, torch.Tensor]]:
            return {"": stock_tensors(model, adapter)}

    assert folder.compact is not None
    for sub, mine in stock_parts(model, name).items():
        place = folder.path / sub / WEIGHTS
        stock = load_file(str(place)) if place.is_file() else {}
        if set(stock) != set(mine) or any(not torch.equal(stock[k], mine[k].to(stock[k].dtype)) for k in stock):
            own = folder.compact.name
            raise UserError(
                f"{folder.path}: {own}/ and {place.relative_to(folder.path)} hold two different adapters; one of them was replaced "
                f"after training. Delete {own}/ to use the stock form, or get the folder anew."
            )


def _refuse_nested(model: Any, where: Path) -> None:
    layers = adapter_modules(model)
    for at, layer in layers.items():
        inner = layers.get(f"{at}.base_layer")
        if inner is not None and type(inner) is not type(layer) and not _adds_around(layer, inner):
            raise UserError(
                f"{where}: adapts {at.removeprefix('base_model.model.')}, which carries an adapter of another kind already "
                f"({type(inner).__name__} under {type(layer).__name__}); these cannot be active together."
            )


def _adds_around(layer: Any, inner: Any) -> bool:
    """Whether a LoRA stands around a sparse adapter: each adds to the weight, in whatever order."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    from ..tuners.sparse.layer import SparseLayer

    if not isinstance(inner, SparseLayer) or not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        return False
    return not getattr(layer, "lora_variant", None)  # DoRA and its kin compute with the weight itself


def detach(model: Any, name: str) -> list[str]:
    """Take one adapter of several off for good; layers left without any are taken out. Returns what is still there of it."""
    tuner = model.base_model
    active = [a for a in tuner.active_adapters if a != name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each layer would announce its own choice of a successor
        for layer in adapter_modules(model).values():
            if hasattr(layer, "adapter_layer_names"):
                layer.delete_adapter(name)
            else:
                layer.delete_adapter(name, new_active_adapters=active)
    model.peft_config.pop(name, None)
    if getattr(model, "active_adapter", None) == name:
        model.active_adapter = active[0] if active else next(iter(model.peft_config))
    for at, layer in sorted(adapter_modules(model).items(), key=lambda kv: -len(kv[0])):  # inner ones first
        holds = getattr(layer, "_get_available_adapters", None)
        if holds is not None and not holds():
            model.set_submodule(at, layer.base_layer)
    activate(model, active)
    left = {n for n, _ in model.named_parameters() if belongs(n, name)}
    return sorted(left | {n for n, scaling in scalings(model) if name in scaling})


_SIZE = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]*)\]\) from checkpoint, "
    r"the shape in current model is torch\.Size\(\[([\d, ]*)\]\)"
)


def _brief(e: Exception) -> str:
    text = str(e)
    if found := _SIZE.findall(text):
        name, mine, theirs = found[0]
        more = f" ({len(found)} tensors in all)" if len(found) > 1 else ""
        return (
            f"its tensor {name.removeprefix('base_model.model.')} has shape [{mine}], and this base with the rank of its "
            f"configuration needs [{theirs}]{more}"
        )
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") if lines else type(e).__name__
