"""What the commands do, without a terminal: from a recipe to a finished adapter folder, and from folders to numbers.

Everything a user can get wrong is checked before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .adapt import adapted, get_forget_model, peft_config
from .config import DATA_OPTIONS, UnlearnConfig, alternates_of, from_recipe, require_sets
from .data import embedded
from .data.bundle import ForgetRetain
from .data.formats import layout_of, to_text
from .errors import Errors, UserError
from .evaluation.callback import ForgetAtFloor, StopOn
from .evaluation.generate import other_answers
from .evaluation.quick import make_score
from .evaluation.score import Report, on_one_model, score
from .folder.base import base_reference, load_base, load_tokenizer, resolve_base
from .folder.digest import digest_checkpoint, digest_targeted, targeted_names
from .folder.manifest import Manifest, probes
from .folder.read import AdapterFolder, read_adapter
from .folder.write import check_destination, update_eval, write_adapter
from .stack.model import ForgetModel
from .trainer import UnlearnTrainer

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Run:
    """A recipe, understood: everything that can be known before the base model is loaded."""

    recipe: dict[str, Any]
    config: UnlearnConfig
    adapter: Any
    data: ForgetRetain
    base: str
    base_dir: Path
    negate: float | None = None  # save the adapter's delta times minus this (task vectors)


def prepare(recipe: Mapping[str, Any], out: str | Path, base: str | None = None, data: str | None = None) -> Run:
    """Check a recipe as a whole.

    Raises:
        UserError: every complaint about configuration and adapter at once; then data; then base.
    """
    errors = Errors()
    config, adapter = None, None
    given = recipe.get("adapter")
    if not isinstance(given, (Mapping, type(None))):
        errors.add(f"adapter: settings are a mapping, e.g. {{type: lora, r: 16}}, not {given!r}")
        given = None
    spec = dict(given or {})
    negate = spec.pop("negate", None)
    if negate is not None and (not isinstance(negate, (int, float)) or isinstance(negate, bool) or not negate > 0):
        errors.add(f"adapter.negate is the strength of the negation, a number above 0, not {negate!r}")
    if negate is not None and str(spec.get("type", "lora")).lower() != "lora":
        errors.add("adapter.negate works on LoRA, whose delta changes sign with lora_B")
    for part in (lambda: from_recipe(recipe, str(out)), lambda: peft_config(spec)):
        try:
            made = part()
            config, adapter = (made, adapter) if isinstance(made, UnlearnConfig) else (config, made)
        except UserError as e:
            errors.add(str(e))
    errors.raise_if_any(f"recipe {recipe.get('name', '')}".strip())
    assert config is not None
    bundle = load_data(recipe.get("data"), data)
    require_sets(config, bundle)
    named = base or recipe.get("base")
    path = resolve_base(recipe.get("base"), override=base)
    _check_layers(config, path)
    return Run(dict(recipe), config, adapter, bundle, str(named), path, None if negate is None else float(negate))


def _check_layers(config: UnlearnConfig, base_dir: Path) -> None:
    """Refuse block numbers that the base does not have (module names are looked up once the model is there)."""
    from transformers import AutoConfig

    numbers = [(t.objective.name, k) for t in config.term_list for k in t.layers if isinstance(k, int)]
    if not numbers:
        return
    n = AutoConfig.from_pretrained(str(base_dir)).get_text_config().num_hidden_layers
    errors = Errors()
    for name, k in numbers:
        if not -n <= k < n:
            errors.add(f"{name}: layer {k} does not exist: the base has blocks 0 to {n - 1}")
    errors.raise_if_any("terms")


def load_data(spec: Any, override: str | None = None) -> ForgetRetain:
    """The bundle of a recipe's ``data`` part, or of --data; a published recipe knows its files by hash alone, and what is given
    is checked against that."""
    options = {k: spec[k] for k in DATA_OPTIONS if isinstance(spec, Mapping) and k in spec}
    sets = {k: v for k, v in spec.items() if k not in DATA_OPTIONS} if isinstance(spec, Mapping) else spec
    if isinstance(sets, Mapping) and "bundle" in sets:  # {bundle: embedded:people, per_anchor: 2}: all sets by one name
        if len(sets) > 1:
            raise UserError(
                f"data: bundle names all sets at once; {', '.join(k for k in sets if k != 'bundle')} beside it is one too many"
            )
        sets = sets["bundle"]
    template = options.get("template", "qa")
    hashed = {k: v for k, v in sets.items() if str(v).startswith("sha256:")} if isinstance(sets, Mapping) else {}
    if override is None:
        if hashed:
            raise UserError(
                f"the recipe knows its {', '.join(hashed)} set by hash alone; say where the files are with --data FOLDER"
            )
        if not sets:
            raise UserError("no data are named; give data in the recipe or --data (a folder, or embedded:people)")
        return ForgetRetain.load(sets, template=template)
    bundle = ForgetRetain.load(override, template=template)
    for name, wanted in hashed.items():
        if bundle.sha256.get(name) != str(wanted).removeprefix("sha256:"):
            raise UserError(f"--data {override}: its {name} set is not the one this recipe was run on (other sha256)")
    return bundle


def train(
    recipe: Mapping[str, Any],
    out: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    resume: bool = False,
    say: Say = _say,
    callbacks: Sequence[Any] = (),
) -> AdapterFolder | None:
    """Train a recipe and write the finished adapter to `out`; checkpoints lie in ``<out>.work``.

    Returns:
        The folder as read back; None on ranks other than the first.

    Raises:
        UserError: before anything is loaded where possible; nothing already at `out` is touched then.
    """
    from transformers import set_seed

    run = prepare(recipe, out, base, data)
    check_destination(out)
    dtype = "bfloat16" if run.config.bf16 else "float32"
    model, tokenizer = load_base(run.base_dir, dtype), load_tokenizer(run.base_dir)
    generate_alternates(run, model, tokenizer)
    set_seed(run.config.seed)  # the adapter's random start
    model = get_forget_model(model, run.adapter)
    evaluation = dict(recipe.get("eval") or {})
    scorer, extra = None, list(callbacks)
    if run.config.eval_strategy != "no":
        scorer = make_score(run.data, tokenizer, suite=evaluation.get("suite", "people"), n=evaluation.get("n"))
        extra += _score_callbacks(evaluation, scorer, model)
    trainer = UnlearnTrainer(
        model, run.config, data=run.data, processing_class=tokenizer, callbacks=extra, score=scorer
    )
    quiet(trainer)
    first = trainer.is_world_process_zero()
    if first:
        say(trainer.describe())
    trainer.train(resume_from_checkpoint=resume or None)
    return save_adapter(trainer, run, out) if first else None


def generate_alternates(run: Run, model: Any, tokenizer: Any) -> None:
    """Winner answers by the base itself, where an objective wants them and the rows have none of their own."""
    for batch, kinds in alternates_of(run.config.term_list).items():
        rows = getattr(run.data, batch)
        if "generated" in kinds and not all("alternate" in r for r in rows):
            texts = [to_text(r, tokenizer, run.data.template) for r in rows]
            others = other_answers(model, tokenizer, *zip(*texts, strict=True), seed=run.config.seed)
            setattr(run.data, batch, [{**r, "alternate": a} for r, a in zip(rows, others, strict=True)])


def _score_callbacks(
    evaluation: Mapping[str, Any], scorer: Callable[[Any], Mapping[str, float]], model: Any
) -> list[Any]:
    found: list[Any] = []
    floor = float(evaluation.get("retain_floor", 0.95))
    if evaluation.get("keep_best"):
        with model.disable_adapter():
            at_start = dict(scorer(model))
        found.append(ForgetAtFloor(at_start, floor))
    if evaluation.get("stop_below") is not None:
        found.append(StopOn(forget_below=float(evaluation["stop_below"])))
    return found


def quiet(trainer: UnlearnTrainer) -> None:
    """Take off the Trainer's own printing to standard output, which is for results."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm and trainer.is_world_process_zero():
        from .progress import TrainingBar

        trainer.add_callback(TrainingBar())


