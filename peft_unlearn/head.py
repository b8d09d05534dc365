"""The output embeddings of a causal language model as a function of hidden states, in chunks.

Exact for scales, biases, soft-caps and adapters: by default the model's own forward on one token is used with its hidden
state put in before the head; a plain ``h @ W.T`` only where that is verified to be the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import UserError

_FUSED_FLOATS = 1 << 24  # 64 MiB: one logits chunk, worked on in place
_CHUNK_FLOATS = 1 << 22  # 16 MiB: autograd holds about four tensors of the size of a chunk


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def reads_images(model: Any) -> bool:
    """Whether the model is a vision model: an image classifier and its kin."""
    return getattr(causal_lm(model), "main_input_name", "") == "pixel_values"


@contextmanager
def held(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def _first_order(what: str) -> None:
    """Raise when a backward runs with create_graph. `once_differentiable` alone is silent under torch.autograd.grad, which
    never visits its error node."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{what} can be differentiated once only (its gradient is formed in forward): create_graph=True is refused"
        )


class _FusedLogp(torch.autograd.Function):
    """Log-probabilities of targets under a plain linear frozen head: in-place softmax, gradient formed on the spot."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
        n, rows = len(y), max(16, _FUSED_FLOATS // weight.shape[0])
        logp = h.new_empty(n)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        buffer = h.new_empty(min(rows, n), weight.shape[0])
        for i in range(0, n, rows):
            yc = y[i : i + rows]
            z = torch.mm(h[i : i + rows], weight.T, out=buffer[: len(yc)])  # (m, vocab)
            if bias is not None:
                z += bias
            z -= z.amax(1, keepdim=True)
            target = z.gather(1, yc[:, None])
            total = z.exp_().sum(1, keepdim=True)
            logp[i : i + rows] = (target - total.log()).squeeze(1)
            if grad is not None:
                # d logp / d h = W[y] - softmax(z) W
                torch.mm(z.div_(total.neg_()), weight, out=grad[i : i + rows])
                grad[i : i + rows] += weight[yc]
        ctx.save_for_backward(grad)
        return logp

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _first_order("logp")
        (grad,) = ctx.saved_tensors
        return grad_out[:, None] * grad, None, None, None


class _ChunkedMap(torch.autograd.Function):
    """fn over chunks of logits of a frozen head; d fn / d h is formed while the chunk's logits exist."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, run: Callable[[Tensor, int, int], Tensor], rows: int) -> Tensor:
        values, grads = [], []
        for i in range(0, len(h), rows):
            with torch.enable_grad():
                hc = h[i : i + rows].detach().requires_grad_(True)
                v = run(hc, i, i + rows)  # (m,) or (m, k)
                columns = v[:, None] if v.ndim == 1 else v
                g = [
                    _grad_or_zeros(columns[:, j].sum(), hc, keep=j + 1 < columns.shape[1])
                    for j in range(columns.shape[1])
                ]
            values.append(v.detach())
            grads.append(torch.stack(g, 1))  # (m, k, hidden)
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _first_order("map_logits")
        (grads,) = ctx.saved_tensors  # (n, k, hidden)
        weights = grad_out[:, None] if grad_out.ndim == 1 else grad_out
        if grads.shape[1] == 1:
            return weights.to(grads.dtype) * grads[:, 0], None, None
        return torch.einsum("nk,nkh->nh", weights.to(grads.dtype), grads), None, None


def _grad_or_zeros(value: Tensor, h: Tensor, keep: bool) -> Tensor:
    if not value.requires_grad:  # a column of constants, e.g. a detached weight
        return torch.zeros_like(h)
    (g,) = torch.autograd.grad(value, h, retain_graph=keep, allow_unused=True)
    return torch.zeros_like(h) if g is None else g


