"""Take out of a finished adapter what acts on dominant activations of the retain set: A' = A (I - V w V^T), B as it was.

The new delta D is the minimizer of |D - B A|^2 + strength tr(D C D^T) / m over all matrices, where C = V^T l V is the second moment of what
the adapted module reads on retain rows and m its mean eigenvalue: w = strength l / (m + strength l). Only A moves, so rank, names and
shapes of the files stay, and plain PEFT loads the result. Of experts C is taken over the tokens that are routed to each. One forward over
the retain rows, no gradient.

Source: SAGE (https://arxiv.org/abs/2606.18309), whose abstract fixes the idea: a source-anchored closed form on a small retain proxy and
dominant activation geometry; the ridge form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..attribution.moments import NAME, activations, factors, project, square
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
from ..reporting.result import Result, fields_of
from ..reporting.tables import Table, to_text
from ..stack.attach import attach
from ..stack.identity import identity_of
from ..stack.model import ForgetModel
from ..training.disruption import make_kl
from ..training.save import stock_export
from ..tuners.delta import NOT_A_SUM, changes_base
from ..tuners.peft_type import PEFT_TYPE
from .calibrate import at_scale

STRENGTH = 0.1


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
            sums[:2] += square(a, b)
    done = Sanitized(
        str(out), "", found.adapter_id, strength, on, len(encoded), max(m.n for m in moments.values()), len(parts),
        float((sums[1] / sums[0]).sqrt()), float((sums[3] / sums[2]).sqrt()), at_base, before, numbers(),
    )  # fmt: skip
    return replace(done, adapter_id=_write(found, stack, bundle, out, done).adapter_id)


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
