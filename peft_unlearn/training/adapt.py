"""`get_forget_model`: a base model with exactly the adapter that was asked for; what is adapted is listed and asserted."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import Errors, UserError, nearest
from ..folder.card import add_tags
from ..folder.digest import plain_tensors, targeted_names
from ..folder.quantized import KEY, name_of, options_of
from ..head import reads_images
from ..stack.attach import add
from ..tuners.delta import changes_base
from ..tuners.linear import ALL_LINEAR, calls, linear_modules
from ..tuners.names import belongs
from ..tuners.registration import register
from .own_base import quantized_module

_SOFT = "its soft prompts come from a network that is trained with them and not saved; prompt_tuning is the soft prompt that can be trained"
# Types whose delta can be trained, saved, switched off and loaded by stock PEFT; the others are refused with the reason.
_NO = {
    "PREFIX_TUNING": "it works through the key/value cache, which training passes do not use",
    "P_TUNING": _SOFT,
    "MULTITASK_PROMPT_TUNING": _SOFT,
    "ADAPTION_PROMPT": "it rewrites attention modules and cannot be switched off for the reference model",
    "CPT": _SOFT,
    "XLORA": "it mixes trained adapters by a gate over hidden states of a first pass",
    "POLY": "it needs task ids in every batch",
    "CARTRIDGE": "it works through the key/value cache, which training passes do not use",
    "SHADOW": "it changes what passes between the blocks, which losses and hooks on the model read",
    "ADALORA": "its ranks are pruned by calls from a training loop of its own; without them it is an odd LoRA",
}
INPUT_VECTOR = "input-vector"  # stands in for the input embeddings, whose name the base says
_LORA_KEYS = [
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "lora_dropout", "init_lora_weights", "target_parameters", "bias",
]  # fmt: skip


def peft_config(spec: Mapping[str, Any] | None) -> Any:
    """PEFT config of a recipe's ``adapter`` part (default: LoRA, r 16, alpha 32, all linear layers).

    Raises:
        UserError: unknown type or key, or a type that cannot be used here.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    if spec is not None and not isinstance(spec, Mapping):
        raise UserError(f"adapter: settings are a mapping, e.g. {{type: lora, r: 16}}, not {spec!r}")
    spec = {"type": "lora", **(spec or {})}
    kind = str(spec.pop("type")).upper()
    if kind in ("EXPERT_LORA", "SPARSE", "FORGET_VECTOR"):
        kind = str(register(f"PEFT_UNLEARN_{kind}").value)
    if vector := kind == "INPUT_VECTOR":  # a stock LoRA that `get_forget_model` gives its form
        kind = "LORA"
        if spec:
            raise UserError(
                f"adapter: input_vector is one vector added to every input embedding; it has no {', '.join(map(str, spec))}"
            )
    names = {t.name for t in PeftType}
    if kind not in names:
        raise UserError(
            f"adapter.type {kind.lower()!r} is no PEFT type.{nearest(kind.lower(), [n.lower() for n in names])}"
        )
    if kind in _NO:
        raise UserError(f"adapter.type {kind.lower()} is refused: {_NO[kind]}")
    if vector:
        spec |= {"r": 1, "lora_alpha": 1, "target_modules": [INPUT_VECTOR]}
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    fields = getattr(cls, "__dataclass_fields__", {})
    errors = Errors()
    for key in spec:
        if key not in fields:
            known = _LORA_KEYS if kind == "LORA" else set(fields)
            errors.add(f"adapter: {kind.lower()} has no {key!r}.{nearest(str(key), known)}")
    if kind == "PROMPT_TUNING" and spec.get("num_virtual_tokens") is None:
        errors.add("adapter: prompt_tuning needs num_virtual_tokens, the length of its soft prompt, e.g. 16")
    errors.raise_if_any("recipe")
    if kind == "LORA":
        spec = {"r": 16, "lora_alpha": 32, "target_modules": ALL_LINEAR, **spec}
        if spec.get("layers_to_transform") is not None and spec["target_modules"] == ALL_LINEAR:
            spec["target_modules"] = [
                ALL_LINEAR
            ]  # PEFT takes layers with a list of names only; the base gives the names
    try:
        config = cls(task_type="CAUSAL_LM", **spec)
    except (TypeError, ValueError, ImportError) as e:
        raise UserError(f"adapter: {e}") from e
    _refuse(config)
    return config


