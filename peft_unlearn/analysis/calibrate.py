"""The scale at which an adapter forgets most and still keeps what it must.

The scale of a LoRA adapter is the exact mix of two models: base + scale * delta, so the weight on the original is 1 - scale, and
no weights are ever written to try one out. Searched is the scale that forgets most among those whose retain value stays at or
above a floor times the base's own. Source: Towards Effective Evaluations and Comparisons for LLM Unlearning Methods (2025),
https://arxiv.org/abs/2406.09179; there theta = w * original + (1 - w) * unlearned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.chat import Template
from ..errors import Errors, UserError
from ..evaluation import suites
from ..evaluation.numbers import numbers_of
from ..evaluation.plan import Progress, make_plan, measure
from ..evaluation.rows import rows_of
from ..evaluation.score import on_one_model
from ..evaluation.subjects import bundle_for, embedded_retain_model
from ..folder.manifest import Probes, probes
from ..folder.read import WEIGHTS, AdapterFolder, read_adapter
from ..folder.rescale import bake as bake_in
from ..folder.rescale import set_scale
from ..folder.results import check_writable
from ..folder.safetensors_io import read_header
from ..folder.write import update_eval
from ..registry import get
from ..reporting import calibrate as shown
from ..reporting.document import Part
from ..reporting.result import Result
from ..stack.model import ForgetModel
from ..training.disruption import Disrupted, make_kl, within
from ..tuners.delta import changes_base, is_sparse
from ..tuners.peft_type import FORGET_VECTOR, PEFT_TYPE
from .search import FLOOR, Calibration, Levels, search

FORMAT = 1
BLOCK = "calibration"  # of eval.json
METRIC = "extraction_strength"


@dataclass
class Calibrated(Result):
    """What `calibrate` found and did.

    search: the curve and the point chosen.   retain_model: the levels of
    the model trained without the forget set.   baked: lora_alpha took the scale in.   stored: it is in the adapter's folder.
    dtype: what the models were computed in.
    """

    search: Calibration
    metric: str
    max_scale: float
    retain_model: Levels | None
    scale_before: float
    adapter_id: str
    baked: bool = False
    stored: bool = False
    dtype: str = "float32"
    title = "Calibration"

    @property
    def scale(self) -> float | None:
        """The scale found; None where no scale above 0 will do."""
        return None if self.search.chosen is None else self.search.chosen.scale

    @property
    def exit_code(self) -> int:
        return 1 if self.scale is None else 0

    def to_dict(self) -> dict[str, Any]:
        base = self.search.curve[0].levels
        return {
            "format": FORMAT, "metric": self.metric, **self.search.to_dict(), "max_scale": self.max_scale,
            "as_trained": next((p.to_dict() for p in self.search.curve if p.scale == 1.0), None),
            "retain_only": None if self.retain_model is None else self.retain_model.to_dict(),
            "scale_before": self.scale_before, "baked": self.baked, "stored": self.stored,
            "n": {"forget": base.forget.n, "retain": base.retain.n}, "adapter_id": self.adapter_id, "dtype": self.dtype,
        }  # fmt: skip

    def __str__(self) -> str:
        return shown.text(self.to_dict())

    def remarks(self) -> list[str]:
        return shown.remarks(self.to_dict())

    def parts(self) -> list[Part]:
        return shown.parts(self.to_dict())


def calibrate(
    folder: str | Path, *, retain_floor: float = FLOOR, metric: str = METRIC, max_scale: float = 1.0, bake: bool = False,
    n: int | None = None, base: str | None = None, data: str | None = None, dtype: str = "auto", progress: Progress | None = None,
    write: bool = True, kl: float | None = None, on: str = "retain",
) -> Calibrated | Disrupted:  # fmt: skip
    """Search the scale (`search`), store it in forget.json and the search as block "calibration" of eval.json.

    Args:
        kl: instead of a retain floor, a budget in nats per token: the largest scale whose KL from the base on set `on` stays within it.
        bake: lora_alpha takes the scale in, so that plain PEFT runs at it (`folder.rescale.bake`).
        n: at most so many rows of each set; nothing is stored then, nor with write=False.
        dtype: what the models are computed in, see `ForgetModel`; with `bake` float32, since the probes are written anew.

    Where no scale will do, forget.json stays as it is and ``scale`` is None.
    """
    found = read_adapter(folder)
    check_exact(found)
    write = write and n is None
    if bake and not write:
        raise UserError("bake writes into the adapter; it takes a search on all rows (no --n)")
    if write:
        check_writable(found.path)
    bundle = bundle_for([found], data)
    if bake and dtype not in ("auto", "float32"):
        raise UserError(f"bake writes the adapter's probes anew, which are of float32; leave out the dtype {dtype!r}")
    stack = ForgetModel.from_pretrained(base, {"adapter": found.path}, dtype="float32" if bake else dtype)
    at = at_scale(stack, "adapter")
    if kl is not None:
        return _to_budget(found, stack, at, bundle, kl, on, n, max_scale, bake, write, progress)
    read = make_read(bundle, stack.tokenizer, metric, n)
    result = search(read, at, levels_of(stack.disabled, read), retain_floor, max_scale, progress)
    retain_model = embedded_retain_model(found.manifest.base.ref, bundle, stack.dtype)
    levels = None if retain_model is None else levels_of(retain_model, read)
    done = Calibrated(
        result, metric, max_scale, levels, found.manifest.scale, found.adapter_id, stored=write, dtype=stack.dtype
    )
    if write:
        if done.scale is not None:
            done.baked = bake and done.scale != 1.0
            _write_scale(found, done.scale, done.baked, at, stack.tokenizer)
        _store(found, done.to_dict())
    return done


def _to_budget(
    found: AdapterFolder, stack: ForgetModel, at: Callable[[float], Any], data: Any, budget: float, on: str, n: int | None,
    max_scale: float, bake: bool, write: bool, progress: Progress | None,
) -> Disrupted:  # fmt: skip
    measure, rows = make_kl(stack.model, stack.tokenizer, data, on, n, at)
    scale, seen = within(measure, budget, max_scale, progress)
    curve = [{"scale": s, "kl": seen[s]} for s in sorted(seen)]
    done = Disrupted(
        budget, scale, None if scale is None else seen[scale], curve, on, rows, found.manifest.scale, found.adapter_id, stack.dtype,
        stored=write,
    )  # fmt: skip
    if write:
        if scale is not None:
            done.baked = bake and scale != 1.0
            _write_scale(found, scale, done.baked, at, stack.tokenizer)
        if found.eval is not None:
            update_eval(found.path, _at_its_scale(found, scale, found.manifest.scale, done.baked), measured=())
    return done


def levels_of(subject: Callable[[], AbstractContextManager[Any]], read: Callable[[Any], Levels]) -> Levels:
    with subject() as model:
        return read(model)


def _write_scale(found: AdapterFolder, scale: float, bake: bool, at: Callable[[float], Any], tokenizer: Any) -> None:
    if not bake:
        set_scale(found.path, scale)
        return
    renewed: Probes | None = None
    if found.manifest.probes is not None:
        with at(scale) as model:
            renewed = probes(model, tokenizer, found.manifest.probes.prompts)
    bake_in(found.path, scale, renewed)


def _store(found: AdapterFolder, block: Mapping[str, Any]) -> None:
    """The block beside whatever eval.json has."""
    stored = _at_its_scale(found, block["scale"], block["scale_before"], block["baked"])
    update_eval(found.path, {**stored, BLOCK: block}, measured=(BLOCK,))


def _at_its_scale(found: AdapterFolder, scale: float | None, before: float, baked: bool) -> dict[str, Any]:
    """eval.json as it is. Numbers that were measured at another scale get that scale beside them; after baking it is in units of what
    scale 1 means now."""
    stored = dict(read_adapter(found.path).eval or {"format": 1, "adapter_id": found.adapter_id, "subjects": {}})
    if scale is not None and (baked or scale != before):
        unit = scale if baked else 1.0
        if stored.get("subjects"):
            stored["scale"] = stored.get("scale", before) / unit
        attacks = stored.get("attacks")
        if isinstance(attacks, dict) and isinstance(attacks.get("scale"), dict):
            stored["attacks"] = {**attacks, "scale": {k: v / unit for k, v in attacks["scale"].items()}}
    return stored


# -- one adapter, one scale -------------------------------------------------------------------------------------------


def check_exact(folder: AdapterFolder) -> None:
    """Refuse an adapter whose scale is not the exact mix of base and unlearned model.

    Exact is base + scale * delta for every changed weight. DoRA re-normalizes, trained biases and whole modules saved beside the
    factors do not follow the scale, and some initializations change the base itself.
    """
    config, errors = folder.config, Errors()
    kind = str(config["peft_type"])
    sparse = is_sparse(folder)
    vector = kind == FORGET_VECTOR  # scaled at the input: no mix of weights, and as exact
    if kind not in ("LORA", PEFT_TYPE) and not sparse and not vector:
        errors.add(
            f"its PEFT type is {kind}, which has no scale, or whose scale is not known to be the factor of a sum of weights"
        )
    if config.get("use_dora"):
        errors.add("it is a DoRA adapter, which re-normalizes the weights: half the scale is not half the change")
    if config.get("bias") not in (None, "none"):
        errors.add(f"it trained biases (bias={config['bias']!r}), which are there at any scale")
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            errors.add(f"it has {key}={config[key]!r}, which the scale does not reach")
    if changes := changes_base(config):
        errors.add(f"{changes} changes the base's own weights")
    if folder.manifest.depends_on:
        errors.add("it was trained on top of other adapters: at scale 0 those are left, not the base")
    if not errors.messages and not sparse and not vector:
        stray = [n for n in read_header(folder.path / WEIGHTS) if "lora_" not in n]
        if stray:
            errors.add(f"{len(stray)} of its tensors are no LoRA factors, first {stray[0]!r}")
    if errors.messages:
        raise UserError(
            f"{folder.path}: cannot be calibrated, since its scale is not the exact mix of the two models: "
            f"{'; '.join(errors.messages)}."
        )


def at_scale(stack: ForgetModel, name: str) -> Callable[[float], AbstractContextManager[Any]]:
    """A function scale -> context manager, inside which the model is the base with adapter `name` alone at that scale."""
    only = on_one_model(stack.model, {name: name})[name]

    @contextmanager
    def at(scale: float) -> Iterator[Any]:
        before = stack.scales()[name]
        with only() as model:
            stack.scale(name, scale)
            try:
                yield model
            finally:
                stack.scale(name, before)

    return at


def make_read(
    data: Any, tokenizer: Any, metric: str = METRIC, n: int | None = None, template: Template | None = None
) -> Callable[[Any], Levels]:
    """A function model -> Levels. The rows are tokenized once, here; a reading is one forward for each answer, no generation.

    metric: one value per row, lower better on the forget and higher on the retain set.   n: at most so many rows of each set.
    """
    method = get("metric", metric)
    if method.extra["better"] != {"forget": "lower", "retain": "higher"} or set(method.needs) & {
        "generation", "perturbed", "retain_model",
    }:  # fmt: skip
        raise UserError(
            f"metric {metric!r} cannot calibrate: it takes one that is read off the right answers and is lower on what is "
            "forgotten, such as extraction_strength, exact_memorization or probability"
        )
    for name in ("forget", "retain"):
        if not rows_of(data, name):
            raise UserError(f"calibration needs a {name} set, and these data have none; give one with --data")
    spec = {name: {"role": name, "metrics": [metric]} for name in ("forget", "retain")}
    plan = make_plan(
        suites.load({"format": suites.FORMAT, "name": "calibration", "sets": spec}), data, tokenizer, n, template
    )

    def read(model: Any) -> Levels:
        found = numbers_of(plan, measure(model, plan), None)
        return Levels(found[f"forget/{metric}"], found[f"retain/{metric}"])

    return read
