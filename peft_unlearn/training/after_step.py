"""What follows `training_step` in an optimizer step: the automatic learning rate after clipping, averaging after the update."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..gradients.step_size import peeked_update


class AfterStep(TrainerCallback):
    """Automatic learning rate after clipping, and averaging after the step: the two things that follow training_step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t = self.trainer
        if t.config.step_size_method is None or t.window is None or t.last_window is None:
            return
        method, hyper = t.config.step_size_method
        if state.global_step % hyper["every"]:
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
