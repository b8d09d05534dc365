"""The finished adapter of a trainer, written as a folder (docs/format.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.chat import parse_template
from ..data.formats import layout_of
from ..errors import UserError
from ..folder.base import base_reference, peft_base_name, resolve_base
from ..folder.digest import digest_checkpoint, targeted_names
from ..folder.manifest import BaseRef, Manifest, neutral_images, neutral_prompts
from ..folder.quantized import KEY, RECORD, options_of
from ..folder.read import AdapterFolder, read_adapter
from ..folder.versions import versions
from ..folder.write import write_adapter
from ..gradients.vector import is_sharded
from ..head import reads_images
from ..merging.layout import meta_model
from ..stack.attach import check_reloads
from ..stack.fits import tokenizer_difference
from ..stack.identity import identity_of
from ..tuners.names import belongs
from ..tuners.peft_type import PEFT_TYPE, SPARSE_TYPE
from .adapt import adapted
from .config import METHODS, UnlearnConfig
from .own_base import held_in_memory, plain_copy, probes_of_files
from .trainer import UnlearnTrainer


def save_adapter(
    trainer: UnlearnTrainer,
    out: str | Path | None = None,
    *,
    base: str | Path,
    recipe: dict[str, Any] | None = None,
    depends_on: Sequence[str] | None = None,
) -> AdapterFolder:
    """Write the trained adapter of `trainer` as a forget adapter's folder and return it as read back.

    On a sharded base every rank calls it and loads the base's files once more; rank 0 alone writes.

    Args:
        out: the folder; default the `output_dir` of the config.
        base: where the base model came from: a folder, a Hub id or ``embedded:NAME``. Its files are digested, and compared
            with the model in memory.
        recipe: what is written as recipe.yaml; default `recipe_of` the trainer.
        depends_on: ids ("sha256:..") of the frozen adapters that it was trained on top of, lowest first.

    Raises:
        UserError: other adapters are active and `depends_on` does not name them; something else stands at `out`; or the
            adapter is zero or not finite, or plain PEFT would load it otherwise; or the model is not the one in `base`.
    """
    model, config = trainer.bare, trainer.config
    model.eval()
    recipe = recipe_of(trainer, base) if recipe is None else recipe
    below = [n for n in model.active_adapters if n != trainer.trained_adapter]
    if len(below) != len(depends_on or ()):
        raise UserError(
            f"{trainer.trained_adapter} was trained on top of {', '.join(below) or 'no other adapter'}, and depends_on names "
            f"{len(depends_on or ())}; give their ids (AdapterFolder.adapter_id), lowest first"
        )
    manifest = _manifest(trainer, base, recipe, list(depends_on or ()))
    sharded = any(map(is_sharded, model.parameters()))
    if sharded:
        model = plain_copy(model, resolve_base(base), manifest.targets)

    def write() -> AdapterFolder:
        return write_adapter(
            out or config.output_dir,
            model,
            manifest,
            recipe,
            tokenizer=trainer.processing_class,
            adapter_name=trainer.trained_adapter,
            save=stock_export(model, trainer.trained_adapter, manifest.base),
            check=lambda stage: _check(stage, resolve_base(base), manifest.targets),
        )

    return _by_first_rank(write, Path(out or config.output_dir)) if sharded else write()


def _by_first_rank(write: Callable[[], AdapterFolder], out: Path) -> AdapterFolder:
    """What rank 0 wrote, read by every rank; why it wrote nothing is every rank's `UserError`."""
    found: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            write()
        except UserError as e:
            found = [str(e)]
    torch.distributed.broadcast_object_list(found)
    if found[0] is not None:
        raise UserError(found[0])
    return read_adapter(out)


def _check(stage: Path, base_dir: Path, targets: list[str]) -> None:
    """Raise a `UserError` for a folder that no one could use on this base."""
    check_reloads(stage, meta_model(base_dir, targets))
    if why := tokenizer_difference(stage, base_dir):
        raise UserError(
            f"it was trained with another tokenizer than the one of its base in {base_dir} ({why}): nothing was written, since no "
            "command would take it. Train with the base's own tokenizer"
        )


def _manifest(trainer: UnlearnTrainer, base: str | Path, recipe: dict[str, Any], depends_on: list[str]) -> Manifest:
    model, config, data = trainer.bare, trainer.config, trainer.data
    base_dir = resolve_base(base)
    modules, targets = targeted_names(model, trainer.trained_adapter), adapted(model, trainer.trained_adapter)
    prompts = neutral_prompts(data.forget or ())
    if reads_images(model):
        prompts = neutral_images(*trainer.rows.sets[config.anchor][0]["pixel_values"].shape)
    digest = digest_checkpoint(base_dir)
    held = held_in_memory(model, trainer.processing_class, prompts, base_dir, targets, digest)
    return Manifest(
        base=base_reference(base, base_dir, digest, _digest_of(base_dir, modules)),
        method={**describe_method(trainer, recipe), **identity_of(base_dir), **({RECORD: held} if held else {})},
        data={
            name: {
                **{k: v for k, v in about.items() if v is not None},
                "format": layout_of((data.rows(name) or [{}])[0]),
            }
            for name, about in data.describe(config.sets).items()
        },
        reference=config.reference,
        effective_batch={
            "per_device": config.train_batch_size,
            "accumulation": config.gradient_accumulation_steps,
            "processes": config.world_size,
            "rows": config.rows_per_step,
        },
        seeds={"seed": config.seed},
        versions=versions(),
        probes=probes_of_files(model, trainer.processing_class, prompts, base_dir, targets),
        targets=targets,
        depends_on=depends_on,
        name=str(recipe.get("name", "")),
        description=str(recipe.get("description", "")),
    )


def _digest_of(base_dir: Path, modules: list[str]) -> str | None:
    """Digest of the weights under the adapter; None where the files call them otherwise (Mixtral's experts): cannot tell."""
    try:
        return digest_checkpoint(base_dir, modules) if modules else None  # a soft prompt lies over none
    except UserError:
        return None


def stock_export(model: Any, name: str, base: BaseRef) -> Callable[[Path], dict[str, torch.Tensor]] | None:
    """For an expert or sparse adapter: stock PEFT files on top, which load without this package, and the compact form beside them."""
    kind = str(model.peft_config[name].peft_type.value)
    if kind == SPARSE_TYPE:
        from ..tuners.sparse import export

        return lambda stage: export.save_into(stage, model, name, peft_base_name(base.ref), base.revision)[0]
    if kind != PEFT_TYPE:
        return None
    from ..tuners.expert_lora.export import save_into, stock_tensors

    def save(stage: Path) -> dict[str, torch.Tensor]:
        save_into(stage, model, name, peft_base_name(base.ref), base.revision)
        return stock_tensors(model, name)

    return save


def recipe_of(trainer: UnlearnTrainer, base: str | Path) -> dict[str, Any]:
    """The recipe that a trainer made in Python amounts to: what differs from the defaults of `UnlearnConfig`."""
    config, adapter = trainer.config, trainer.bare.peft_config[trainer.trained_adapter]
    theirs = {f.name for f in fields(TrainingArguments)} - {"output_dir", "seed", "use_cpu"} | {"router_learning_rate"}
    train = {}
    for f in fields(UnlearnConfig):
        value = getattr(config, f.name)
        value = getattr(value, "value", value)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name in theirs and value != default and isinstance(value, (bool, int, float, str)):
            train[f.name] = value
    names = (
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_parameters",
        "experts",
        "router_r",
        "shape",
        "num_virtual_tokens",
    )
    shape = {k: getattr(adapter, k) for k in names if getattr(adapter, k, None)}
    if getattr(adapter, "train_router", "none") != "none":
        shape["train_router"] = adapter.train_router
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    modules = getattr(adapter, "target_modules", None)
    if modules:
        shape["target_modules"] = modules if isinstance(modules, str) else sorted(modules)
    methods = {k: getattr(config, k) for k in METHODS if getattr(config, k) is not None}
    options = {"anchor": config.anchor, "per_anchor": config.per_anchor, "on_overflow": config.on_overflow}
    template, args = parse_template(trainer.data.template)
    options |= {k: v for k, v in {"template": template, "template_args": args}.items() if v and v != "qa"}
    chosen = dict(getattr(getattr(adapter, "chosen", None), "about", {}))
    selection = {k: chosen[k] for k in ("method", "ratio", "budget", "unit", "refresh") if k in chosen} | dict(
        chosen.get("hyper", {})
    )
    refs = {
        n: about.get("ref") or f"sha256:{about['sha256']}" for n, about in trainer.data.describe(config.sets).items()
    }
    return {
        "base": str(base),
        **({KEY: held} if (held := options_of(trainer.bare)) else {}),
        "data": {**({"bundle": refs["forget"]} if len(set(refs.values())) == 1 else refs), **options},
        "adapter": {"type": kind.removeprefix("PEFT_UNLEARN_").lower(), **shape},
        "reference": config.reference,
        "terms": config.terms,
        **methods,
        **({"selection": selection} if selection else {}),
        "train": train,
        "seed": config.seed,
    }