def _refuse(config: Any) -> None:
    """Raise a `UserError` for a PEFT config that cannot be trained truthfully here."""
    kind = getattr(config.peft_type, "name", str(config.peft_type))
    if kind in _NO:
        raise UserError(f"adapter.type {kind.lower()} is refused: {_NO[kind]}")
    if getattr(config, "is_prompt_learning", False) and kind != "PROMPT_TUNING":
        raise UserError(f"adapter.type {kind.lower()} is refused: {_SOFT}")
    bias = getattr(config, "bias", "none")
    if bias not in ("none", False, None):
        raise UserError(
            f"adapter: bias {bias!r} is refused: it trains the base's own biases, which stay changed when the adapter is off"
        )
    if changes := changes_base(vars(config)):
        raise UserError(
            f"adapter: {changes} is refused: it rewrites the base's own weights, so that with the adapter off the model is no longer "
            "the base: the reference would be wrong, and removing the adapter would not give the base back. Start from the default"
        )


def get_forget_model(base: nn.Module, config: Any = None, *, adapter_name: str = "default", quiet: bool = True) -> Any:
    """`base` with a trainable adapter, ready for `UnlearnTrainer`.

    Args:
        config: a PEFT config, a recipe's ``adapter`` mapping, or None for LoRA on all linear layers.
        adapter_name: name of the adapter to be trained. A PeftModel given as `base` keeps its adapters active and frozen:
            the new one is trained on top of them.
        quiet: do not print what is adapted (to stderr).

    Raises:
        UserError: the config is refused, matches nothing, or PEFT adapted other modules than the config names.
    """
    from peft import PeftModel, get_peft_model

    if config is None or isinstance(config, Mapping):
        config = peft_config(config)
    _refuse(config)
    refuse_base(base)
    _refuse_on_quantized(base, config)
    if images := reads_images(base):
        config = replace(config, task_type=None)  # PEFT's wrapper of causal language models passes input_ids on
    called = None if images else check_causal(base)
    given = getattr(config, "target_modules", None)
    if vector := given == {INPUT_VECTOR}:
        config = replace(config, target_modules=[_input_embeddings(base)])
    if given == ALL_LINEAR or list(given or ()) == [ALL_LINEAR]:
        resolved = linear_modules(base, called)
        if images or given != ALL_LINEAR or not resolved.everything:
            config = replace(config, target_modules=resolved.names)
    # PEFT rewrites the config in place on mixture-of-experts bases: what was asked for has to be kept.
    wanted = getattr(config, "target_modules", None), bool(getattr(config, "target_parameters", None))
    fused = set(getattr(getattr(base, "base_model", None), "targeted_parameter_names", []))  # of adapters below
    check_targets(base, config)
    before = _checksums(base)
    if isinstance(base, PeftModel) and adapter_name in base.peft_config:
        raise UserError(f"the model already has an adapter {adapter_name!r}; train under another name")
    try:
        if isinstance(base, PeftModel):
            if config.is_prompt_learning:
                raise ValueError("soft prompts cannot stand on top of other adapters")
            model: Any = _on_top(base, adapter_name, config)
        else:
            model = get_peft_model(base, config, adapter_name=adapter_name)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as e:
        raise UserError(f"adapter: PEFT refuses this configuration: {e}") from e
    if vector:
        _one_vector(model, adapter_name)
    if not config.is_prompt_learning:
        _assert_adapted(model, adapter_name, fused, *wanted)
    if changed := sorted(n for n, value in _checksums(model).items() if before.get(n, value) != value):
        raise UserError(
            f"adapter: putting this adapter on changed {len(changed)} of the base's own tensors, first {changed[0]}: with the adapter "
            "off the model is no longer the base. Use a configuration that leaves the base as it is"
        )
    add_tags(model)
    if not quiet:
        print(describe(model, adapter_name), file=sys.stderr)
    return model


