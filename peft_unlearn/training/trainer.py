"""`UnlearnTrainer`: transformers' Trainer with the window contract.

`training_step` stores micro-batches and returns 0 until the last one of an optimizer step, then sweeps them all, combines the named
gradients and writes ``.grad``: clipping, optimizer, schedule, logging and checkpoints stay the Trainer's own.
"""

from __future__ import annotations

import functools
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..data.bundle import ForgetRetain
from ..data.collate import PairedRows, StreamSampler, collate, padding_id
from ..errors import UserError
from ..forward import dropouts
from ..gradients.terms import with_experts
from ..gradients.vector import Space, Vec
from ..gradients.window import Step, Window
from ..tuners.names import belongs
from ..tuners.peft_type import PREFIX
from .adapt import describe, get_forget_model, refuse_base
from .after_step import AfterStep
from .checkpoints import STATE, fingerprint, last_checkpoint, load_adapter, read_state, write_state
from .config import UnlearnConfig, encode_set, reference_of, require_sets
from .reference import precompute, stack_digest


class UnlearnTrainer(Trainer):
    """Trains a forget adapter.

    Args:
        model: a transformers causal LM, or a PeftModel with the adapter to be trained active and trainable.
        args: `UnlearnConfig`.
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
        needed = {t.batch for t in args.term_list} | {args.anchor}
        if args.eval_strategy != "no" and score is None:
            raise UserError("eval_strategy is set and there is no score: pass score=make_score(data, tokenizer)")
        if args.n_gpu > 1:
            raise UserError("several GPUs in one process are not used; start one process per GPU with torchrun")
        refuse_base(model)
        if not hasattr(model, "peft_config"):
            model = get_forget_model(model, peft_config)
        elif peft_config is not None:
            raise UserError("the model already has an adapter and a peft_config was given too; pass one of them")
        self.pad_id = padding_id(processing_class)
        if dropped := dropouts(model):
            exact = {"smoothing": args.smoothing, "step_size": args.step_size, "reference: precomputed": args.reference}
            for what in [k for k, v in exact.items() if v == "precomputed" or (v and k != "reference: precomputed")]:
                raise UserError(
                    f"{what} needs the same forward twice, and {dropped[0]} drops at random; set dropout to 0"
                )
        sets = {name: encode_set(args, self.data, name, processing_class) for name in sorted(needed)}
        self.score = score
        self.trained_adapter = _trained_adapter(model)
        self._reference = reference_of(args.reference, self.trained_adapter)
        args.term_list = with_experts(args.term_list, getattr(self._peft_config(model), "experts", None))
        self.rows = PairedRows(sets, args.anchor, args.per_anchor, args.seed)
        self.config = args
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.rows,
            eval_dataset=self.rows if score is not None else None,  # never read: `evaluate` asks `score`
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
        if args.step_size_method is not None or args.averaging_method is not None:
            self.add_callback(AfterStep(self))

    def _peft_config(self, model: Any) -> Any:
        return model.peft_config[self.trained_adapter]

    # --- data ------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> StreamSampler:  # type: ignore[override]
        a = self.config
        return StreamSampler(len(self.rows), a.train_batch_size * a.gradient_accumulation_steps * a.world_size)

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
        """As `Trainer.train`; ``resume_from_checkpoint=True`` takes the newest *whole* checkpoint of ``<output_dir>.work``."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.config.output_dir)
            if resume_from_checkpoint is None:
                raise UserError(f"{self.config.output_dir} holds no whole checkpoint to resume from")
        self.window, self._pending, self._restored, self.average_state = None, [], None, {}
        self._sums.clear()
        if resume_from_checkpoint:
            self._restored = read_state(resume_from_checkpoint, self._fingerprint())
            self.average_state = self._restored["average"]
        space = Space.trainable(self.bare)
        groups = _groups(self.bare, space.names)
        before = _checksums(space)
        if self.config.reference == "precomputed":
            precompute(
                self.bare,
                self.rows.sets,
                {t.batch for t in self.config.term_list if "ref_logp" in t.objective.needs},
                Path(self.config.output_dir or ""),
                reference=self._reference,
                pad_id=self.pad_id,
                write=self.is_world_process_zero(),
            )
        out = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        if "averaged" in self.average_state:
            averaged = [t.to(p.device) for t, p in zip(self.average_state["averaged"], space.params, strict=True)]
            space.write(Vec(averaged))
        if self.state.global_step and not resume_from_checkpoint:
            self._check_changed(groups, space.names, before, _checksums(space))
        return out

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        if self.window is None:
            self.window = self._open_window()
        self._pending.append(self._prepare_inputs(inputs))
        device = self.args.device
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=device)
        window, self._pending = self._pending, []
        self.last_window = window if self.config.step_size_method else None
        try:
            with self.accelerator.autocast():
                step = self.window.step(window)
        except UserError as e:
            raise UserError(f"step {self.state.global_step + 1}: {e}") from e
        if self.state.global_step == 0:
            self._check_reached(step)
        for p, t in zip(self.window.space.params, step.update.tensors, strict=True):
            p.grad = t.to(p.dtype)
        self.last_step = step
        for key, value in step.logs().items():
            self._sums[key].append(value)
        return torch.tensor(sum(step.values.values()), device=device, dtype=torch.float32)

    def _open_window(self) -> Window:
        assert self.config.rule_method is not None
        window = Window(
            self.bare,
            self.config.term_list,
            self.config.rule_method,
            scope=self.config.scope,
            smoothing=self.config.smoothing_method,
            space=self.config.smoothing_space,
            reference=self._reference,
            reduce=_all_reduce if self.args.world_size > 1 else None,
            seed=self.config.seed,
        )
        if self._restored is not None:
            window.load_state_dict(self._restored["window"])
        return window

    # --- nothing trains silently -----------------------------------------------------------------------------------

    def _check_reached(self, step: Step) -> None:
        assert self.window is not None
        names = self.window.space.names
        groups = _groups(self.bare, names)
        reached = dict.fromkeys(groups.values(), False)
        for n, m in zip(names, step.moved, strict=True):
            reached[groups[n]] |= m > 0
        silent = [g for g, ok in reached.items() if not ok and not self._allowed(g)]
        unvisited = [g for g in silent if g in self._expert_groups(groups)]
        if unvisited and len(unvisited) < len(reached):  # a token of a later step may come by
            warnings.warn(
                f"no token of the first step was routed to the adapted experts of {', '.join(unvisited)}; what never passes "
                "through an expert cannot be changed there (`peft-unlearn experts` shows which ones it does)",
                stacklevel=2,
            )
            silent = [g for g in silent if g not in unvisited]
        if silent:
            raise UserError(
                f"no term gives a gradient to {len(silent)} of {len(reached)} adapted modules: {', '.join(silent[:5])}"
                f"{', ..' if len(silent) > 5 else ''}. They would stay untrained in silence; adapt other layers or name them in "
                "allow_untrained"
            )

    def _expert_groups(self, groups: Mapping[str, str]) -> set[str]:
        """The adapted modules that are experts of a mixture-of-experts layer: tokens may pass them by."""
        return {g for n, g in groups.items() if PREFIX in n and f"{PREFIX}router" not in n}

    def _check_changed(self, groups: Mapping[str, str], names: list[str], before: list[int], after: list[int]) -> None:
        changed = dict.fromkeys(groups.values(), False)
        for n, a, b in zip(names, before, after, strict=True):
            changed[groups[n]] |= a != b
        still = [g for g, ok in changed.items() if not ok and not self._allowed(g)]
        if len(still) < len(changed) and (unvisited := sorted(set(still) & self._expert_groups(groups))):
            warnings.warn(f"no token ever trained the adapted experts of {', '.join(unvisited)}", stacklevel=2)
            still = [g for g in still if g not in unvisited]
        if still:
            raise UserError(
                f"{len(still)} of {len(changed)} adapted modules are exactly as before training: {', '.join(still[:5])}. "
                "The learning rate is zero, or something froze them; nothing was saved"
            )

    def _allowed(self, name: str) -> bool:
        return any(part in name for part in self.config.allow_untrained)

    # --- reference -------------------------------------------------------------------------------------------------

    @property
    def bare(self) -> Any:
        """The PEFT model itself, without what the accelerator wraps around it."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]

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
            write_state(folder, {"window": window, "average": self.average_state, "run": self._fingerprint()})
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter(self.bare, resume_from_checkpoint, self.trained_adapter)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_adapter(self.bare, self.state.best_model_checkpoint, self.trained_adapter)

    def _fingerprint(self) -> str:
        c = self.config
        rows = [[(r["input_ids"], r["labels"]) for r in rows] for _, rows in sorted(self.rows.sets.items())]
        per_step = c.train_batch_size * c.gradient_accumulation_steps * c.world_size
        method = (c.terms, c.rule, c.smoothing, c.step_size, c.averaging, c.reference)
        below = stack_digest(self.bare, self.trained_adapter)
        return fingerprint(method, c.anchor, c.per_anchor, c.seed, per_step, rows, *([below] if below else []))

    # --- the finished adapter --------------------------------------------------------------------------------------

    def describe(self) -> str:
        """What is adapted and how long the run is, in two lines."""
        a = self.config
        per_step = a.train_batch_size * a.gradient_accumulation_steps * a.world_size
        steps = a.max_steps if a.max_steps > 0 else int(-(-len(self.rows) // per_step) * a.num_train_epochs)
        sizes = ", ".join(f"{n} {len(r)}" for n, r in self.rows.sets.items())
        return f"{describe(self.bare, self.trained_adapter)}\nrows: {sizes}; {per_step} {a.anchor} rows per step; {steps} steps"


def _all_reduce(flat: torch.Tensor) -> None:
    torch.distributed.all_reduce(flat)


def _trained_adapter(model: Any) -> str:
    """Name of the one adapter whose parameters require a gradient."""
    names = [
        a for a in model.peft_config if any(p.requires_grad and belongs(n, a) for n, p in model.named_parameters())
    ]
    if len(names) != 1:
        raise UserError(f"exactly one adapter must be trainable, and {len(names)} are ({', '.join(names) or 'none'})")
    return names[0]


def _groups(model: Any, names: list[str]) -> dict[str, str]:
    """Parameter name -> the adapted module it belongs to (a fresh LoRA's A has no gradient: B speaks for both)."""
    kinds = {c.peft_type for c in model.peft_config.values()}  # those below may be of another type
    prefixes = tuple(
        {getattr(model.base_model, "prefix", "lora_"), *filter(None, map(PEFT_TYPE_TO_PREFIX_MAPPING.get, kinds))}
    )
    out = {}
    for n in names:
        parts = n.split(".")
        cut = next((i for i, part in enumerate(parts) if part.startswith(prefixes)), len(parts))
        out[n] = ".".join(parts[:cut]).removeprefix("base_model.model.")
    return out


def _checksums(space: Space) -> list[int]:
    return [
        zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()) for p in space.params
    ]
