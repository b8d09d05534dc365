"""The G-effect of single tokens and sequences, for objectives that re-weight the likelihood: sum_i w_i log p_i / N.

What an objective does with an instance is its weight; what raising the instance's likelihood would do to either risk is the same
for every objective. So each row's tokens are differentiated once, one backward each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..forward import Pass, Reference
from ..gradients.terms import Term
from ..gradients.vector import Space, Vec
from ..gradients.window import Batches

SEQUENCES = 4  # a sequence costs one backward, a row's tokens as many as there are


@dataclass(frozen=True)
class Instance:
    """One token (or sequence, for objectives per sequence) i of the forget set, for objectives sum_i w_i log p_i / N.

    row: its row among the rows of the batches, in order; token: number of the target in the row, None for a whole sequence;
    p: probability (per token of a sequence: geometric mean); weight: w_i, held constant; forget, retain: <grad R, grad log p_i>.
    """

    row: int
    token: int | None
    p: float
    weight: float
    forget: float
    retain: float


def products(a: Vec, b: Vec) -> Tensor:
    """Inner product of each parameter's entries, (parameters,) float64 on the CPU."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a.tensors, b.tensors, strict=True)]).cpu()


def weights(p: Pass, term: Term) -> Tensor | None:
    """w of sum_t w_t log p_t, whose gradient (w held constant) is that of the term's sum over units: (n,), or None when the
    term does not act through the targets' log-probabilities alone."""
    if not set(term.objective.needs) <= {"logp", "ref_logp"}:
        return None
    values = term.weight * term.objective.fn(p, **term.hyper).sum()
    if not values.requires_grad:
        return torch.zeros_like(p.logp)
    (w,) = torch.autograd.grad(values, p.logp, retain_graph=True, allow_unused=True)
    return w


class PerInstance:
    """<grad R, grad log p_i> of single tokens: the same for every objective, so each row is differentiated once."""

    def __init__(self, model: nn.Module, space: Space, risks: tuple[Vec, Vec], reference: Reference | None) -> None:
        self.model, self.space, self.risks, self.reference = model, space, risks, reference
        self._tokens: dict[int, Tensor] = {}  # row -> (n, 2)

    def of(self, terms: Sequence[Term], batches: Batches, limit: int) -> tuple[list[Instance], str | None]:
        """Instances of an objective, or why it has none."""
        if len(terms) != 1 or terms[0].batch != "forget":
            return [], "no instances: only a single objective on the forget set has weights per instance"
        out: list[Instance] = []
        whole = terms[0].objective.unit == "sequence"
        with self.space.differentiable():
            for number, row in enumerate(_rows(batches, limit * SEQUENCES if whole else limit)):
                p = Pass(self.model, row, reference=self.reference)
                logp = p.logp  # the forward, before the weights are asked for
                w = weights(p, terms[0])
                if w is None:
                    return [], f"no instances: {terms[0].objective.name} is no re-weighted likelihood of the answers"
                if whole:  # grad log p of a sequence is the sum over its tokens
                    both = self._tokens[number].sum(0) if number in self._tokens else self._pair(logp.sum())
                    mean = float(logp.detach().mean().exp())
                    out.append(Instance(number, None, mean, float(w.mean()), *both.tolist()))
                    continue
                if number not in self._tokens:
                    self._tokens[number] = torch.stack([self._pair(x) for x in logp])
                found = zip(logp.exp().tolist(), w.tolist(), self._tokens[number].tolist(), strict=True)
                out += [Instance(number, t, prob, weight, *both) for t, (prob, weight, both) in enumerate(found)]
        return out, None

    def _pair(self, logp: Tensor) -> Tensor:
        """(<grad R_forget, grad logp>, <grad R_retain, grad logp>), (2,) float64."""
        found = torch.autograd.grad(logp, self.space.params, retain_graph=True, allow_unused=True)
        v = Vec([torch.zeros_like(x) if g is None else g for g, x in zip(found, self.space.params, strict=True)])
        return torch.stack([products(risk, v).sum() for risk in self.risks])


def _rows(batches: Batches, limit: int) -> Iterator[dict[str, Any]]:
    """The first rows of the forget batches that have a target, each a batch of its own, without padding."""
    left = limit
    for mb in batches:
        batch = mb["forget"]
        for i in range(len(batch["input_ids"])):
            if left and bool((batch["labels"][i, 1:] != -100).any()):
                left -= 1
                n = int(batch["attention_mask"][i].sum())
                row = {k: batch[k][i : i + 1, :n] for k in ("input_ids", "attention_mask", "labels")}
                yield row | ({"ref_logp": batch["ref_logp"][i : i + 1, : n - 1]} if "ref_logp" in batch else {})