@torch.no_grad()
def negate(model: Any, scale: float, adapter: str = "default") -> None:
    """Multiply the adapter's delta by minus `scale`, exactly: B changes, A stays. Plain PEFT then runs it at scale 1."""
    for n, p in model.named_parameters():
        if ("lora_B" in n or "lora_embedding_B" in n) and belongs(n, adapter):
            p.mul_(-scale)


def describe_method(trainer: UnlearnTrainer, recipe: dict[str, Any]) -> dict[str, Any]:
    """Every hyper-parameter with its default filled in."""
    config, adapter = trainer.config, trainer.bare.peft_config[trainer.trained_adapter]
    terms: dict[str, Any] = {}
    for t in config.term_list:
        terms.setdefault(t.gradient, {})[t.objective.name] = {
            **t.hyper, "weight": t.weight, "batch": t.batch, **({"joint": True} if t.joint else {}),
        }  # fmt: skip
    parts = {
        "rule": (config.rule_method, {"scope": config.scope}),
        "smoothing": (config.smoothing_method, {"space": config.smoothing_space}),
        "step_size": (config.step_size_method, {}),
        "averaging": (config.averaging_method, {}),
    }
    run: dict[str, Any] = {
        "terms": terms,
        **{kind: {m[0].name: {**m[1], **more}} if m else None for kind, (m, more) in parts.items()},
        "selection": _selection(trainer.bare, trainer.trained_adapter),
        "peft_type": getattr(adapter.peft_type, "value", str(adapter.peft_type)),
        "negate": (recipe.get("adapter") or {}).get("negate"),
        **({"stack": [{"id": r["adapter"], "scale": r["scale"]} for r in rows]} if (rows := _rows(recipe)) else {}),
        "optimizer": str(getattr(config.optim, "value", config.optim)),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)),
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "anchor": config.anchor,
        "per_anchor": config.per_anchor,
    }
    if trainer.oneshot is not None:  # nothing of this ran
        run = {k: v for k, v in run.items() if k not in _OF_TRAINING}
        run["oneshot"] = trainer.oneshot
    return run


_OF_TRAINING = ("optimizer", "learning_rate", "lr_scheduler_type", "max_grad_norm", "weight_decay", "best_step", "rule")


def _selection(model: Any, name: str) -> dict[str, Any] | None:
    """How a sparse adapter's entries were chosen, and what its stock form stores of zeros; None for other adapters."""
    adapter = model.peft_config[name]
    if str(getattr(adapter.peft_type, "value", "")) != SPARSE_TYPE or adapter.chosen is None:
        return None
    from ..tuners.sparse.export import entries_of, linear_in, stock_form

    chosen = adapter.chosen
    form = stock_form(entries_of(model, name), linear_in(model), adapter.scale)
    stock = form if isinstance(form, str) else {"parts": len(form.parts), "padding": round(form.padding, 2)}
    return {"refresh": "never", **chosen.about, "entries": chosen.count, "density": chosen.density, "stock": stock}


def _rows(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    rows = recipe.get("stack")
    return [r for r in rows if isinstance(r, dict) and {"adapter", "scale"} <= set(r)] if isinstance(rows, list) else []
