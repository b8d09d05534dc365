"""`UnlearnConfig`: TrainingArguments plus what unlearning needs, and how names become methods. Every mistake is collected and
shown at once, before any model is loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .. import registry
from ..data.alternates import add_alternates
from ..data.bundle import ForgetRetain
from ..errors import Errors, UserError
from ..forward import Reference
from ..gradients.terms import Term

WORK = ".work"
BATCH_OF = {"constraint": "retain"}  # gradient names that read another set's batch unless told otherwise
METHODS = ("rule", "smoothing", "step_size", "averaging")  # recipe keys that name a registered method
_DEFAULT_TERMS = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {"weight": 5.0}}}


@dataclass
class UnlearnConfig(TrainingArguments):
    """Arguments of `UnlearnTrainer`: all of TrainingArguments, and the following.

    Checkpoints and logs go to ``<output_dir>.work``; the finished forget adapter goes to `output_dir` itself.

    Args:
        terms: ``{gradient: {objective: {hyper.., weight, batch}}}``; the key is the gradient's name and, unless `batch` says
            otherwise, the set it reads.
        rule: how gradients combine: a name or ``{name: {hyper..}}``; `scope` among the hyper-parameters makes it work per "layer" or per
            "tensor" instead of on all parameters as one vector ("global").
        smoothing: of the gradient named forget: a name or ``{name: {hyper.., space: adapter | base}}``.
        step_size: automatic learning rate, e.g. ``gen``. Wants a constant schedule and a retain term.
        averaging: of the adapter, e.g. ``{wa: {start: 100}}``; the average is what training returns.
        reference: before | base | adapter:<name> | precomputed (reference log-probs of the data computed once).
        anchor: the set walked through once per epoch; `per_anchor` rows of every other set join each of its rows.
        max_length: tokens per row; `on_overflow` says what happens beyond: error | truncate | chunk.
        allow_untrained: parameter names (or parts) that may stay without a gradient.
        router_learning_rate: of the routers that an expert adapter trains; default the learning rate itself.
    """

    terms: dict[str, Any] | None = None
    rule: Any = "sum"
    smoothing: Any = None
    step_size: Any = None
    averaging: Any = None
    reference: str = "before"
    anchor: str = "forget"
    per_anchor: int = 1
    max_length: int | None = None
    on_overflow: str = "error"
    allow_untrained: list[str] = field(default_factory=list)
    router_learning_rate: float | None = None

    # TrainingArguments whose defaults would hurt here
    learning_rate: float = 1e-4
    weight_decay: float = 0.0  # decay moves factors that no gradient touches
    lr_scheduler_type: Any = "constant"
    remove_unused_columns: bool | None = False  # batches are nested
    logging_nan_inf_filter: bool = False  # the default hides NaN losses
    max_grad_norm: float | None = None  # type: ignore[assignment]  # 1; 0 with rules that set the norm themselves
    logging_steps: float = 10
    report_to: Any = "none"
    dataloader_pin_memory: bool = False  # batches are small, and without a GPU torch warns about it at every run
    label_names: list[str] | None = field(default_factory=list)

    output_dir: str = "forget-adapter"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.gradient_checkpointing:  # the name that users of every transformers release know
            self.activation_checkpointing, self.gradient_checkpointing = True, False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing_kwargs = None
        if self.activation_checkpointing:
            given: Any = self.activation_checkpointing_kwargs or {}
            self.activation_checkpointing_kwargs = {"use_reentrant": False, **given}
        errors = Errors()
        self.terms = dict(_DEFAULT_TERMS) if self.terms is None else self.terms
        self.term_list = parse_terms(self.terms, errors)
        self.rule_method, options = parse_method("rule", self.rule, errors, scope=("global", "layer", "tensor"))
        self.scope: str = options.get("scope", "global")
        self.smoothing_method, options = parse_method("smoothing", self.smoothing, errors, space=("adapter", "base"))
        self.smoothing_space: str = options.get("space", "adapter")
        self.step_size_method, _ = parse_method("step_size", self.step_size, errors)
        self.averaging_method, _ = parse_method("averaging", self.averaging, errors)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if _sets_norm(self.rule_method) else 1.0
        super().__post_init__()
        self.adapter_dir = (self.output_dir or "out").removesuffix(WORK).rstrip("/")
        self.output_dir = self.adapter_dir + WORK
        self._check(errors)
        errors.raise_if_any("configuration")

    def _check(self, errors: Errors) -> None:
        have = {t.gradient for t in self.term_list}
        if self.rule_method is not None:
            if self.rule_method[0].name == "gru" and not have & {"constraint", "retain"}:
                errors.add("rule 'gru' needs a gradient named constraint or retain, and no term has it")
            if missing := [n for n in self.rule_method[0].extra.get("requires", ()) if n not in have]:
                errors.add(
                    f"rule {self.rule_method[0].name!r} needs the gradient {', '.join(missing)}, and no term has it"
                )
        if self.smoothing_method is not None:
            method = self.smoothing_method[0]
            if "forget" not in have:
                errors.add(f"smoothing {method.name!r} works on the gradient named forget, and no term has it")
            if self.smoothing_space not in method.extra["spaces"]:
                errors.add(f"smoothing {method.name!r} works in space {', '.join(method.extra['spaces'])} only")
        if self.rule_method is not None and self.rule_method[0].name == "ngdiff":
            alone = [t for t in self.term_list if [u.gradient for u in self.term_list].count(t.gradient) == 1]
            if weighted := sorted({t.gradient for t in alone if t.weight != 1}):
                warnings.warn(
                    f"rule ngdiff scales every gradient to unit length: the weight of {', '.join(weighted)} means nothing",
                    stacklevel=3,
                )
        if self.step_size_method is not None:
            if len(set(self.step_size_method[1]["probes"])) < 3:
                errors.add("step_size: probes need at least three different multiples of the learning rate")
            if not self.learning_rate > 0:
                errors.add("step_size starts from the learning rate, which must be above 0")
            if "retain" not in have:
                errors.add("step_size fits the retain loss, and no term is named retain")
            if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) != "constant" or self.warmup_steps:
                errors.add(
                    "step_size sets the learning rate itself: lr_scheduler_type must be constant, warmup_steps 0"
                )
        if self.averaging_method is not None and self.load_best_model_at_end:
            errors.add("averaging and keep_best (load_best_model_at_end) both replace the last iterate; choose one")
        if self.averaging_method is not None and 0 < self.max_steps < self.averaging_method[1].get("start", 0):
            errors.add(
                f"averaging {self.averaging_method[0].name!r} starts at step {self.averaging_method[1]['start']}, and the run "
                f"ends at step {self.max_steps}: nothing would be averaged"
            )
        for batch, kinds in alternates_of(self.term_list).items():
            if len(kinds) > 1:
                errors.add(f"terms: the {batch} batch would need several winner answers ({', '.join(sorted(kinds))})")
            if self.on_overflow == "chunk":
                errors.add(
                    "on_overflow=chunk cuts rows apart, and winner answers need whole ones; use truncate or error"
                )
        check_reference(self.reference, self.term_list, errors)
        for name, allowed in (("anchor", ("forget", "retain")), ("on_overflow", ("error", "truncate", "chunk"))):
            if getattr(self, name) not in allowed:
                errors.add(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if self.per_anchor < 1:
            errors.add(f"per_anchor={self.per_anchor} must be at least 1")
        if self.fp16:
            errors.add("fp16 is refused: its loss scaling changes what gradient rules see; use bf16")
        if self.deepspeed:
            errors.add("deepspeed is not supported yet: its engine owns the gradients that unlearning rewrites")
        if self.fsdp:
            errors.add("fsdp is not supported yet; use torchrun with plain data parallelism, the adapter is small")
        if self.torch_compile:
            errors.add("torch_compile is not supported: hooks on the model's head break the graph at every step")
        if self.label_smoothing_factor:
            errors.add("label_smoothing_factor has no meaning here: terms are the losses")
        check_numbers(self, errors)
        given: Any = self.activation_checkpointing_kwargs or {}
        if given.get("use_reentrant"):
            errors.add("gradient_checkpointing with use_reentrant=True hides named gradients; leave it at False")


def parse_terms(spec: Mapping[str, Any], errors: Errors) -> list[Term]:
    """Terms of ``{gradient: {objective: {hyper.., weight, batch}}}``; complaints go to `errors`."""
    out = []
    if not isinstance(spec, Mapping) or not spec:
        errors.add("terms: give at least one, e.g. {forget: {npo: {beta: 0.1}}, retain: {nll: {}}}")
        return out
    for gradient, objectives in spec.items():
        if isinstance(objectives, str):
            objectives = {objectives: {}}
        if not isinstance(objectives, Mapping) or not objectives:
            errors.add(f"terms.{gradient}: name an objective, e.g. {{npo: {{beta: 0.1}}}}")
            continue
        for name, hyper in objectives.items():
            if not isinstance(hyper, (Mapping, type(None))):
                errors.add(
                    f"terms.{gradient}.{name}: hyper-parameters are a mapping, e.g. {{weight: 1}}; got {hyper!r}"
                )
                continue
            hyper = dict(hyper or {})
            weight, batch = hyper.pop("weight", 1.0), hyper.pop("batch", BATCH_OF.get(gradient, gradient))
            if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
                errors.add(f"terms.{gradient}.{name}: weight must be a finite number, not {weight!r}")
                continue
            if batch not in ("forget", "retain"):
                errors.add(f"terms.{gradient}.{name}: reads the set {batch!r}; say batch: forget or batch: retain")
            try:
                method = registry.get("objective", name)
            except UserError as e:
                errors.add(f"terms.{gradient}: {e}")
                continue
            wrong = method.check(hyper)
            for w in wrong:
                errors.add(f"terms.{gradient}: {w}")
            if not wrong:
                out.append(Term(gradient, batch, method, float(weight), method.resolve(hyper)))
    return out


def _sets_norm(rule: tuple[registry.Method, Mapping[str, Any]] | None) -> bool:
    """Whether a rule decides on its update's norm, so that clipping would undo it."""
    return rule is not None and (rule[0].name == "ngdiff" or (rule[0].name == "gru" and rule[1]["tau"] is not None))


