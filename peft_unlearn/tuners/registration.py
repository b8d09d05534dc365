"""Makes PEFT know ``PEFT_UNLEARN_EXPERT_LORA``: at once where PEFT is imported already, else right after its import.

PEFT has no plug-in discovery. Its registry takes outside methods, but only for names that its ``PeftType`` enumeration
holds; so that is extended in place first. This module imports neither torch nor peft.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .peft_type import PEFT_TYPE, PREFIX, peft_type


def install() -> None:
    """Register now if peft is imported, else when it will be. Safe to call any number of times."""
    if "peft" in sys.modules:
        _register_or_warn()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def register() -> Any:
    """Register the method with PEFT (imports it) and return its ``PeftType``; does nothing the second time."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import register_peft_method

    kind = peft_type()
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        from .expert_lora.config import ExpertLoraConfig
        from .expert_lora.model import ExpertLoraModel

        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=ExpertLoraConfig, model_cls=ExpertLoraModel, prefix=PREFIX
        )
    return kind


def _register_or_warn() -> None:
    """An incompatible PEFT must stay importable: the plug-in alone is lost then, and says so."""
    try:
        register()
    except Exception as e:
        warnings.warn(
            f"peft_unlearn could not register {PEFT_TYPE} with this version of peft ({type(e).__name__}: {e}); "
            "expert adapters cannot be loaded in this process",
            RuntimeWarning,
            stacklevel=2,
        )


class _AfterPeft:
    """A finder that finds nothing itself: it has peft's own loader call us back, once the package has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        for finder in [f for f in sys.meta_path if f is not self]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._call_back(spec)
                return spec
        return None

    def _call_back(self, spec: ModuleSpec) -> None:
        # Asking whether peft exists (importlib.util.find_spec) comes here too, without importing anything. So the finder
        # stays until a module has really been executed, and the loader is left as it was.
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            execute(module)  # if it fails the finder is still there for the next attempt
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register_or_warn()

        loader.exec_module = exec_module
