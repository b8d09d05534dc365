"""`UnlearnConfig`: TrainingArguments plus what unlearning needs. Every mistake is collected and shown at once, before any model is
loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import trainer_log_levels

from ..data.alternates import add_alternates
from ..data.bundle import ForgetRetain
from ..errors import Errors, UserError, nearest
from ..folder.schema import is_number
from ..forward import Reference
from ..gradients.parse import SCOPES, SPACES, parse_method, parse_terms
from ..gradients.terms import alternates_of
from ..gradients.window import Window
from .guard import RISE

WORK = ".work"
METHODS = ("rule", "smoothing", "step_size", "averaging")  # recipe keys that name a registered method
_DEFAULT_TERMS = {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {"weight": 5.0}}}
_AT_LEAST = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_length": 2, "seed": 0, "data_seed": 0, "max_steps": -1, "num_train_epochs": 0,
    "adam_epsilon": 0, "router_learning_rate": 0, "dataloader_num_workers": 0, "save_total_limit": 1, "logging_steps": 0,
    "save_steps": 0, "eval_steps": 0,
}  # fmt: skip
_TYPED = {
    "lr_scheduler_kwargs": (dict, type(None)), "accelerator_config": (dict, type(None)), "allow_untrained": (list, tuple),
    "activation_checkpointing_kwargs": (dict, type(None)), "gradient_checkpointing_kwargs": (dict, type(None)),
    "label_names": (list, type(None)),
}  # fmt: skip
"""What transformers would take for the name of a JSON file, or fail on only inside a run."""
_REFUSED = {
    "fp16": "fp16 is refused: its loss scaling changes what gradient rules see; use bf16",
    "deepspeed": "deepspeed is not supported: its engine owns the gradients, which rules and smoothing rewrite; a base too large for one "
    "device is sharded by torch's fully_shard (docs/your-model.md)",
    "fsdp": "fsdp by settings is not supported yet: accelerate would shard and save the model by itself. Shard it with torch's "
    "fully_shard and give it to UnlearnTrainer (docs/your-model.md), or use torchrun with plain data parallelism, the adapter is small",
    "torch_compile": "torch_compile is not supported: hooks on the model's head break the graph at every step",
    "use_liger_kernel": "use_liger_kernel is not supported: its kernels hide the hidden states that terms read",
    "parallelism_config": "parallelism_config is not supported; use torchrun with plain data parallelism, the adapter is small",
    "remove_unused_columns": "remove_unused_columns is refused: batches are nested, and nothing of them would be left",
    "label_smoothing_factor": "label_smoothing_factor has no meaning here: terms are the losses",
}
_LAUNCHED = {
    "deepspeed": "ACCELERATE_USE_DEEPSPEED",
    "fsdp": "ACCELERATE_USE_FSDP",
}  # variables that accelerate starts processes with
_PUBLISHES = "push_to_hub", "hub_"  # what the names of such arguments begin with
_REPORTS = {"none", "tensorboard"}  # to files of the run; all others send it to somebody
_HAS_ACTIVATION_CHECKPOINTING = hasattr(TrainingArguments, "activation_checkpointing")  # transformers 5.23


@dataclass
class UnlearnConfig(TrainingArguments):
    """Arguments of `UnlearnTrainer`: all of TrainingArguments, and the following.

    The finished forget adapter goes to `output_dir`; checkpoints and logs go to `work_dir`, which is ``<output_dir>.work``.

    Args:
        terms: ``{gradient: {objective: {hyper.., weight, batch}}}``; the key is the gradient's name and, unless `batch` says
            otherwise, the set it reads.
        rule: how gradients combine: a name or ``{name: {hyper..}}``; `scope` among the hyper-parameters makes it work per "layer" or per
            "tensor" instead of on all parameters as one vector ("global").
        smoothing: of the gradient named forget: a name or ``{name: {hyper.., space: adapter | base}}``.
        step_size: automatic learning rate, e.g. ``gen``. Wants a constant schedule and a retain term.
        averaging: of the adapter, e.g. ``{wa: {start: 100}}``; the average is what training returns.
        reference: before | base | adapter:<name> | precomputed (what the reference says of the data, computed once).
        anchor: the set walked through once per epoch; `per_anchor` rows of every other set join each of its rows: one number, or
            ``{set: number}``, where 0.5 is one row with every second anchor row.
        max_length: tokens per row; `on_overflow` says what happens beyond: error | truncate | chunk.
        allow_untrained: parameter names (or parts) that may stay without a gradient.
        router_learning_rate: of the routers that an expert adapter trains; default the learning rate itself.
        retain_guard: nats per token that the loss of a kept set may rise by before the run is stopped (`RetainGuard`).
    """

    terms: dict[str, Any] | None = None
    rule: Any = "sum"
    smoothing: Any = None
    step_size: Any = None
    averaging: Any = None
    reference: str = "before"
    anchor: str = "forget"
    per_anchor: Any = 1
    max_length: int | None = None
    on_overflow: str = "error"
    allow_untrained: list[str] = field(default_factory=list)
    router_learning_rate: float | None = None
    retain_guard: float = RISE

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

    # As transformers 5.23 names them; before, it knows only gradient_checkpointing, which is accepted everywhere
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None

    output_dir: str = "forget-adapter"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        errors = Errors()
        self._check_types(errors)
        if self.gradient_checkpointing:  # the name that users of every transformers release know
            self.activation_checkpointing, self.gradient_checkpointing = True, False
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
            self.gradient_checkpointing_kwargs = None
        if self.activation_checkpointing:
            given: Any = self.activation_checkpointing_kwargs or {}
            self.activation_checkpointing_kwargs = {"use_reentrant": False, **given}
        if not _HAS_ACTIVATION_CHECKPOINTING:
            self.gradient_checkpointing = bool(self.activation_checkpointing)
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self.terms = dict(_DEFAULT_TERMS) if self.terms is None else self.terms
        self.term_list = parse_terms(self.terms, errors)
        self.rule_method, options = parse_method("rule", self.rule, errors, scope=SCOPES)
        self.scope: str = options.get("scope", "global")
        self.smoothing_method, options = parse_method("smoothing", self.smoothing, errors, space=SPACES)
        self.smoothing_space: str = options.get("space", "adapter")
        self.step_size_method, _ = parse_method("step_size", self.step_size, errors)
        self.averaging_method, _ = parse_method("averaging", self.averaging, errors)
        if self.max_grad_norm is None:
            self.max_grad_norm = 0.0 if self._rule_sets_norm() else 1.0
        reports = self.report_to = "none" if self.report_to is None else self.report_to
        if not torch.accelerator.is_available():
            self.use_cpu = True  # as there is nothing else; several processes then find each other through gloo
        whole = True
        try:
            super().__post_init__()
        except Exception as e:  # transformers' own validation, whose classes of errors are many
            errors.add(f"train: {next(iter(str(e).strip().splitlines()), type(e).__name__)}")
            whole = False
        self.work_dir: str = self.output_dir.rstrip("/") + WORK
        have = {t.gradient for t in self.term_list}
        self._check_rule(have, errors)
        self._check_smoothing(have, errors)
        self._check_step_size(have, errors)
        self._check_averaging(errors)
        self._check_alternates(errors)
        self._check_reference(errors)
        self._check_arguments(errors)
        self._check_publishing(reports, errors)
        if whole:
            self._check_world(errors)
            if not any(
                name in m for m in errors.messages for name in ("learning_rate", "weight_decay", "adam_epsilon")
            ):
                self._try_optimizer(errors)
        errors.raise_if_any("configuration")

    @property
    def sets(self) -> list[str]:
        """The sets of rows that the run reads."""
        return sorted({t.batch for t in self.term_list} | {self.anchor})

    @property
    def of_reference(self) -> dict[str, str]:
        """Set -> what `reference.precompute` takes of the reference for its terms: ``ref_head`` where one reads logits."""
        needs: dict[str, set[str]] = {}
        for t in self.term_list:
            needs.setdefault(t.batch, set()).update(t.objective.needs)
        heads = {b: "ref_head" for b, n in needs.items() if "ref_logits" in n}
        return {b: "ref_logp" for b, n in needs.items() if "ref_logp" in n} | heads

    @property
    def rows_per_step(self) -> int:
        """Anchor rows of one optimizer step, over all micro-batches and processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def steps_over(self, rows: int) -> int:
        """Optimizer steps of the whole run, with `rows` anchor rows in the data."""
        return self.max_steps if self.max_steps > 0 else int(-(-rows // self.rows_per_step) * self.num_train_epochs)

    def window(self, model: Any, reference: Reference, reduce: Callable[[Any], Any] | None = None) -> Window:
        """The window of a run with these settings on `model`; `reduce` sums a tensor over ranks in place."""
        assert self.rule_method is not None
        return Window(
            model, self.term_list, self.rule_method, scope=self.scope, smoothing=self.smoothing_method,
            space=self.smoothing_space, reference=reference, reduce=reduce, seed=self.seed,
        )  # fmt: skip

    def _rule_sets_norm(self) -> bool:
        if self.rule_method is None:
            return False
        flag = self.rule_method[0].extra["sets_norm"]
        return bool(flag(self.rule_method[1]) if callable(flag) else flag)

    def _check_rule(self, have: set[str], errors: Errors) -> None:
        if self.rule_method is None:
            return
        name, about = self.rule_method[0].name, self.rule_method[0].extra
        if about["requires_any"] and not have & set(about["requires_any"]):
            errors.add(f"rule {name!r} needs a gradient named {' or '.join(about['requires_any'])}, and no term has it")
        if missing := [n for n in about["requires"] if n not in have]:
            errors.add(f"rule {name!r} needs the gradient {', '.join(missing)}, and no term has it")
        gradients = [t.gradient for t in self.term_list]
        weighted = sorted({t.gradient for t in self.term_list if t.weight != 1 and gradients.count(t.gradient) == 1})
        if about["ignores_weights"] and weighted:
            text = (
                f"rule {name} scales every gradient to unit length: the weight of {', '.join(weighted)} means nothing"
            )
            warnings.warn(text, stacklevel=3)

    def _check_smoothing(self, have: set[str], errors: Errors) -> None:
        if self.smoothing_method is None:
            return
        name, spaces = self.smoothing_method[0].name, self.smoothing_method[0].extra["spaces"]
        if "forget" not in have:
            errors.add(f"smoothing {name!r} works on the gradient named forget, and no term has it")
        if self.smoothing_space not in spaces:
            errors.add(f"smoothing {name!r} works in space {', '.join(spaces)} only")

    def _check_step_size(self, have: set[str], errors: Errors) -> None:
        if self.step_size_method is None:
            return
        method, hyper = self.step_size_method
        check = method.extra["check"]
        if check is not None and (complaint := check(hyper)):
            errors.add(f"step_size: {complaint}")
        if not self.learning_rate > 0:
            errors.add("step_size starts from the learning rate, which must be above 0")
        if "retain" not in have:
            errors.add("step_size fits the retain loss, and no term is named retain")
        if str(getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)) != "constant" or self.warmup_steps:
            errors.add("step_size sets the learning rate itself: lr_scheduler_type must be constant, warmup_steps 0")

    def _check_averaging(self, errors: Errors) -> None:
        if self.averaging_method is None:
            return
        method, hyper = self.averaging_method
        if self.load_best_model_at_end:
            errors.add("averaging and keep_best (load_best_model_at_end) both replace the last iterate; choose one")
        if 0 < self.max_steps < hyper.get("start", 0):
            errors.add(
                f"averaging {method.name!r} starts at step {hyper['start']}, and the run ends at step {self.max_steps}: "
                "nothing would be averaged"
            )

    def _check_alternates(self, errors: Errors) -> None:
        for batch, kinds in alternates_of(self.term_list).items():
            if len(kinds) > 1:
                errors.add(f"terms: the {batch} batch would need several winner answers ({', '.join(sorted(kinds))})")
            if self.on_overflow == "chunk":
                errors.add(
                    "on_overflow=chunk cuts rows apart, and winner answers need whole ones; use truncate or error"
                )

    def _check_reference(self, errors: Errors) -> None:
        mode, more_than_logp = self.reference, {"ref_hidden", "ref_router"}
        if not isinstance(mode, str):
            errors.add(f"reference must be text, not {mode!r}")
        elif mode == "precomputed":
            more = sorted({t.objective.name for t in self.term_list if more_than_logp & set(t.objective.needs)})
            if more:
                errors.add(
                    f"reference: precomputed holds what the reference says at the targets, and {', '.join(more)} need its inner layers; "
                    "use reference: before"
                )
        elif mode not in ("before", "base") and not (mode.startswith("adapter:") and len(mode) > len("adapter:")):
            errors.add(f"reference={mode!r} is not one of before, base, adapter:<name>, precomputed")

    def _check_arguments(self, errors: Errors) -> None:
        """Values that are refused, and numbers that would only fail, or do nothing, far inside a run."""
        for name, allowed in (("anchor", ("forget", "retain")), ("on_overflow", ("error", "truncate", "chunk"))):
            if getattr(self, name) not in allowed:
                errors.add(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        self._check_shares(errors)
        if self.torch_compile:  # also asked for by naming a backend
            errors.add(_REFUSED["torch_compile"])
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not low <= value < 2**53:
                errors.add(f"{name}={value!r} must be a finite number and at least {low}")
        if self.max_steps == 0 or (self.max_steps < 0 and not self.num_train_epochs > 0):
            errors.add("the run has no steps: max_steps must be at least 1, or -1 with num_train_epochs above 0")
        if str(getattr(self.save_strategy, "value", self.save_strategy)) == "best":
            errors.add(
                "save_strategy=best saves by a metric that a run has not; keep the best checkpoint with eval.keep_best"
            )
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            errors.add("dataloader_persistent_workers needs dataloader_num_workers above 0")
        if self.log_level not in trainer_log_levels or self.log_level_replica not in trainer_log_levels:
            errors.add(f"log_level={self.log_level!r} is not one of {', '.join(trainer_log_levels)}")
        if isinstance(self.seed, int) and self.seed >= 2**32:
            errors.add(f"seed={self.seed} must be below 2**32")
        if self.neftune_noise_alpha:
            errors.add(
                "neftune_noise_alpha is refused: its noise falls on the pass of the reference model too, and what is compared is then "
                "two noises; smoothing (sam, rs) is what makes forgetting robust"
            )
        given: Any = self.activation_checkpointing_kwargs or {}
        if given.get("use_reentrant"):
            errors.add("gradient_checkpointing with use_reentrant=True hides named gradients; leave it at False")

    def _check_types(self, errors: Errors) -> None:
        """What transformers must not see: each is named, and set to its default so that the rest can be checked too."""
        for key, name in _LAUNCHED.items():
            if os.environ.get(name, "").lower() in ("true", "1", "yes") and not getattr(self, key, None):
                raise UserError(
                    f"configuration: {name} is set, as `accelerate launch` does by its own configuration: {_REFUSED[key]}"
                )
        for f in fields(self):
            value, kinds = getattr(self, f.name, None), _TYPED.get(f.name)
            if f.name in _REFUSED and value:
                errors.add(_REFUSED[f.name])
            elif kinds and not isinstance(value, kinds):
                errors.add(f"{f.name} must be {'a mapping' if dict in kinds else 'a list'}, not {value!r}")
            else:
                continue
            setattr(self, f.name, f.default if f.default_factory is MISSING else f.default_factory())

    def _try_optimizer(self, errors: Errors) -> None:
        """Build optimizer and schedule of one number: both have demands of their own, on libraries and on values."""
        weight = torch.nn.Parameter(torch.zeros(1))
        name = str(getattr(self.optim, "value", self.optim))
        schedule: Any = self.lr_scheduler_type
        given: Any = self.lr_scheduler_kwargs
        try:
            cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self)
            optimizer = cls([weight], **kwargs)
        except Exception as e:
            errors.add(
                f"train: the optimizer {name} cannot be made: {next(iter(str(e).splitlines()), type(e).__name__)}"
            )
            return
        try:
            get_scheduler(schedule, optimizer, 0, 10, scheduler_specific_kwargs=given)
        except Exception as e:
            what = getattr(schedule, "value", schedule)
            errors.add(
                f"train: the schedule {what} cannot be made: {next(iter(str(e).splitlines()), type(e).__name__)}"
            )

    def _check_world(self, errors: Errors) -> None:
        if (started := int(os.environ.get("WORLD_SIZE", 1))) != self.world_size:
            errors.add(
                f"{started} processes were started and this one trains as {self.world_size}: each would train alone and write into one "
                "folder; start them with torchrun or accelerate launch so that they form one group"
            )

    def _check_shares(self, errors: Errors) -> None:
        given = self.per_anchor
        for name, share in given.items() if isinstance(given, Mapping) else [(None, given)]:
            if not is_number(share) or not 0 < share < math.inf or (name is None and share != int(share)):
                errors.add(f"per_anchor must be a whole number, at least 1, or {{set: number of rows}}, not {given!r}")
            elif name is not None and name not in self.sets:
                errors.add(f"per_anchor: no term reads the set {name!r}.{nearest(str(name), self.sets)}")
            elif name is not None and share * self.rows_per_step < 1:
                errors.add(f"per_anchor: {name} {share:g} of {self.rows_per_step} rows is no row in a step")

    def _check_publishing(self, reports: Any, errors: Errors) -> None:
        """Nothing of a run leaves the machine: its checkpoints hold pickles, paths and log-probabilities of the forget set."""
        given = [f.name for f in fields(self) if f.name.startswith(_PUBLISHES) and getattr(self, f.name) != f.default]
        if given:
            errors.add(
                f"{', '.join(given)}: refused: a run would publish its checkpoints, which hold pickles, paths of this machine and "
                "what was cached of the forget set, in a public repository; publish the finished adapter with peft-unlearn push"
            )
        if foreign := [
            str(r) for r in (reports if isinstance(reports, list | tuple) else [reports]) if str(r) not in _REPORTS
        ]:
            errors.add(
                f"report_to: {', '.join(foreign)}: refused: it sends the configuration and the losses to a service; tensorboard writes "
                "files, and the finished adapter is published with peft-unlearn push"
            )


def encode_set(config: UnlearnConfig, data: ForgetRetain, name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Token rows of one set, each with its winner answer as ``alternate`` where an objective reads one."""
    rows = data.encode(name, tokenizer, config.max_length, config.on_overflow)
    for kind in alternates_of(config.term_list).get(name, ()):
        winners = add_alternates(data.rows(name) or [], kind, config.seed, name)
        answers = data.encode(name, tokenizer, config.max_length, config.on_overflow, rows=winners)
        rows = [{**row, "alternate": a} for row, a in zip(rows, answers, strict=True)]
    return rows


def require_sets(config: UnlearnConfig, data: ForgetRetain) -> None:
    """Refuse data that lack a set, or winner answers, that the terms read.

    Raises:
        UserError: everything missing, at once.
    """
    errors = Errors()
    for name in (n for n in config.sets if not data.rows(n)):
        own = any(t.batch == t.gradient == name for t in config.term_list)
        hint = f" (terms.{name} reads the set of its own name unless it says batch)" if own and name != "retain" else ""
        errors.add(f"the terms read the {name} set, and the data have none{hint}.{nearest(name, data.names())}")
    for batch, kinds in alternates_of(config.term_list).items():
        for kind in kinds - {"generated"}:  # those are made once the model is there
            try:
                add_alternates(data.rows(batch) or [], kind, config.seed, batch)
            except UserError as e:
                names = ", ".join(
                    t.objective.name for t in config.term_list if t.objective.extra.get("alternates") == kind
                )
                errors.add(f"{names}: {e}")
    errors.raise_if_any("data")
