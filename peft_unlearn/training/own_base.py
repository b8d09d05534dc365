"""Whether the base under a trained adapter is the one in the files that are named, and what adapter and files do together.

The files are loaded once more, in float32 (around the tensors in memory, where those are the files' own): what is compared, and what the
probes hold, is what everybody else will get, not what training computed in its own dtype.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..folder.base import load_around, load_base
from ..folder.digest import digest_live, name_in_base, plain_tensors
from ..folder.manifest import Probes, probe_logits, probes
from ..folder.quantized import identity, options_of
from ..forward import Reference
from ..gradients.vector import is_sharded, whole
from ..stack.attach import activate, add
from ..stack.identity import config_difference
from ..tuners.names import scalings

_LIBRARIES = (
    "bitsandbytes",
    "torchao",
    "gptqmodel",
    "auto_gptq",
    "awq",
    "hqq",
    "quanto",
    "optimum",
    "eetq",
    "aqlm",
    "compressed_tensors",
)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)


def quantized_module(model: nn.Module) -> str | None:
    """The first module of the base whose weights are no plain floating-point numbers, whether or not a configuration says so."""
    for name, module in model.named_modules():
        tensors = [p for p in module._parameters.values() if p is not None]
        kept = {
            k: b for k, b in module._buffers.items() if b is not None and k not in module._non_persistent_buffers_set
        }
        packed = [b for k, b in kept.items() if b.dtype in _INTEGERS and b.dim() > 1 and "mask" not in k]
        odd = any(_not_plain(p) for p in tensors) or (packed and not hasattr(module, "weight"))
        if odd or type(module).__module__.partition(".")[0] in _LIBRARIES:
            return f"{name_in_base(name)} ({type(module).__name__})"
    return None


def _not_plain(p: Tensor) -> bool:
    inner = type(p.data)
    own = any(not t.__module__.startswith("torch.") and t.__module__ != "torch" for t in (type(p), inner))
    return own or not p.is_floating_point() or p.element_size() < 2


def probes_of_files(live: Any, tokenizer: Any, prompts: tuple[str, ...], base_dir: Path, fits: list[str]) -> Probes:
    """The probes of the files in `base_dir` with the active adapters of `live` on them, in float32.

    Raises:
        UserError: with its adapters off, `live` is not the model in these files.
    """
    fresh = _of_files(live, base_dir, fits)
    if not options_of(live):  # else `held_in_memory` compares
        _same(live, fresh, tokenizer, prompts, base_dir)
    return _probed(fresh, live, tokenizer, prompts)


def held_in_memory(
    live: Any, tokenizer: Any, prompts: tuple[str, ...], base_dir: Path, fits: list[str], digest: str
) -> dict[str, Any] | None:
    """What a manifest's ``method.quantized`` says of a base in fewer bits, `digest` being that of its files; None for other bases.

    Raises:
        UserError: with its adapters off, `live` is not what loading these files in the same way gives.
    """
    if not (options := options_of(live)):
        return None
    dtype = next(p for p in live.get_base_model().parameters() if p.is_floating_point()).dtype
    fresh = load_base(base_dir, dtype, fits, options)
    _same(live, fresh, tokenizer, prompts, base_dir)
    name = str(dtype).removeprefix("torch.")
    found = _probed(fresh, live, tokenizer, prompts)
    return {"options": options, "dtype": name, "digest": identity(digest, options, name), "probes": asdict(found)}


def plain_copy(live: Any, base_dir: Path, fits: list[str]) -> Any:
    """The base in these files with copies of the active adapters of `live` on it, for a model that lies in parts on several ranks."""
    return _with_adapters(load_base(base_dir, fits=fits), live)


def _of_files(live: Any, base_dir: Path, fits: list[str]) -> Any:
    """The model in these files, in float32; made of the tensors in memory where those are the files' own: no second copy."""
    tensors = {} if options_of(live) else plain_tensors(live)
    plain = all(t.dtype == torch.float32 or not t.is_floating_point() for t in tensors.values())
    if plain and tensors and all(t.device.type == "cpu" and not is_sharded(t) for t in tensors.values()):
        fresh = load_around(base_dir, tensors, fits) if digest_live(live, base_dir).verdict == "same" else None
        if fresh is not None and all(
            n in tensors and t.data_ptr() == tensors[n].data_ptr() for n, t in plain_tensors(fresh).items()
        ):
            return fresh
    return load_base(base_dir, fits=fits)