def save_adapter(trainer: UnlearnTrainer, run: Run, out: str | Path) -> AdapterFolder:
    """Write the trained adapter of `trainer` as a folder (design.md 4)."""
    model, config = trainer.bare, trainer.config
    model.eval()
    if run.negate is not None:
        negate(model, run.negate)
    modules = targeted_names(model, trainer.trained_adapter)
    manifest = Manifest(
        base=base_reference(
            run.base, run.base_dir, digest_checkpoint(run.base_dir), digest_targeted(run.base_dir, modules)
        ),
        method=describe_method(config, run, trainer),
        data={
            name: {**{k: v for k, v in about.items() if v is not None}, "format": layout_of(run.data.sets()[name][0])}
            for name, about in run.data.describe().items()
        },
        reference=config.reference,
        effective_batch={
            "per_device": config.train_batch_size,
            "accumulation": config.gradient_accumulation_steps,
            "processes": config.world_size,
            "rows": config.train_batch_size * config.gradient_accumulation_steps * config.world_size,
        },
        seeds={"seed": config.seed},
        versions=versions(),
        probes=probes(model, trainer.processing_class),
        targets=adapted(model),
        name=str(run.recipe.get("name", "")),
        description=str(run.recipe.get("description", "")),
    )
    return write_adapter(
        out, model, manifest, run.recipe, tokenizer=trainer.processing_class, adapter_name=trainer.trained_adapter
    )


