"""`UnlearnTrainer`: transformers' Trainer with the window contract.

`training_step` stores micro-batches and returns 0 until the last one of an optimizer step, then sweeps them all, combines the named
gradients and writes ``.grad``: clipping, optimizer, schedule, logging and checkpoints stay the Trainer's own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..data.bundle import ForgetRetain
from ..data.collate import PairedRows, StreamSampler, collate, padding_id
from ..errors import Diverged, Errors, UserError
from ..forward import Reference, check_rows, dropouts
from ..gradients.step_size import peeked_update
from ..gradients.terms import with_experts
from ..gradients.vector import Space, Vec, is_sharded
from ..gradients.window import Window
from ..head import reads_images
from ..tuners.names import belongs
from ..tuners.peft_type import PREFIX
from .adapt import describe, get_forget_model, refuse_base
from .checkpoints import (
    STATE,
    best_beside,
    fingerprint,
    last_checkpoint,
    load_adapter,
    read_state,
    stopped,
    write_state,
)
from .config import UnlearnConfig, encode_set, require_sets
from .guard import RetainGuard, what_helps
from .images import as_served, check_images, check_kind, of_images, refuse_tokens_only, row_of
from .mask import Refresh, UpdateMask
from .reference import fixed_tensors, precompute, raw_bytes, stack_digest
from .untrained import Untrained


class UnlearnTrainer(Trainer):
    """Trains a forget adapter.

    Args:
        model: a transformers causal LM, or a PeftModel with the adapter to be trained active and trainable.
        args: `UnlearnConfig`; it is left as it is.
        data: `ForgetRetain`, or anything `ForgetRetain.load` takes.
        processing_class: the tokenizer.
        peft_config: adapter to add to a plain model (default: LoRA r 16 on all linear layers).
        score: ``model -> {"forget/..": value}``, called by `evaluate` while training (see `evaluation.make_score`).

    Raises:
        UserError: configuration, data and model do not fit together. Nothing has been trained or written then.
    """

    def __init__(
        self,
        model: nn.Module,
        args: UnlearnConfig,
        *,
        data: Any,
        processing_class: Any,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        score: Callable[[nn.Module], Mapping[str, float]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.data = ForgetRetain.load(data)
        require_sets(args, self.data)
        if args.eval_strategy != "no" and score is None:
            raise UserError("eval_strategy is set and there is no score: pass score=make_score(data, tokenizer)")
        if args.n_gpu > 1:
            raise UserError("several GPUs in one process are not used; start one process per GPU with torchrun")
        refuse_base(model)
        check_kind(model, self.data)
        if not hasattr(model, "peft_config"):
            model = get_forget_model(model, of_images(peft_config, self.data))
        elif peft_config is not None:
            raise UserError("the model already has an adapter and a peft_config was given too; pass one of them")
        _refuse_dropout(model, args)
        self.pad_id = padding_id(processing_class)
        sets = {name: encode_set(args, self.data, name, processing_class) for name in args.sets}
        (check_images if reads_images(model) else check_rows)(model, sets, self.pad_id)
        self.score = score
        self.trained_adapter = _trained_adapter(model)
        self.oneshot: dict[str, Any] | None = None  # what a one-shot method did instead of training
        adapter: Any = model.peft_config[self.trained_adapter]  # type: ignore[index]
        self.config = copy.copy(args)
        self.config.term_list = with_experts(args.term_list, getattr(adapter, "experts", None))
        self.reference = Reference(args.reference, self.trained_adapter)
        self.rows = PairedRows(sets, args.anchor, args.per_anchor, args.seed)
        if reads_images(model):
            refuse_tokens_only(self.config)
        if any(map(is_sharded, model.parameters())):
            _refuse_sharded(self.config)
            model._is_accelerate_prepared = True  # type: ignore[assignment]  # it would wrap it in DDP
        theirs = copy.copy(self.config)  # transformers writes to its output_dir, and nowhere else
        theirs.output_dir = self.config.work_dir
        super().__init__(
            model=model,
            args=theirs,
            train_dataset=self.rows,
            eval_dataset=self.rows if score is not None else None,  # never read: `evaluate` calls `score`
            data_collator=functools.partial(collate, pad_id=self.pad_id),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.window: Window | None = None
        self._pending: list[Any] = []
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._restored: dict[str, Any] | None = None
        self.average_state: dict[str, Any] = {}
        self.mask: UpdateMask | None = None
        self.add_callback(RetainGuard(self, args.retain_guard))
        if args.step_size_method is not None or args.averaging_method is not None:
            self.add_callback(_AfterStep(self))

    def use_mask(self, mask: UpdateMask) -> None:
        """Train inside `mask` from now on."""
        self.mask = mask
        self.add_callback(mask)

    @property
    def bare(self) -> Any:
        """The PEFT model itself, without what the accelerator wraps around it."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]

    def describe(self) -> str:
        """What is adapted and how long the run is, in two lines."""
        c = self.config
        sizes = ", ".join(f"{n} {len(r)}" for n, r in self.rows.sets.items())
        steps = f"{c.rows_per_step} {c.anchor} rows per step; {c.steps_over(len(self.rows))} steps"
        return f"{describe(self.bare, self.trained_adapter)}\nrows: {sizes}; {steps}"

    # --- what the Trainer is built from ----------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> StreamSampler:  # type: ignore[override]
        return StreamSampler(len(self.rows), self.config.rows_per_step)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's optimizer; routers get a group, and with it a learning rate, of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.config.router_learning_rate
        if rate is not None:
            routers = {id(p) for n, p in self.bare.named_parameters() if p.requires_grad and f"{PREFIX}router" in n}
            if not routers:
                raise UserError("router_learning_rate is set, and the adapter trains no router")
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in routers]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in routers]
                    optimizer.add_param_group({**group, "params": mine, "lr": rate})
        return optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer's estimate reads one flat batch; ours are several

    # --- the run ---------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`; ``resume_from_checkpoint=True`` takes the newest *whole* checkpoint of `config.work_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.config.work_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.config.work_dir} holds no whole checkpoint to resume from")
        self.window, self._pending, self._restored, self.average_state = None, [], None, {}
        self._sums.clear()
        self._ended = False
        if resume_from_checkpoint:
            self._resumed = resume_from_checkpoint
            self._restored = read_state(resume_from_checkpoint, self._fingerprint())
            self.average_state, self._ended = self._restored["average"], stopped(resume_from_checkpoint)
            if isinstance(self.mask, Refresh):
                self.mask.load_state_dict(self._restored["mask"])
        space = Space.trainable(self.bare)
        self._untrained = Untrained(self.bare, space, self.config.allow_untrained)
        self.take_reference()
        try:
            out = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        except _NothingLeft:
            out = self._end()
        if "averaged" in self.average_state:
            averaged = [t.to(p.device) for t, p in zip(self.average_state["averaged"], space.params, strict=True)]
            space.write(Vec(averaged))
        if isinstance(self.mask, Refresh):
            self._untrained.allowed = [*self._untrained.allowed, *self.mask.idle()]
        if self.state.global_step and not resume_from_checkpoint:
            self._untrained.after_run()
        return out

    def take_reference(self) -> None:
        """Where the reference is precomputed: into the rows with what losses read of it, from the work folder or by one pass over them."""
        if self.config.reference == "precomputed":
            precompute(
                self.bare,
                self.rows.sets,
                self.config.of_reference,
                Path(self.config.work_dir),
                reference=self.reference,
                pad_id=self.pad_id,
                write=self.is_world_process_zero(),
            )

    def _end(self) -> TrainOutput:
        """What the Trainer does after its last step, of a run that was resumed there."""
        self.is_in_train = False
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, 0.0, {})

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self._ended or self.state.global_step >= self.state.max_steps:
            raise _NothingLeft  # the Trainer resumes in the middle of an epoch, and would take one more step
        model.train()
        if reads_images(self.bare):
            as_served(self.bare, self.trained_adapter)
        if self.window is None:
            self.window = self.config.window(
                self.bare, self.reference, reduce=_all_reduce if self.args.world_size > 1 else None
            )
            if self._restored is not None:
                self.window.load_state_dict(self._restored["window"])
        self._pending.append(self._prepare_inputs(inputs))
        device = self.args.device
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=device)
        window, self._pending = self._pending, []
        self.last_window = window if self.config.step_size_method else None
        try:
            with self.accelerator.autocast():
                step = self.window.step(window)
        except Diverged as e:
            raise Diverged(f"step {self.state.global_step + 1}: {e}; {what_helps(self)}") from e
        except UserError as e:
            raise UserError(f"step {self.state.global_step + 1}: {e}") from e
        if self.state.global_step == 0:
            self._untrained.after_first_step(step.moved)
        for p, t in zip(self.window.space.params, step.update.tensors, strict=True):
            p.grad = t.to(p.dtype)
        if self.mask is not None:
            self.mask.on_gradient()
        self.last_step = step
        for key, value in step.logs().items():
            self._sums[key].append(value)
        return torch.tensor(sum(step.values.values()), device=device, dtype=torch.float32)

    # --- logs, evaluation, checkpoints -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log: add what the steps since the last one found, averaged
            logs |= {k: sum(v) / len(v) for k, v in self._sums.items()}
            self._sums.clear()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of the model by `score`, under ``eval_<set>/<metric>``."""
        if self.score is None:
            raise UserError("there is no score to evaluate with: pass score=make_score(data, tokenizer)")
        metrics = {f"{metric_key_prefix}_{k}": float(v) for k, v in self.score(self.bare).items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.log(dict(metrics))
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / STATE).unlink(missing_ok=True)  # an earlier run's: what is written over it is not whole yet
        # Older checkpoints go only once this one is whole; else a kill in between would leave none.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # every rank writes its own random state
        if self.args.should_save:
            window = self.window.state_dict() if self.window else {}
            state = {"window": window, "average": self.average_state, "run": self._fingerprint()}
            if isinstance(self.mask, Refresh):
                state["mask"] = self.mask.state_dict()
            write_state(folder, state)
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.bare, resume_from_checkpoint, self.trained_adapter)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        if best := best_beside(Path(self._resumed)):  # the Trainer forgets it where the folder was moved
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_adapter(self.bare, self.state.best_model_checkpoint, self.trained_adapter)

    def push_to_hub(self, *_: Any, **__: Any) -> Any:  # the Trainer's sends checkpoints and training_args.bin
        raise UserError(
            "push_to_hub: a run is not published; save the adapter, and publish that with peft_unlearn.push"
        )

    init_hf_repo = push_to_hub

    def _fingerprint(self) -> str:
        c = self.config
        rows = [[row_of(r) for r in rows] for _, rows in sorted(self.rows.sets.items())]
        method = (c.terms, c.rule, c.smoothing, c.step_size, c.averaging, c.reference)
        more: list[Any] = [below] if (below := stack_digest(self.bare, self.trained_adapter)) else []
        if places := fixed_tensors(self.bare, [self.trained_adapter]):
            more.append([[n, hashlib.sha256(raw_bytes(t)).hexdigest()] for n, t in places])
        if isinstance(self.mask, Refresh):
            more.append(["refresh", self.mask.every])
        return fingerprint(method, c.anchor, c.per_anchor, c.seed, c.rows_per_step, rows, *more)


class _NothingLeft(Exception):
    """The checkpoint that a run was resumed from is its last."""


class _AfterStep(TrainerCallback):
    """The two things that follow `training_step`: the automatic learning rate after clipping, averaging after the update."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        if t.config.step_size_method is None or t.window is None or t.last_window is None:
            return
        method, hyper = t.config.step_size_method
        if state.global_step % hyper.get("every", 1):
            return
        window, batches, here = t.window, t.last_window, t.last_step.values["retain"]
        with peeked_update(t.optimizer, window.space) as update:

            def loss(xi: float) -> float:
                if xi == 0:
                    return here
                with window.space.shifted(update * -xi), t.accelerator.autocast():
                    return window.value("retain", batches)

            groups: list[dict[str, Any]] = t.optimizer.param_groups  # type: ignore[union-attr]
            rate = float(groups[0]["lr"])
            eta = method.fn(loss, rate, **hyper)
        for group in groups:  # the probed step was of all groups together: routers keep their share
            group["lr"] = eta if group["lr"] == rate else group["lr"] * eta / rate
        scheduler: Any = getattr(t.lr_scheduler, "scheduler", t.lr_scheduler)
        scheduler.base_lrs = [group["lr"] for group in groups]
        scheduler._last_lr = list(scheduler.base_lrs)  # type: ignore[union-attr]  # what this step's log shows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        if t.config.averaging_method is None or t.window is None:
            return
        method, hyper = t.config.averaging_method
        found = method.fn(t.window.space.read(), t.window.space, t.average_state, state.global_step, **hyper)
        if found is not None:
            t.average_state["averaged"] = found.tensors


def _all_reduce(flat: torch.Tensor) -> None:
    torch.distributed.all_reduce(flat)


def _refuse_dropout(model: nn.Module, config: UnlearnConfig) -> None:
    exact = {
        "smoothing": config.smoothing,
        "step_size": config.step_size,
        "reference: precomputed": config.reference == "precomputed",
    }
    if (dropped := dropouts(model)) and (what := next((k for k, used in exact.items() if used), None)):
        raise UserError(f"{what} needs the same forward twice, and {dropped[0]} drops at random; set dropout to 0")


def _refuse_sharded(config: UnlearnConfig) -> None:
    """Raise one `UserError` for what would wait for ever on a base that lies in parts on several ranks, or be saved in parts."""
    errors = Errors()
    if str(getattr(config.save_strategy, "value", config.save_strategy)) != "no":
        errors.add(
            "save_strategy: checkpoints of a sharded base would hold one rank's part of the adapter; set it to no"
        )
    if config.eval_strategy != "no":
        errors.add(
            "eval_strategy: ranks decode answers of different lengths, and a sharded base needs all of them at every token"
        )
    if config.reference == "precomputed":
        errors.add(
            "reference: precomputed: one rank may find another's cache and not run the pass that the others wait in; use before"
        )
    errors.raise_if_any("a sharded base")


def _trained_adapter(model: Any) -> str:
    """Name of the one adapter whose parameters require a gradient."""
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    names = [a for a in model.peft_config if any(belongs(n, a) for n in trainable)]
    if len(names) != 1:
        raise UserError(f"exactly one adapter must be trainable, and {len(names)} are ({', '.join(names) or 'none'})")
    return names[0]
