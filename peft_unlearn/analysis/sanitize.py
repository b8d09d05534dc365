"""Take out of a finished adapter what acts on dominant activations of the retain set: A' = A (I - V w V^T), B as it was.

The new delta D is the minimizer of |D - B A|^2 + strength tr(D C D^T) / m over all matrices, where C = V^T l V is the second moment of what
the adapted module reads on retain rows and m its mean eigenvalue: w = strength l / (m + strength l). Only A moves, so rank, names and
shapes of the files stay, and plain PEFT loads the result. Of experts C is taken over the tokens that are routed to each. One forward over
the retain rows, no gradient.

Source: SAGE (https://arxiv.org/abs/2606.18309), whose abstract fixes the idea: a source-anchored closed form on a small retain proxy and
dominant activation geometry; the ridge form is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attribution.streamed import batches
from ..data.collate import padding_id
from ..data.load import load_data
from ..errors import Errors, UserError
from ..evaluation.plan import Progress
from ..evaluation.quick import make_score
from ..evaluation.rows import rows_of
from ..evaluation.subjects import bundle_for, suite_of
from ..folder.base import base_reference, load_base, load_tokenizer, resolve_base
from ..folder.digest import adapter_modules, digest_checkpoint, name_in_base
from ..folder.manifest import Manifest, neutral_prompts, probes
from ..folder.read import CONFIG, MANIFEST, WEIGHTS, AdapterFolder, check_weights, read_adapter, read_json
from ..folder.versions import versions
from ..folder.write import check_destination, write_adapter
from ..forward import adapters_off
from ..head import held
from ..reporting.result import Result, fields_of
from ..reporting.tables import Table, to_text
from ..stack.attach import attach
from ..stack.identity import identity_of
from ..stack.model import ForgetModel
from ..training.save import stock_export
from ..tuners.delta import NOT_A_SUM, changes_base
from ..tuners.expert_lora.blocks import is_llama4
from ..tuners.expert_lora.layer import PROJECTIONS, ExpertsLayer, RouterLayer
from ..tuners.peft_type import PEFT_TYPE
from .calibrate import at_scale
from .disruption import make_kl

STRENGTH = 0.1
EXACT, KEPT = 1024, 256
"""Modules of at most `EXACT` inputs have their whole second moment taken; of wider ones the `KEPT` strongest directions."""
NAME = "default"


@dataclass
class Sanitized(Result):
    """What `sanitize` wrote and measured.

    before, after: forget/.., retain/.. of the quick suite and kl, nats a token from the base on set `on`; base: the same of the base.
    delta_left: |D'| / |D| over all adapted weights (Frobenius); effect_left: the same of what D does to the activations of `on`.
    """

    out: str
    adapter_id: str
    sanitized: str
    strength: float
    on: str
    rows: int
    tokens: int
    weights: int
    delta_left: float
    effect_left: float
    base: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    title = "What a sanitized adapter lost"

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, **fields_of(self)}

    def __str__(self) -> str:
        names = [n for n in self.before if n in self.after]
        cell = lambda found, n: f"{found[n]:.4g}" if n in found else "-"  # noqa: E731
        rows = [[n, *(cell(x, n) for x in (self.base, self.before, self.after))] for n in names]
        return (
            f"{to_text(Table(('', 'base', 'before', 'after'), rows))}\n{self.out}: {self.adapter_id[:19]}, strength {self.strength:g}; of "
            f"{self.weights} weights' deltas {self.delta_left:.0%} is left, of their effect on {self.tokens:,} tokens of {self.rows} "
            f"{self.on} rows {self.effect_left:.0%}"
        )


def sanitize(
    folder: str | Path, out: str | Path, *, strength: float = STRENGTH, on: str = "retain", n: int | None = None,
    base: str | None = None, data: str | None = None, progress: Progress | None = None,
) -> Sanitized:  # fmt: skip
    """Write to `out` the adapter without what acts on dominant activations of set `on`; `folder` stays as it is.

    Args:
        folder: a forget adapter, or any LoRA adapter that PEFT saved (then `data` names the rows, and `base` the base where its
            configuration does not).
        strength: of the projection, in units of the mean eigenvalue; 0 would change nothing, infinity is the hard projection.
        n: at most so many rows of each set are judged; the activations are of all rows.

    Raises:
        UserError: an adapter that is not W + s B A on linear layers or experts, one that stands on others, no rows, a taken `out`.
    """
    if not strength > 0:
        raise UserError(f"--strength is a positive number, 0.1 by default, not {strength:g}")
    check_destination(out, [folder])
    found, stack, bundle = _opened(Path(folder).expanduser(), base, data)
    if not (rows_of(bundle, on) or ()):
        raise UserError(
            f"sanitize reads activations of the {on} set, and these data have none; give one with --data or --on"
        )
    model, tokenizer = stack.model, stack.tokenizer
    score = make_score(bundle, tokenizer, suite_of(found), n)
    kl, _ = make_kl(model, tokenizer, bundle, on, n, at_scale(stack, NAME))

    def numbers() -> dict[str, float]:
        return {**score(model), "kl": kl(float(found.manifest.scale))}

    parts = list(factors(model))
    with stack.disabled() as plain:
        at_base = {**score(plain), "kl": 0.0}
    before, encoded = numbers(), bundle.encode(on, tokenizer)
    moments = activations(model, encoded, padding_id(tokenizer), progress)
    if dead := [key for key, _, _ in parts if key not in moments and key[1] is None]:
        raise UserError(f"no token of the {on} set passes through {len(dead)} adapted modules, first {dead[0][0]}")
    sums = torch.zeros(4, dtype=torch.float64)
    for key, a, b in parts:
        if key in moments:  # an expert that no retain token is routed to harms none
            sums += project(a, b, moments[key], strength)
        else:
            sums[:2] += _square(a, b)
    done = Sanitized(
        str(out), "", found.adapter_id, strength, on, len(encoded), max(m.n for m in moments.values()), len(parts),
        float((sums[1] / sums[0]).sqrt()), float((sums[3] / sums[2]).sqrt()), at_base, before, numbers(),
    )  # fmt: skip
    return replace(done, adapter_id=_write(found, stack, bundle, out, done).adapter_id)


# --- what is cleaned, and what it reads ------------------------------------------------------------------------------

Key = tuple[str, str | None, int]  # module, of experts the projection, which expert


def factors(model: Any) -> Iterator[tuple[Key, Tensor, Tensor | None]]:
    """(where, A (r, in), B (out, r)) of every adapted weight as views of the model's own; a whole router delta has no B.

    Raises:
        UserError: an adapted layer that is no linear one.
    """
    from peft.tuners.lora.layer import Linear

    for name, layer in adapter_modules(model).items():
        if isinstance(layer, ExpertsLayer):
            for p in PROJECTIONS:
                for j, e in enumerate(layer.experts[NAME]):
                    a, b = (layer._factors(f"{p}_{f}")[NAME][j] for f in "AB")
                    yield (name, p, e), a, b
        elif isinstance(layer, RouterLayer):
            whole = NAME in layer._factors("router_delta")
            a = layer._factors("router_delta" if whole else "router_A")[NAME]
            yield (name, None, 0), a, None if whole else layer._factors("router_B")[NAME]
        elif isinstance(layer, Linear) and NAME in layer.lora_A:
            a, b = (f[NAME].get_parameter("weight") for f in (layer.lora_A, layer.lora_B))
            yield (name, None, 0), a, b
        else:
            raise UserError(
                f"the adapter is on {name_in_base(name)} ({type(layer).__name__}), and only linear layers and experts have an input "
                "that a part of the delta can be taken from; sanitize refuses the whole, since the rest would still act"
            )


class Moment:
    """The second moment of vectors of one width: whole, or its strongest directions where it is wide."""

    def __init__(self, width: int) -> None:
        self.width, self.n, self.trace = width, 0, 0.0
        self.seen: Tensor | None = None  # (width, width), or rows whose second moment it is

    def add(self, x: Tensor) -> None:
        """x (tokens, width)."""
        x = x.float()
        self.n, self.trace = self.n + len(x), self.trace + float(x.square().sum())
        if self.width <= EXACT:
            self.seen = x.T @ x if self.seen is None else self.seen.addmm_(x.T, x)
            return
        self.seen = x if self.seen is None else torch.cat([self.seen, x])
        if len(self.seen) > 2 * KEPT:
            _, s, v = torch.linalg.svd(self.seen, full_matrices=False)
            self.seen = s[:KEPT, None] * v[:KEPT]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """(l (k,) in units of the mean eigenvalue, V (k, width)), float32."""
        assert self.seen is not None
        if self.width <= EXACT:
            energy, v = torch.linalg.eigh(self.seen.double())
            energy, v = energy.clamp_min(0), v.T
        else:
            _, s, v = torch.linalg.svd(self.seen, full_matrices=False)
            energy = s.square()
        return (energy * (self.width / max(self.trace, 1e-30))).float(), v.float()


@torch.no_grad()
def activations(model: Any, rows: Any, pad_id: int = 0, progress: Progress | None = None) -> dict[Key, Moment]:
    """What each adapted module reads on these encoded rows with the adapter off; experts by the tokens routed to them."""
    out: dict[Key, Moment] = {}
    last: list[Any] = [None, None]  # q, k and v read one and the same tensor

    def linear(name: str):
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if last[0] is not args[0]:
                last[:] = args[0], out.setdefault((name, None, 0), Moment(args[0].shape[-1]))
                last[1].add(args[0].reshape(-1, args[0].shape[-1]))
            out[name, None, 0] = last[1]

        return hook

    def experts(name: str):
        def hook(layer: Any, args: tuple[Any, ...]) -> None:
            for e, p, x in _routed(layer, *args):
                out.setdefault((name, p, e), Moment(x.shape[-1])).add(x)

        return hook

    layers = adapter_modules(model)
    hooks = [
        m.register_forward_pre_hook((experts if isinstance(m, ExpertsLayer) else linear)(n)) for n, m in layers.items()
    ]
    parts = batches(rows, "rows", pad_id, 16, next(model.parameters()).device, padded=False)
    with held(*hooks), adapters_off(model):
        for i, part in enumerate(parts):
            batch = part["rows"]
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            if progress is not None:
                progress("activations", i + 1, len(parts))
    return out


def _routed(layer: ExpertsLayer, hidden: Tensor, *routing: Tensor) -> Iterator[tuple[int, str, Tensor]]:
    """(expert, projection, its inputs (tokens, in)) of the adapted experts that a token is routed to, the adapter off."""
    base: Any = layer.get_base_layer()
    for e in layer.experts[NAME]:
        if is_llama4(layer):
            x = hidden.view(layer.num_experts, -1, hidden.shape[-1])[e]
            x = x[(x != 0).any(-1)]
        else:
            x = hidden[(routing[0] == e).any(-1)]
        if len(x):
            yield e, "gate_up", x
            y = layer._project(x, "gate_up", e, [])
            gate, up = y.chunk(2, dim=-1)
            yield e, "down", up * base.act_fn(gate) if is_llama4(layer) else base._apply_gate(y)


@torch.no_grad()
def project(a: Tensor, b: Tensor | None, moment: Moment, strength: float) -> Tensor:
    """Change A in place; [|D|^2 before, after, tr(D C D^T) before, after], float64."""
    energy, v = moment.spectrum()
    old, energy, v = a.float(), energy.to(a.device), v.to(a.device)
    share = (1 / (1 + 1 / (strength * energy))) if strength < float("inf") else (energy > 1e-6).float()
    new = old - ((old @ v.T) * share) @ v
    root = v.T * energy.sqrt()  # (in, k)
    sizes = torch.stack([_square(x, b) for x in (old, new, old @ root, new @ root)])
    a.copy_(new)
    return sizes


def _square(a: Tensor, b: Tensor | None) -> Tensor:
    """|B A|^2, from the factors' Gram matrices."""
    a = a.detach().double()
    return (a.square().sum() if b is None else ((b.detach().double().T @ b.detach().double()) * (a @ a.T)).sum()).cpu()