@torch.no_grad()
def negate(model: Any, strength: float) -> None:
    """Multiply the adapter's delta by minus `strength`, exactly: B changes, A stays. Plain PEFT then runs it at scale 1."""
    for n, p in model.named_parameters():
        if "lora_B" in n or "lora_embedding_B" in n:
            p.mul_(-strength)


def describe_method(config: UnlearnConfig, run: Run, trainer: UnlearnTrainer) -> dict[str, Any]:
    """Every hyper-parameter with its default filled in."""
    terms: dict[str, Any] = {}
    for t in config.term_list:
        terms.setdefault(t.gradient, {})[t.objective.name] = {**t.hyper, "weight": t.weight, "batch": t.batch}
    parts = {
        "rule": (config.rule_method, {"scope": config.scope}),
        "smoothing": (config.smoothing_method, {"space": config.smoothing_space}),
        "step_size": (config.step_size_method, {}),
        "averaging": (config.averaging_method, {}),
    }
    return {
        "terms": terms,
        **{kind: {m[0].name: {**m[1], **more}} if m else None for kind, (m, more) in parts.items()},
        "peft_type": getattr(run.adapter.peft_type, "value", str(run.adapter.peft_type)),
        "negate": run.negate,
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


def versions() -> dict[str, str]:
    """Versions of the packages that decide the result."""
    out = {}
    for package in ("peft-unlearn", "torch", "transformers", "peft", "accelerate", "safetensors"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "source"
    return out


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(
    folders: Sequence[str | Path],
    *,
    base: str | None = None,
    data: str | None = None,
    suite: str | None = None,
    n: int | None = None,
    progress: Progress | None = None,
    write: bool = True,
) -> Report:
    """Score base, adapters and, where there is one, the retain-only twin on one suite; one loaded base, adapters swapped in place.

    With one folder the result is also written into it as eval.json.
    """
    found = [read_adapter(f) for f in folders]
    manifest = found[0].manifest
    names = _subject_names(found)
    spec = data or _data_of(manifest)
    bundle = load_data(found[0].recipe.get("data"), data) if data or not _data_of(manifest) else ForgetRetain.load(spec)
    check_data(bundle, manifest)
    stack = ForgetModel.from_pretrained(base, dict(zip(names, [f.path for f in found], strict=True)))
    subjects: dict[str, Any] = on_one_model(stack.model, {"base": None, **_as_subjects(names)})
    subjects["retain_only"] = _twin(manifest.base.ref)
    report = score(
        subjects,
        suite or str((found[0].recipe.get("eval") or {}).get("suite") or "people"),
        bundle,
        stack.tokenizer,
        progress=progress,
        n=n,
        adapter_id=manifest.adapter_id if len(found) == 1 else None,
        base=manifest.base.ref,
    )
    if write and len(found) == 1 and n is None:
        update_eval(found[0].path, dict(report))
    return report


def _subject_names(found: Sequence[AdapterFolder]) -> list[str]:
    if len(found) == 1:
        return ["adapter"]
    names = [f.path.resolve().name for f in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(
            f"several adapter folders are called {', '.join(twice)}; subjects are told apart by folder name"
        )
    return names


def _as_subjects(names: Sequence[str]) -> dict[str, str]:
    return {"adapter": "adapter"} if list(names) == ["adapter"] else {f"adapter:{n}": n for n in names}


def _data_of(manifest: Manifest) -> str | None:
    """The embedded bundle that all of a manifest's sets came from."""
    refs = {str(about.get("ref")) for about in manifest.data.values()}
    return next(iter(refs)) if len(refs) == 1 and embedded.is_embedded(next(iter(refs))) else None


def check_data(bundle: ForgetRetain, manifest: Manifest) -> None:
    """Refuse a bundle whose forget set is not the one the adapter was trained to forget."""
    wanted = manifest.data.get("forget", {}).get("sha256")
    if wanted and bundle.sha256["forget"] != wanted:
        raise UserError(
            "data: this forget set is not the one the adapter was trained on (sha256 "
            f"{bundle.sha256['forget'][:12]}, the manifest says {wanted[:12]}); give the right one with --data"
        )


def _twin(base_ref: str) -> Callable[[], Any] | None:
    """The retain-only model of an embedded base; other bases have none unless someone trained it."""
    if not embedded.is_embedded(base_ref):
        return None
    path = embedded.twin_path(embedded.parse(base_ref)[0])

    @contextmanager
    def twin() -> Iterator[Any]:
        yield load_base(path)

    return twin


# --- plan -------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What a recipe would cost. Bytes; `activations` is an estimate, the others are counts."""

    base: str
    base_parameters: int
    trainable: int
    adapted: list[str]
    rows: dict[str, int]
    tokens_longest: dict[str, int]
    steps: int
    rows_per_step: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def plan(recipe: Mapping[str, Any], out: str | Path = "out", base: str | None = None, data: str | None = None) -> Plan:
    """Trainable parameters, memory and steps of a recipe, from the base's configuration alone: no weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    run = prepare(recipe, out, base, data)
    config = AutoConfig.from_pretrained(str(run.base_dir))
    with torch.device("meta"):
        model = get_forget_model(AutoModelForCausalLM.from_config(config), run.adapter)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    tokenizer, c = load_tokenizer(run.base_dir), run.config
    needed = sorted({t.batch for t in c.term_list} | {c.anchor})
    rows = {s: run.data.encode(s, tokenizer, c.max_length, c.on_overflow) for s in needed}
    longest = {s: max(len(r["input_ids"]) for r in encoded) for s, encoded in rows.items()}
    per_step = c.train_batch_size * c.gradient_accumulation_steps * c.world_size
    steps = c.max_steps if c.max_steps > 0 else int(-(-len(rows[c.anchor]) // per_step) * c.num_train_epochs)
    width = 2 if c.bf16 else 4
    in_batch = {s: c.train_batch_size * (1 if s == c.anchor else c.per_anchor) * longest[s] for s in needed}
    vectors = len({t.gradient for t in c.term_list}) + 1
    return Plan(
        base=run.base,
        base_parameters=total - trainable,
        trainable=trainable,
        adapted=adapted(model),
        rows={s: len(r) for s, r in rows.items()},
        tokens_longest=longest,
        steps=steps,
        rows_per_step=per_step,
        base_bytes=(total - trainable) * width,
        adapter_bytes=4 * trainable,
        gradient_bytes=4 * trainable * vectors,
        optimizer_bytes=8 * trainable,
        activation_bytes=width * max(in_batch.values()) * activation_floats(config, c.activation_checkpointing),
    )


def activation_floats(config: Any, checkpointing: bool | None) -> int:
    """Floats that autograd keeps per token of one batch (estimate): inputs of norms, projections and the MLP of each block.

    Attention weights are not counted (sdpa keeps none); only one batch's graph lives at a time.
    """
    text = config.get_text_config()
    h, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * h
    heads = text.num_attention_heads
    kv = (getattr(text, "num_key_value_heads", None) or heads) * (getattr(text, "head_dim", None) or h // heads)
    block = int(1.1 * (6 * h + 2 * kv + 4 * inner))
    return h * layers + block if checkpointing else layers * block


__all__ = ["Plan", "Run", "evaluate", "plan", "prepare", "save_adapter", "train"]