def _same(live: Any, fresh: Any, tokenizer: Any, prompts: tuple[str, ...], base_dir: Path) -> None:
    """Raise a `UserError` unless `live` is `fresh`, loaded from `base_dir`, under its adapters."""
    _compare(live, fresh, base_dir)
    with Reference("base").on(live):  # puts the trainable flags back
        # a sharded base has to be called through the module that gathers its parameters
        called = live if any(map(is_sharded, live.parameters())) else live.get_base_model()
        now = probe_logits(called, tokenizer, prompts)
    _compare_logits(live, now, probe_logits(fresh, tokenizer, prompts), base_dir)


def _probed(fresh: Any, live: Any, tokenizer: Any, prompts: tuple[str, ...]) -> Probes:
    with torch.random.fork_rng(devices=[]):
        model = _with_adapters(fresh, live)
    return probes(model, tokenizer, prompts)


def _compare(live: Any, fresh: nn.Module, base_dir: Path) -> None:
    if not options_of(live) and (odd := quantized_module(live.get_base_model())):
        raise _other(base_dir, f"its module {odd} is quantized")
    if odd := config_difference(fresh.config, live.get_base_model().config):
        raise _other(base_dir, f"it was loaded with other settings: {'; '.join(odd[:4])}")
    mine, theirs = plain_tensors(live), plain_tensors(fresh)
    if odd := sorted(mine.keys() ^ theirs.keys()):
        raise _other(base_dir, f"{len(odd)} tensors are in one of the two only, first {odd[0]}")
    if odd := sorted(n for n, t in theirs.items() if not _as_loaded(mine[n], t)):
        raise _other(base_dir, f"{len(odd)} of its {len(theirs)} tensors have other values, first {odd[0]}")


def _as_loaded(mine: Tensor, theirs: Tensor) -> bool:
    """Whether loading the file in the dtype of the tensor in memory gives that very tensor."""
    tensor = whole(mine.detach()).cpu()
    return tensor.shape == theirs.shape and torch.equal(tensor, theirs.detach().to(tensor.dtype))


def _compare_logits(live: Any, now: Tensor, files: Tensor, base_dir: Path) -> None:
    """Tensors and settings are right; what is left are hooks, replaced modules, rounded buffers."""
    short = any(p.dtype in (torch.bfloat16, torch.float16) for p in live.parameters())
    rough = short or (now.is_floating_point() and next(live.parameters()).device.type != "cpu")  # TF32 and its kin
    allowed = 1e-4 + (0.1 if rough else 1e-3) * float(files.abs().max())
    gap = float((now - files).abs().max())
    if not gap <= allowed:
        raise _other(
            base_dir,
            f"on neutral prompts its logits differ by up to {gap:.2g}, with equal tensors (a hook, a replaced module?)",
        )


def _with_adapters(base: nn.Module, live: Any) -> Any:
    """`base` with copies of the adapters that are active on `live`, at their scales."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model: Any = base
    names = list(live.active_adapters)
    for name in names:
        config = copy.deepcopy(live.peft_config[name])
        config.inference_mode = True
        if model is base:
            model = get_peft_model(base, config, adapter_name=name)  # type: ignore[arg-type]
        else:
            add(model, name, config)
        state = get_peft_model_state_dict(live, adapter_name=name, save_embedding_layers=False)
        set_peft_model_state_dict(model, {k: whole(t.detach()).cpu() for k, t in state.items()}, adapter_name=name)
    factors = dict(scalings(live))
    for at, scaling in scalings(model):
        scaling.update({n: factors[at][n] for n in scaling.keys() & factors[at].keys()})
    activate(model, names)
    return model.eval()


def _other(base_dir: Path, why: str) -> UserError:
    return UserError(
        f"the model that was trained is not the one in {base_dir}: with its adapters off, {why}. Nothing was written. Save with the "
        "base that the model was loaded from, unchanged; an adapter that was trained on anything else would do something else there"
    )