# --- folders ---------------------------------------------------------------------------------------------------------


def _opened(folder: Path, base: str | None, data: str | None) -> tuple[AdapterFolder, ForgetModel, Any]:
    """The adapter, alone on its base in float32, and the rows."""
    if (folder / MANIFEST).is_file():
        found = read_adapter(folder)
        _check(found)
        bundle = bundle_for([found], data)
        return found, ForgetModel.from_pretrained(base, {NAME: found.path}, fused=False), bundle
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: neither a forget adapter nor one that PEFT saved: there is no {CONFIG}")
    config = read_json(folder / CONFIG)
    check_weights(folder / WEIGHTS, config)
    base = base or config.get("base_model_name_or_path")
    base_dir = resolve_base(base)
    digest = digest_checkpoint(base_dir)
    method = {"peft_type": config.get("peft_type"), **identity_of(base_dir)}
    bundle = load_data(None, data)
    manifest = Manifest(base_reference(str(base), base_dir, digest), method, {}, versions=versions())
    found = AdapterFolder(folder, manifest, {"base": str(base)}, config, None)
    _check(found)
    stack = ForgetModel(attach(load_base(base_dir), {NAME: found}), base_dir, {NAME: found}, digest, fused=False)
    return found, stack, bundle


def _check(found: AdapterFolder) -> None:
    """Refuse an adapter whose effect is not s B A x alone."""
    config, errors = found.config, Errors()
    if (kind := config.get("peft_type")) not in ("LORA", PEFT_TYPE):
        errors.add(f"its PEFT type is {kind}, and only a LoRA has a factor on the input's side that can be projected")
    for key, (what, why) in NOT_A_SUM.items():
        if config.get(key):
            errors.add(f"it has {what} ({key}): {why}")
    if config.get("bias") not in (None, "none"):
        errors.add(f"it trained biases (bias: {config['bias']}), which no projection of A reaches")
    if changes := changes_base(config):
        errors.add(f"{changes} changes the base's own weights")
    if found.manifest.depends_on:
        errors.add("it was trained on top of other adapters, whose activations it reads")
    if errors.messages:
        raise UserError(f"{found.path}: cannot be sanitized: {'; '.join(errors.messages)}. Nothing was written.")