def _refuse_on_quantized(base: Any, config: Any) -> None:
    held = options_of(base)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if held and kind != "LORA":
        raise UserError(
            f"adapter.type {kind.removeprefix('PEFT_UNLEARN_').lower()} is refused on a base in {name_of(held)}: it reads or replaces "
            "weights that are no plain numbers there; only lora adds to a layer's output alone. Train it on the base in floating point"
        )


def _input_embeddings(base: Any) -> str:
    found = base.get_input_embeddings()
    return next(n for n, m in base.named_modules() if m is found)


@torch.no_grad()
def _one_vector(model: Any, name: str) -> None:
    """A LoRA of rank 1 on the input embeddings as one vector added to every token: A is ones, and stays so; B starts at zero."""
    for n, p in model.named_parameters():
        if belongs(n, name):
            p.fill_(1.0 if "lora_embedding_A" in n else 0.0)
            p.requires_grad_("lora_embedding_B" in n)


def _on_top(model: Any, name: str, config: Any) -> Any:
    """`model` with the adapter `name` trainable on top of its active ones, which are frozen."""
    frozen = list(model.base_model.active_adapters)
    add(model, name, config)
    model.base_model.set_adapter([*frozen, name])
    for n, p in model.named_parameters():
        p.requires_grad_(belongs(n, name))
    return model


def refuse_base(model: Any) -> None:
    """Raise a `UserError` for bases that cannot be trained truthfully yet."""
    held = options_of(model)
    inner = getattr(model, "get_base_model", lambda: model)()
    if getattr(inner, "_hf_peft_config_loaded", False):
        raise UserError(
            "transformers itself has put an adapter on the base (an adapter_config.json lies in the folder that it was loaded from, or "
            "load_adapter was called): with the new adapter off the model would not be the base. Load it without that one"
        )
    if not held and (odd := quantized_module(inner)):
        raise UserError(
            f"the base is quantized, though its configuration does not say so: {odd}. Nobody could repeat it from the released files; "
            f"load them in floating point, or by {KEY}: {{load_in_4bit: true}}"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            "the base is an encoder-decoder; unlearning here is of causal language models, which predict the next token"
        )
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        raise UserError("the base is spread over several devices (device_map); load it on one: adapters fit beside it")
    if getattr(model, "_tp_size", None) or getattr(getattr(model, "config", None), "_is_expert_parallel", False):
        raise UserError(
            "tensor- and expert-parallel bases are not supported yet; load the base on one device per process"
        )


@torch.no_grad()
def check_causal(model: Any) -> set[str] | None:
    """Refuse a base whose earlier logits see later tokens (BERT and its kin): its log-probabilities mean nothing here.

    One forward over two rows of four tokens that differ in the last one. Returns the names of the modules that it called, of
    linear ones those that gave a linear map of their input (`computes`); None for a model without weights in memory.
    """
    weight = next(iter(model.parameters()), None)
    if weight is None or weight.is_meta:
        return None
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=weight.device)
    training = model.training
    try:
        with calls(model) as called:
            logits = model.eval()(input_ids=ids, use_cache=False).logits[:, :3].float()
    finally:
        model.train(training)
    gap, size = float((logits[0] - logits[1]).abs().max()), float(logits.abs().max())
    if gap > (1e-2 if weight.dtype != torch.float32 else 1e-4) * max(size, 1e-6):
        raise UserError(
            f"the base ({type(model).__name__}) is not causal: changing the last token moves the logits before it (by {gap:.2g}); "
            "unlearning here is of causal language models, which predict the next token"
        )
    return called