_DIRECT: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Head:
    """The output embeddings of a model as a function hidden -> logits, exact for scales, biases, soft-caps and adapters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.module: Any = causal_lm(model).get_output_embeddings()  # type: ignore[operator]
        if self.module is None:
            raise UserError(f"{type(causal_lm(model)).__name__} has no output embeddings: not a causal language model")

    @property
    def trains(self) -> bool:
        return any(p.requires_grad for p in self.module.parameters())

    @property
    def vocab(self) -> int:
        return int(causal_lm(self.model).config.get_text_config().vocab_size)  # type: ignore[union-attr]

    def generic(self, h: Tensor) -> Tensor:
        """(m, hidden) -> logits (m, vocab) through the model's own forward on one token, `h` put in before the head."""
        one = torch.zeros((1, 1), dtype=torch.long, device=h.device)
        with held(self.module.register_forward_pre_hook(lambda m, a: (h[None], *a[1:]))):
            return self.model(input_ids=one, attention_mask=torch.ones_like(one), use_cache=False).logits[0]

    def direct(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) when the logits are verifiably ``h @ weight.T + bias`` and the head is frozen, else None."""
        if type(self.module) is not nn.Linear or self.trains:
            return None
        if self.module not in _DIRECT:
            _DIRECT[self.module] = self._verify()
        return (self.module.weight, self.module.bias) if _DIRECT[self.module] else None

    @torch.no_grad()
    def _verify(self) -> bool:
        w, b = self.module.weight, self.module.bias
        config: Any = causal_lm(self.model).config
        cap = float(getattr(config.get_text_config(), "final_logit_softcapping", None) or 0)
        h = torch.randn(4, w.shape[1], generator=torch.Generator().manual_seed(0)).to(w)
        z = F.linear(h, w, b)
        # A soft-cap c tanh(z / c) is the identity for small z: only logits well beyond it tell.
        h = h * (max(100.0, 3 * cap) / z.abs().max().clamp_min(1e-12))
        z, own = F.linear(h, w, b).float(), self.generic(h).float()
        return own.shape == z.shape and bool((own - z).abs().max() <= 1e-5 * z.abs().max())

    def logits(self, h: Tensor) -> Tensor:
        """(m, hidden) -> (m, vocab) float32."""
        plain = self.direct()
        return (F.linear(h, *plain) if plain is not None else self.generic(h)).float()

    def logp(self, h: Tensor, y: Tensor) -> Tensor:
        """(n, hidden), (n,) -> log-probabilities of the targets, (n,) float32."""
        plain = self.direct()
        if (
            plain is not None
            and h.dtype == plain[0].dtype == torch.float32
            and not torch.is_autocast_enabled(h.device.type)
        ):
            return _FusedLogp.apply(h, *plain, y)  # type: ignore[return-value]
        return self.map(h, lambda z, i, j: token_logp(z, y[i:j]))

    def map(self, h: Tensor, fn: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """fn(z, start, stop) over chunks of logits z (m, vocab) float32 -> (n,) or (n, k)."""
        rows = max(16, _CHUNK_FLOATS // max(1, self.vocab))

        def run(hc: Tensor, i: int, j: int) -> Tensor:
            return fn(self.logits(hc), i, j)

        if not len(h):
            return h.new_zeros(0, dtype=torch.float32) + 0 * h.sum()
        if torch.is_grad_enabled() and self.trains:
            # The rows' weights are known only in backward, and the head's own gradient needs them: recompute there.
            parts = [checkpoint(run, h[i : i + rows], i, i + rows, use_reentrant=False) for i in range(0, len(h), rows)]
            return torch.cat(parts)
        if torch.is_grad_enabled() and h.requires_grad:
            return _ChunkedMap.apply(h, run, rows)  # type: ignore[return-value]
        with torch.no_grad():
            return torch.cat([run(h[i : i + rows], i, i + rows) for i in range(0, len(h), rows)])


def token_logp(z: Tensor, y: Tensor) -> Tensor:
    """Log-probability of target y (m,) under logits z (m, vocab): (m,)."""
    return z.gather(1, y[:, None]).squeeze(1) - z.logsumexp(1)


class ClassHead:
    """`Head` of an image classifier, whose few logits are there at once: what it is given are the logits (rows, classes)."""

    module = nn.Identity()

    def logp(self, z: Tensor, y: Tensor) -> Tensor:
        return token_logp(z.float(), y)

    def logits(self, z: Tensor) -> Tensor:
        return z.float()

    def map(self, z: Tensor, fn: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        return fn(z.float().clone(), 0, len(z))  # readers may work in its memory
