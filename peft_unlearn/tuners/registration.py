"""Makes PEFT know our own types of adapters: at once where PEFT is imported already, else right after its import.

PEFT has no plug-in discovery. Its registry takes outside methods, but only for names that its ``PeftType`` enumeration
holds; so that is extended in place first. This module imports neither torch nor peft.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .peft_type import FORGET_VECTOR, PEFT_TYPE, SPARSE_TYPE, peft_type

# type -> what the classes in the folder of that name begin with
_TYPES = {PEFT_TYPE: "ExpertLora", SPARSE_TYPE: "Sparse", FORGET_VECTOR: "ForgetVector"}


def install() -> None:
    """Register now if peft is imported, else when it will be. Safe to call any number of times."""
    if "peft" in sys.modules:
        _register_or_warn()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def register(name: str = PEFT_TYPE) -> Any:
    """Register our types with PEFT (imports it) and return the ``PeftType`` of that name; does nothing the second time."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import register_peft_method

    for each, classes in _TYPES.items():
        if peft_type(each) in PEFT_TYPE_TO_CONFIG_MAPPING:
            continue
        room = f"{__package__}.{each.removeprefix('PEFT_UNLEARN_').lower()}"
        register_peft_method(
            name=each.lower(),
            config_cls=getattr(import_module(f"{room}.config"), f"{classes}Config"),
            model_cls=getattr(import_module(f"{room}.model"), f"{classes}Model"),
            prefix=f"{each.lower()}_",
        )
    return peft_type(name)


def _register_or_warn() -> None:
    """An incompatible PEFT must stay importable: the plug-in alone is lost then, and says so."""
    try:
        register()
    except Exception as e:
        warnings.warn(
            f"peft_unlearn could not register its adapter types with this version of peft ({type(e).__name__}: {e}); "
            "expert adapters, forget vectors and their kin cannot be loaded in this process",
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