def check_targets(base: Any, config: Any) -> None:
    """Refuse targets, exclusions, layers and patterns that match nothing in the base: PEFT leaves them without effect.

    Raises:
        UserError: all of them, each with the nearest name that there is.
    """
    names = [n for n, _ in base.named_modules() if n]
    leaves_ = sorted({n.rpartition(".")[2] for n in names} - {str(k) for k in range(1000)})
    errors = Errors()

    def named(pattern: str) -> bool:
        return any(n == pattern or n.endswith(f".{pattern}") for n in names)

    for key in ("target_modules", "exclude_modules"):
        given = getattr(config, key, None)
        for t in given if isinstance(given, list | set | tuple) else ():
            if not named(str(t)):
                errors.add(f"adapter.{key}: no module is called {t!r}.{nearest(str(t).rpartition('.')[2], leaves_)}")
    layers = getattr(config, "layers_to_transform", None)
    whole: Any = getattr(base, "config", None)
    text = whole.get_text_config() if hasattr(whole, "get_text_config") else whole
    n = getattr(text, "num_hidden_layers", None)
    for k in [layers] if isinstance(layers, int) else layers or ():
        if n is not None and not 0 <= k < n:
            errors.add(f"adapter.layers_to_transform: there is no block {k}: the base has blocks 0 to {n - 1}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key, None) or {}:
            if not _pattern_matches(pattern, names):
                errors.add(
                    f"adapter.{key}: {pattern!r} matches no module.{nearest(re.sub('[^A-Za-z0-9_]', '', pattern), leaves_)}"
                )
    errors.raise_if_any("recipe")


def _pattern_matches(pattern: str, names: Sequence[str]) -> bool:
    """As PEFT looks a pattern up: at the end of a module's name."""
    try:
        found = re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return any(found.match(n) for n in names)


def _checksums(model: Any) -> dict[str, int]:
    """Exact checksums of the base's tensors (sums of their bits); empty for a model without weights in memory."""
    out = {}
    for name, tensor in plain_tensors(model).items():
        flat = tensor.detach().reshape(-1)
        if flat.is_meta or flat.element_size() not in _BITS:
            return {}
        out[name] = int(flat.contiguous().view(_BITS[flat.element_size()]).sum(dtype=torch.int64))
    return out


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def adapted(model: Any, adapter_name: str | None = None) -> list[str]:
    """Sorted names of the modules and parameters that carry the adapter being trained; name it where others are below."""
    tuner = model.base_model
    if adapter_name is not None and len(model.peft_config) > 1:
        return targeted_names(model, adapter_name)
    return sorted({*getattr(tuner, "targeted_module_names", []), *getattr(tuner, "targeted_parameter_names", [])})


def _assert_adapted(model: Any, name: str, fused: set[str], wanted: Any, names_parameters: bool) -> None:
    if not adapted(model, name):
        raise UserError(f"adapter: target_modules {wanted!r} match no module of the base")
    extra = [n for n in getattr(model.base_model, "targeted_parameter_names", []) if n not in fused]
    if extra and not names_parameters:
        raise UserError(
            f"adapter: PEFT turned target_modules {wanted!r} into fused parameters ({', '.join(extra[:4])}..): on a mixture-of-experts "
            "base that adapts every expert and the router. Name the attention modules, e.g. [q_proj, k_proj, v_proj, o_proj]"
        )


def describe(model: Any, adapter_name: str | None = None) -> str:
    """One line: what the adapter being trained is on, with trainable and total parameter counts, and what is below it."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    what = leaves(adapted(model, adapter_name)) or "a soft prompt"
    below = [n for n in model.peft_config if n != adapter_name] if adapter_name is not None else []
    on = f"; on top of {', '.join(below)}, frozen" if below else ""
    return f"adapted: {what} ({trainable:,} trainable of {total:,} parameters, {100 * trainable / total:.2f} %){on}"


def leaves(names: Sequence[str]) -> str:
    """Modules by the last part of their names, e.g. ``q_proj x4, v_proj x4``."""
    return ", ".join(f"{leaf} x{n}" for leaf, n in sorted(Counter(n.rpartition(".")[2] for n in names).items()))
