"""`Pass`: the one place that runs a model on batches of tokens, or of images.

What an objective reads (log-probabilities, any function of the logits, hidden states, the same of the reference model)
is computed lazily from ONE forward per pass and model mode. Logits are never held for a whole batch: the head's input is taken
by a pre-hook on the output embeddings, only target positions go through the head, chunk by chunk, and the derivative of
each row's value with respect to its hidden state is formed while the chunk's logits exist. So a frozen head costs neither a
(batch, seq, vocab) tensor, nor a (vocab, hidden) gradient, nor a recomputation, for any loss over target positions.
First order only: differentiating twice raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .errors import Errors, UserError
from .head import ClassHead, Head, causal_lm, held
from .prefix import read_rest, shared
from .tuners.expert_lora.blocks import moe_blocks

# --- the model's parts ------------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the longest ModuleList whose entries are all of one class."""
    found = [
        m
        for m in causal_lm(model).modules()
        if isinstance(m, nn.ModuleList) and len(m) and len({type(x) for x in m}) == 1
    ]
    outer = [m for m in found if any(True for _ in m[0].children())]
    if not outer:
        raise UserError("this model has no list of decoder blocks; name the layer by its module path instead")
    return max(outer, key=len)


def layer_module(model: nn.Module, layer: int | str) -> nn.Module:
    """Block k (0-based, negative from the end) or the module of that name (or its unique dotted suffix).

    Raises:
        UserError: no such layer.
    """
    if isinstance(layer, int):
        all_blocks = blocks(model)
        if not -len(all_blocks) <= layer < len(all_blocks):
            raise UserError(f"layer {layer} does not exist: the model has blocks 0 to {len(all_blocks) - 1}")
        return all_blocks[layer]
    hits = [m for n, m in causal_lm(model).named_modules() if n == layer or n.endswith("." + layer)]
    if len(hits) != 1:
        raise UserError(f"layer {layer!r} names {len(hits)} modules of the model; it must name exactly one")
    return hits[0]


def router_module(model: nn.Module, layer: int) -> nn.Module:
    """The router of mixture-of-experts block `layer`.

    Raises:
        UserError: the block has no router that is known here.
    """
    found = moe_blocks(model)
    if layer not in found or found[layer].router is None:
        have = ", ".join(str(k) for k, b in found.items() if b.router) or "none: the model is dense"
        raise UserError(f"block {layer} has no router; blocks with one: {have}")
    return causal_lm(model).get_submodule(str(found[layer].router))