def _write(found: AdapterFolder, stack: ForgetModel, bundle: Any, out: str | Path, done: Sanitized) -> AdapterFolder:
    """The new folder: where it came from and what was done stand in forget.json, recipe.yaml and the card."""
    old = found.manifest
    record = {"from": found.adapter_id, "strength": done.strength, "on": done.on, "rows": done.rows}
    prompts = old.probes.prompts if old.probes is not None else neutral_prompts(bundle.forget or ())
    with at_scale(stack, NAME)(1.0) as model:
        renewed = probes(model, stack.tokenizer, prompts)
    name = f"{old.name or found.path.resolve().name} sanitized"
    words = f"{old.description} Sanitized: what acted on dominant activations of the {done.on} set is taken out of {found.adapter_id[:19]}."
    manifest = replace(
        old, method={**old.method, "sanitize": record}, probes=renewed, name=name, description=words.strip(), files={},
        targets=old.targets or sorted({name_in_base(n) for n in adapter_modules(stack.model)}),
    )  # fmt: skip
    recipe = {**found.recipe, "name": name, "description": manifest.description, "sanitize": record}
    return write_adapter(
        out, stack.model, manifest, recipe, tokenizer=load_tokenizer(found.path, stack.base_dir), adapter_name=NAME,
        save=stock_export(stack.model, NAME, old.base),
    )  # fmt: skip
