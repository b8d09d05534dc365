"""Nothing stays untrained in silence: which adapted modules no gradient reaches, and which a run left as they were."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ..errors import UserError
from ..gradients.vector import Space
from ..tuners.peft_type import PREFIX
from .reference import raw_bytes


class Untrained:
    """Watches the trainable parameters of `model` from now on.

    Args:
        allowed: parts of module names that may stay without a gradient.
    """

    def __init__(self, model: Any, space: Space, allowed: Sequence[str]) -> None:
        self.space, self.allowed = space, allowed
        self.modules = _modules(model, space.names)
        # Of a mixture-of-experts layer: tokens may pass them by.
        self.experts = {
            m for n, m in zip(space.names, self.modules, strict=True) if PREFIX in n and f"{PREFIX}router" not in n
        }
        self.before = _checksums(space)

    def after_first_step(self, largest: Sequence[float]) -> None:
        """Refuse modules that no term reaches; `largest` is the largest gradient entry of each parameter."""
        silent, unvisited = self._left(x > 0 for x in largest)
        if unvisited:  # a token of a later step may come by
            warnings.warn(
                f"no token of the first step was routed to the adapted experts of {', '.join(unvisited)}; what never passes "
                "through an expert cannot be changed there (`peft-unlearn experts` shows which ones it does)",
                stacklevel=3,
            )
        if silent:
            raise UserError(
                f"no term gives a gradient to {len(silent)} of {len(set(self.modules))} adapted modules: "
                f"{', '.join(silent[:5])}{', ..' if len(silent) > 5 else ''}. They would stay untrained in silence; adapt other "
                "layers or name them in allow_untrained"
            )

    def after_run(self) -> None:
        """Refuse modules that are exactly as at the start."""
        still, unvisited = self._left(a != b for a, b in zip(self.before, _checksums(self.space), strict=True))
        if unvisited:
            warnings.warn(f"no token ever trained the adapted experts of {', '.join(unvisited)}", stacklevel=3)
        if still:
            raise UserError(
                f"{len(still)} of {len(set(self.modules))} adapted modules are exactly as before training: "
                f"{', '.join(still[:5])}. The learning rate is zero, or something froze them; nothing was saved"
            )

    def _left(self, touched: Iterable[bool]) -> tuple[list[str], list[str]]:
        """(modules without a touched parameter, those among them that are experts which no token visited)."""
        reached = dict.fromkeys(self.modules, False)
        for module, t in zip(self.modules, touched, strict=True):
            reached[module] |= t
        left = [m for m, ok in reached.items() if not ok and not any(part in m for part in self.allowed)]
        unvisited = [m for m in left if m in self.experts] if len(left) < len(reached) else []
        return [m for m in left if m not in unvisited], unvisited


def _modules(model: Any, names: Sequence[str]) -> list[str]:
    """The adapted module of each parameter (a fresh LoRA's A has no gradient: B speaks for both)."""
    kinds = {c.peft_type for c in model.peft_config.values()}  # those below may be of another type
    prefixes = tuple(
        {getattr(model.base_model, "prefix", "lora_"), *filter(None, map(PEFT_TYPE_TO_PREFIX_MAPPING.get, kinds))}
    )
    out = []
    for n in names:
        parts = n.split(".")
        cut = next((i for i, part in enumerate(parts) if part.startswith(prefixes)), len(parts))
        out.append(".".join(parts[:cut]).removeprefix("base_model.model."))
    return out


def _checksums(space: Space) -> list[int]:
    return [zlib.crc32(raw_bytes(p)) for p in space.params]
