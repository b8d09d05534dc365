"""A `Pass` on given tensors: what objectives see when the logits are chosen by hand instead of by a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_unlearn import registry
from peft_unlearn.forward import Pass

LAYER: dict[str, dict[str, Any]] = {n: {"layer": 1} for n in ("rmu", "adaptive_rmu", "rr", "representation_retention")}
# those that read a pass alone; routers and parameters (adapter_norm) have tests of their own
OBJECTIVES = [m.name for m in registry.methods("objective") if m.needs and not any("router" in n for n in m.needs)]


class FakePass(Pass):
    """Targets in row order; shapes, sums per row and lengths are the real class's own.

    Args:
        z: logits at the targets (n, vocab), any float dtype; z_ref: the reference's.
        y: targets (n,); lengths: targets per row (default: one row).
        hidden, ref_hidden: (batch, seq, hidden), seq = 1 + longest row.
    """

    def __init__(
        self,
        z: Tensor,
        y: Sequence[int] | Tensor,
        lengths: Sequence[int] | None = None,
        *,
        z_ref: Tensor | None = None,
        alternate: FakePass | None = None,
        hidden: Tensor | None = None,
        ref_hidden: Tensor | None = None,
    ) -> None:
        self.z, self.z_ref, self.other, self.states = z, z_ref, alternate, (hidden, ref_hidden)
        self.targets = torch.as_tensor(y)
        lengths = [len(self.targets)] if lengths is None else lengths
        self.labels = torch.full((len(lengths), 1 + max(lengths)), -100)
        for i, k in enumerate(lengths):
            self.labels[i, 1 : 1 + k] = 1
        self.mask = self.labels[:, 1:] != -100
        self.labels[:, 1:][self.mask] = self.targets
        self.batch = {"labels": self.labels, "attention_mask": torch.ones_like(self.labels)}
        if alternate is not None:
            self.batch["alternate"] = alternate.batch

    def _log_softmax(self, z: Tensor | None) -> Tensor:
        assert z is not None
        return z.log_softmax(1).gather(1, self.targets[:, None]).squeeze(1)

    @property
    def logp(self) -> Tensor:
        return self._log_softmax(self.z)

    @property
    def ref_logp(self) -> Tensor:
        return self._log_softmax(self.z_ref).detach()

    @property
    def alternate(self) -> Pass:
        assert self.other is not None
        return self.other

    def map_logits(self, fn: Callable[..., Tensor], reference: bool = False, targets: Tensor | None = None) -> Tensor:
        y = self.targets if targets is None else targets
        return fn(self.z, self.z_ref, y) if reference else fn(self.z, y)

    def hidden(self, layer: int | str, reference: bool = False) -> Tensor:
        found = self.states[reference]
        assert found is not None
        return found


def values(name: str, p: Pass, **hyper: Any) -> Tensor:
    """The registered objective with its defaults filled in."""
    method = registry.get("objective", name)
    given = {**LAYER.get(name, {}), **hyper}
    assert not method.check(given)
    return method.fn(p, **method.resolve(given))


def random_pass(
    seed: int = 0,
    lengths: Sequence[int] = (3, 1, 4, 2),
    vocab: int = 7,
    dtype: torch.dtype = torch.float64,
    spread: float = 2.0,
) -> FakePass:
    """Everything an objective can ask for, at random; ``z`` requires a gradient."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) * spread

    def targets(k: int) -> Tensor:
        return torch.randint(0, vocab, (k,), generator=g)

    n, other = sum(lengths), [k % 3 + 1 for k in lengths]
    alternate = FakePass(
        draw(sum(other), vocab).requires_grad_(), targets(sum(other)), other, z_ref=draw(sum(other), vocab)
    )
    states = [draw(len(lengths), 1 + max(lengths), 5) for _ in range(2)]
    return FakePass(
        draw(n, vocab).requires_grad_(), targets(n), lengths, z_ref=draw(n, vocab), alternate=alternate,
        hidden=states[0].requires_grad_(), ref_hidden=states[1],
    )  # fmt: skip