def _hidden_states(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _raw_logits(output: Any, experts: int) -> Tensor:
    """Router logits (tokens, experts) of a router's output: (logits, weights, indices), or Llama 4's (scores, logits)."""
    if torch.is_tensor(output):
        return output
    wide = [t for t in output if torch.is_tensor(t) and t.is_floating_point() and t.shape[-1] == experts]
    return wide[-1] if len(output) == 2 else wide[0]


class _Stop(Exception):
    """Raised by a hook when everything asked for has been seen."""


# --- the reference model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Which model losses compare with: the same weights with other adapters switched on.

    mode: "before" (what was active before training: the base plus the frozen stack), "precomputed" (the same, and the rows hold
    what is read of it already), "base" (every adapter off), or "adapter:<name>". `trained` is the adapter being trained.
    """

    mode: str = "before"
    trained: str = "default"

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """The model as reference: no gradients, no dropout; adapters, requires_grad and training flags come back as they were."""
        if not hasattr(model, "peft_config"):
            raise UserError(f"reference {self.mode!r} needs a PEFT model: the reference is the adapter switched off")
        tuner: Any = model.base_model
        active = list(model.active_adapters)  # type: ignore[arg-type]
        if self.mode.startswith("adapter:"):
            wanted = [self.mode.split(":", 1)[1]]
            if wanted[0] not in model.peft_config:  # type: ignore[operator]
                raise UserError(f"reference {self.mode!r}: the model has no such adapter")
        else:
            wanted = [] if self.mode == "base" else [a for a in active if a != self.trained]
        # PEFT makes whatever it switches on trainable; the flags are put back by hand.
        flags = [(p, p.requires_grad) for p in model.parameters()]
        training = [m for m in model.modules() if m.training] if _has_dropout(model) else []
        with ExitStack() as stack, torch.no_grad():
            stack.callback(_restore, flags, training)
            for m in training:
                m.training = False
            if wanted:
                stack.callback(tuner.set_adapter, active)
                tuner.set_adapter(wanted)
            else:
                stack.enter_context(adapters_off(model))
            yield


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """`PeftModel.disable_adapter` without its report on every parameter, which takes more than half of a switch. Of that report only one
    thing is used: whether the layers were on, so that they are again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = model.peft_config[model.active_adapter]
    if config.is_prompt_learning or config.is_adaption_prompt:
        with model.disable_adapter():
            yield
        return
    tuner, before = model.base_model, model._adapters_disabled
    on = any(isinstance(m, BaseTunerLayer) and not m.disable_adapters for m in tuner.modules())
    try:
        tuner.disable_adapter_layers()
        model._adapters_disabled = True
        yield
    finally:
        if on:
            tuner.enable_adapter_layers()
        model._adapters_disabled = before


def _restore(flags: list[tuple[nn.Parameter, bool]], training: list[nn.Module]) -> None:
    for p, flag in flags:
        p.requires_grad_(flag)
    for m in training:
        m.training = True


_DROPOUT: weakref.WeakKeyDictionary[nn.Module, tuple[list[str], bool]] = weakref.WeakKeyDictionary()


def _has_dropout(model: nn.Module) -> bool:
    adapters: list[str] = list(getattr(model, "peft_config", ()))  # one added later may bring dropout
    if model not in _DROPOUT or _DROPOUT[model][0] != adapters:
        _DROPOUT[model] = adapters, bool(dropouts(model))
    return _DROPOUT[model][1]


def dropouts(model: nn.Module) -> list[str]:
    """Names of the modules that drop something in training mode."""
    out = []
    for name, m in model.named_modules():
        # Many models call F.dropout with a rate kept as a plain attribute: attention_dropout, dropout, layerdrop, ..
        by_attribute = any("drop" in k and isinstance(v, float) and v > 0 for k, v in vars(m).items())
        if (isinstance(m, _DROPPING) and m.p > 0) or by_attribute:
            out.append(name)
    return out


_DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


# --- what a model can read -------------------------------------------------------------------------------------------


def context_length(model: Any) -> int | None:
    """How many positions a model has a learned table for; None where positions are computed (rotary and their kin read on, if
    badly, beyond what they were made for)."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return limit if any(t.num_embeddings in (limit, limit + 2) for t in tables) else None  # OPT's begins at 2


def check_rows(model: Any, sets: Mapping[str, Sequence[Mapping[str, Any]]], pad_id: int) -> None:
    """Refuse token rows that the model has no positions or no embeddings for, by set and number.

    Raises:
        UserError: everything at once, at most ten rows a set.
    """
    limit, errors = context_length(model), Errors()
    for name, rows in sets.items():
        check_ids(model, rows, pad_id)
        sizes = [max(len(r["input_ids"]), len(r.get("alternate", r)["input_ids"])) for r in rows]
        for i in [i for i, n in enumerate(sizes) if limit is not None and n > limit][:10]:
            errors.add(
                f"{name} set: row {i} has {sizes[i]} tokens, and the model has positions for {limit}; set max_length to at most "
                "that, and on_overflow to truncate or chunk"
            )
    errors.raise_if_any("data")


def check_ids(model: Any, rows: Sequence[Mapping[str, Any]], pad_id: int) -> None:
    """Refuse a tokenizer with tokens, the padding included, that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    if pad_id >= known:
        raise UserError(
            f"the tokenizer pads with token {pad_id}, and the model has embeddings for {known}: set its pad_token to one that the "
            "model has (the end-of-sequence token, say), and save it with the base"
        )
    if (most := max((max(r["input_ids"], default=0) for r in rows), default=0)) >= known:
        raise UserError(
            f"the tokenizer gives token {most}, and the model has embeddings for {known}: it belongs to another model, or tokens "
            "were added to it and the model was not resized"
        )


# --- the pass ---------------------------------------------------------------------------------------------------------


class Pass:
    """One batch seen by one model (and, where asked, by its reference).

    Args:
        batch: ``input_ids``, ``attention_mask``, ``labels`` (batch, seq), -100 = no target, or, of an image classifier,
            ``pixel_values`` (batch, channels, height, width) and ``labels`` (batch, 2) = (-100, class); optionally ``ref_logp``
            (batch, seq-1) or ``ref_head`` (targets, hidden) cached, ``alternate``, a batch of winner answers, and
            ``past_key_values`` (filled) with ``position_ids`` and a mask over what it holds too.
        layers: the layers whose hidden states will be asked for (blocks by number, or module names).
        routers: the mixture-of-experts blocks whose router logits will be asked for.
        stop: end the forward after the deepest of `layers` (nothing beyond is needed).
        share: read what all rows begin with once, where nothing but targets is asked for (`prefix.py`).
        reference_cache: filled with what the reference model computed on this batch, and read from when it is filled: for several
            passes over one batch whose reference must not move with the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        *,
        reference: Reference | None = None,
        layers: Sequence[int | str] = (),
        routers: Sequence[int] = (),
        stop: bool = False,
        share: bool = False,
        reference_cache: dict[str, dict[Any, Tensor]] | None = None,
    ) -> None:
        self.model, self.batch, self.reference = model, batch, reference
        self.images: Tensor | None = batch.get("pixel_values")  # a row of a classifier is a sequence with one target
        if self.images is None:
            self.input_ids: Tensor = batch["input_ids"]
            self.attention_mask: Tensor = batch["attention_mask"]
        self.labels: Tensor = batch["labels"]
        self.mask: Tensor = self.labels[:, 1:] != -100  # (batch, seq-1): position t predicts token t+1
        self.targets: Tensor = self.labels[:, 1:][self.mask]  # (n,)
        self._layers, self._stop, self._share = list(dict.fromkeys(layers)), stop, share
        self._routers = list(dict.fromkeys(routers))
        self._head = Head(model) if self.images is None else ClassHead()
        self._seen: dict[bool, dict[Any, Tensor]] = {}
        self._reference_cache = reference_cache
        self._cache: dict[str, Tensor] = {}
        self._alternate: Pass | None = None

    # what objectives use ------------------------------------------------------------------------------------------

    @property
    def logp(self) -> Tensor:
        """Log-probability of every target, (n,) float32, in ``mask.nonzero()`` order."""
        if "logp" not in self._cache:
            self._cache["logp"] = self._head.logp(self._head_input(False), self.targets)
        return self._cache["logp"]

    @property
    def ref_logp(self) -> Tensor:
        """The same under the reference model, (n,), without gradient; taken from the batch where it is cached."""
        if "ref_logp" not in self._cache:
            if "ref_logp" in self.batch:
                self._cache["ref_logp"] = self.batch["ref_logp"][self.mask].float()
            else:
                h = self.ref_head
                with self._mode(True):
                    self._cache["ref_logp"] = self._head.logp(h, self.targets)
        return self._cache["ref_logp"]

    @property
    def ref_head(self) -> Tensor:
        """The reference's hidden states before the output embeddings at the targets, (n, hidden)."""
        return self.batch["ref_head"] if "ref_head" in self.batch else self._head_input(True)

    def map_logits(self, fn: Callable[..., Tensor], reference: bool = False, targets: Tensor | None = None) -> Tensor:
        """fn over the target positions' logits: (n,) or (n, k) float32.

        Args:
            fn: ``fn(z, y)``, or with `reference` ``fn(z, z_ref, y)``; z (m, vocab) float32, y (m,). Each row's result
                must depend on that row alone.
            targets: what `y` is instead of the targets, (n,).
        """
        y = self.targets if targets is None else targets
        if not reference:
            return self._head.map(self._head_input(False), lambda z, i, j: fn(z, y[i:j]))
        h_ref = self.ref_head
        frozen = type(self._head.module) is nn.Linear  # an adapted head has to be switched for the reference

        def with_reference(z: Tensor, i: int, j: int) -> Tensor:
            with torch.no_grad(), nullcontext() if frozen else self._mode(True):
                z_ref = self._head.logits(h_ref[i:j])
            return fn(z, z_ref, y[i:j])

        return self._head.map(self._head_input(False), with_reference)

    def hidden(self, layer: int | str, reference: bool = False) -> Tensor:
        """Output of block `layer` (0-based) or of the module of that name: (batch, seq, hidden)."""
        self._announce("layer", layer, self._layers, reference)
        return self._run(reference)[layer]

    def router(self, layer: int, reference: bool = False) -> Tensor:
        """Raw router logits of block `layer`, (batch * seq, experts), padding included, rows as ``attention_mask.flatten()``."""
        self._announce("router", layer, self._routers, reference)
        return self._run(reference)["router", layer]

    def _announce(self, what: str, layer: int | str, named: list[Any], reference: bool) -> None:
        if layer not in named:
            if reference in self._seen:
                raise RuntimeError(f"{what} {layer!r} was not named before the forward ran; pass it in `{what}s`")
            named.append(layer)

    @property
    def alternate(self) -> Pass:
        """The pass over the winner answers of the same prompts."""
        if self._alternate is None:
            if "alternate" not in self.batch:
                raise UserError("this objective compares with winner answers, and the batch has none")
            cache = None if self._reference_cache is None else self._reference_cache.setdefault("alternate", {})
            self._alternate = Pass(
                self.model,
                self.batch["alternate"],
                reference=self.reference,
                share=self._share,
                reference_cache=None if cache is None else {"own": cache},
            )
        return self._alternate

    # shapes -------------------------------------------------------------------------------------------------------

    def scatter(self, x: Tensor) -> Tensor:
        """(n,) -> (batch, seq-1), zeros where there is no target."""
        return x.new_zeros(self.mask.shape).masked_scatter(self.mask, x)

    def per_sequence(self, x: Tensor) -> Tensor:
        """(n,) -> sums per row that has a target, (rows,)."""
        return self.scatter(x).sum(1)[self.mask.any(1)]

    @property
    def lengths(self) -> Tensor:
        """Targets per row that has one, (rows,) float32."""
        return self.mask.sum(1)[self.mask.any(1)].float()

    def see_reference(self) -> None:
        """Run the reference model now, so that `reference_cache` holds it before the parameters move; rows may have it already."""
        if not {"ref_logp", "ref_head"} & set(self.batch):
            self._run(True)
            if not self._stop:
                self._head_input(True)
        if "alternate" in self.batch and self._reference_cache is not None:
            self.alternate.see_reference()

    def run(self) -> None:
        """Run the forward now, for what it leaves in ``past_key_values``."""
        self._run(False)

    # running the model --------------------------------------------------------------------------------------------

    def _mode(self, reference: bool):
        if not reference:
            return nullcontext()
        if self.reference is None:
            raise UserError("a reference model is needed here and none was given")
        return self.reference.on(self.model)

    def _head_input(self, reference: bool) -> Tensor:
        """Hidden states before the head at target positions, (n, hidden)."""
        if self._stop:
            raise RuntimeError("the forward stops at a layer, and an objective reads logits, which lie beyond it")
        seen = self._run(reference)
        if "targets" not in seen:
            head = seen.pop("head")  # (batch, seq, hidden), or without the beginning that all rows share
            seen["targets"] = head[:, :-1][self.mask[:, -(head.shape[1] - 1) :]]  # (n, hidden)
        return seen["targets"]

    def _shares(self) -> bool:
        return self._share and not (self.model.training and _has_dropout(self.model))  # each row drops for itself

    def _run(self, reference: bool) -> dict[Any, Tensor]:
        if reference in self._seen:
            return self._seen[reference]
        seen: dict[Any, Tensor] = {}
        if reference and self._reference_cache is not None:
            seen = self._reference_cache.setdefault("own", {})
            if seen:
                self._seen[True] = seen
                return seen
        wanted = len(self._layers) + len(self._routers)

        def take_head(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen["head"] = args[0][:, -self.labels.shape[1] :]  # a soft prompt's own positions come first
            return (args[0][..., :0, :], *args[1:])  # the model's own head sees no position

        def take(key: Any, read: Callable[[Any], Tensor]) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[key] = read(output)
                if self._stop and len(seen) == wanted:
                    raise _Stop

            return hook

        hooks = [(layer_module(self.model, k), take(k, _hidden_states)) for k in self._layers]
        found = moe_blocks(self.model) if self._routers else {}
        for k in self._routers:
            router = router_module(self.model, k)
            hooks.append((router, take(("router", k), partial(_raw_logits, experts=found[k].num_experts))))
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        with held(*handles), self._mode(reference), suppress(_Stop):
            if self.images is not None:
                seen["targets"] = self.model(pixel_values=self.images).logits  # (rows, classes)
            else:
                with held(self._head.module.register_forward_pre_hook(take_head)):
                    past = {k: self.batch[k] for k in ("position_ids", "past_key_values") if k in self.batch}
                    if self._shares() and not (hooks or past) and (n := shared(self.model, self.batch)):
                        read_rest(self.model, self.input_ids, self.attention_mask, n)
                    else:
                        self.model(
                            input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache="past_key_values" in past, **past
                        )  # fmt: skip
        self._seen[reference] = seen
        return seen