def alternates_of(terms: Sequence[Term]) -> dict[str, set[str]]:
    """Batch name -> kinds of winner answers its objectives read."""
    out: dict[str, set[str]] = {}
    for t in terms:
        if kind := t.objective.extra.get("alternates"):
            out.setdefault(t.batch, set()).add(kind)
    return out


def encode_set(config: UnlearnConfig, data: ForgetRetain, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Token rows of one set, each with its winner answer as ``alternate`` where an objective reads one."""
    rows = data.encode(name, tokenizer, config.max_length, config.on_overflow)
    for kind in alternates_of(config.term_list).get(name, ()):
        winners = add_alternates(getattr(data, name), kind, config.seed, name)
        answers = data.encode(name, tokenizer, config.max_length, config.on_overflow, rows=winners)
        rows = [{**row, "alternate": a} for row, a in zip(rows, answers, strict=True)]
    return rows


def require_sets(config: UnlearnConfig, data: ForgetRetain) -> None:
    """Refuse data that lack a set, or winner answers, that the terms read.

    Raises:
        UserError: everything missing, at once.
    """
    errors = Errors()
    needed = {t.batch for t in config.term_list} | {config.anchor}
    if missing := sorted(n for n in needed if not getattr(data, n)):
        errors.add(f"the terms read the {', '.join(missing)} set, and the data have none")
    for batch, kinds in alternates_of(config.term_list).items():
        for kind in kinds - {"generated"}:  # those are made once the model is there
            try:
                add_alternates(getattr(data, batch) or [], kind, config.seed, batch)
            except UserError as e:
                names = ", ".join(
                    t.objective.name for t in config.term_list if t.objective.extra.get("alternates") == kind
                )
                errors.add(f"{names}: {e}")
    errors.raise_if_any("data")


def parse_method(
    kind: str, spec: Any, errors: Errors, **options: tuple[str, ...]
) -> tuple[tuple[registry.Method, dict[str, Any]] | None, dict[str, Any]]:
    """((method, hyper-parameters) or None, engine options) of ``name`` or ``{name: {hyper..}}``; complaints go to `errors`.

    options: names among the hyper-parameters that are the engine's business, with their choices.
    """
    if spec is None:
        return None, {}
    if isinstance(spec, str):
        spec = {spec: {}}
    if not isinstance(spec, Mapping) or len(spec) != 1:
        errors.add(f"{kind}: give one name, or {{name: {{hyper-parameters}}}}; got {spec!r}")
        return None, {}
    ((name, hyper),) = spec.items()
    if not isinstance(hyper, (Mapping, type(None))):
        errors.add(f"{kind} {name!r}: hyper-parameters are a mapping, e.g. {{{name}: {{key: value}}}}; got {hyper!r}")
        return None, {}
    try:
        method = registry.get(kind, name)
    except UserError as e:
        errors.add(str(e))
        return None, {}
    hyper = dict(hyper or {})
    mine = {k: hyper.pop(k) for k in options if k in hyper}
    for k, v in mine.items():
        if v not in options[k]:
            errors.add(f"{kind} {method.name!r}: {k}={v!r} is not one of {', '.join(options[k])}")
            return None, {}
    wrong = method.check(hyper)
    for w in wrong:
        errors.add(w)
    return (None if wrong else (method, method.resolve(hyper))), mine


def check_reference(mode: str, terms: list[Term], errors: Errors) -> None:
    """Complain about an unknown reference mode, or one that cannot give what the terms need."""
    if not isinstance(mode, str):
        errors.add(f"reference must be text, not {mode!r}")
    elif mode == "precomputed":
        more = sorted(
            {t.objective.name for t in terms if {"ref_logits", "ref_hidden", "ref_router"} & set(t.objective.needs)}
        )
        if more:
            errors.add(
                f"reference: precomputed holds log-probabilities of targets only, and {', '.join(more)} need more of the "
                "reference model; use reference: before"
            )
    elif mode not in ("before", "base") and not (mode.startswith("adapter:") and len(mode) > len("adapter:")):
        errors.add(f"reference={mode!r} is not one of before, base, adapter:<name>, precomputed")


_AT_LEAST = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_length": 2, "seed": 0,
}  # fmt: skip


def check_numbers(config: UnlearnConfig, errors: Errors) -> None:
    """Complain about numbers that would only fail, or do nothing, far inside a run."""
    for name, low in _AT_LEAST.items():
        value = getattr(config, name)
        if isinstance(value, (int, float)) and not low <= value < math.inf:
            errors.add(f"{name}={value!r} must be a finite number and at least {low}")
    if isinstance(config.seed, int) and config.seed >= 2**32:
        errors.add(f"seed={config.seed} must be below 2**32")


def reference_of(mode: str, trained: str = "default") -> Reference:
    """The live reference of a mode (precomputed values were taken from `before`)."""
    return Reference("before" if mode == "precomputed" else mode, trained)
