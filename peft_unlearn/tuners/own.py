"""What PEFT asks of each of our tuners in the same words."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner


class OwnTuner(BaseTuner):
    """A PEFT tuner that settles in `_prepare_model` which modules it adapts (`_targets`): PEFT calls that before it changes anything, so
    whatever is refused leaves the model as it was."""

    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT declares it so
    _targets: Any  # a container of module names, and what is wanted of each where a type needs to know

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets
