"""One-shot adapters: the factors of a fresh LoRA (or of one in chosen experts) from a few passes over the data, without an optimizer.

A method fills A and B; how large the result may be is not its business: whoever calls it searches the scale within a budget of
disruption (`training.oneshot`). No array of a weight's size is formed: where A stands, the gradient by B is G A^T, and where B stands, that
by A is B^T G, with G the gradient of the weight itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..forward import Pass
from ..gradients.terms import Term
from ..progress import Progress
from ..registry import Range, Source, oneshot
from .moments import NAME, Moment, activations, factors, project
from .streamed import Rows, batches, gradients, scored

_REPSELECT = Source("RepSelect, its simple form (code, MIT)", "https://github.com/filyp/open-unlearning", 2026)
_LUNAR = Source("LUNAR: LLM Unlearning via Neural Activation Redirection", "https://arxiv.org/abs/2502.07218", 2025)

NonNegative = Annotated[float, Range(0, None)]


@dataclass
class Shot:
    """What a method works with: the model with a fresh adapter on it, encoded rows by set, and the terms named forget."""

    model: Any
    rows: Mapping[str, Rows]
    forget: Sequence[Term]
    pad_id: int = 0
    size: int = 16
    seed: int = 0
    progress: Progress | None = None

    def side(self, which: str) -> dict[str, nn.Parameter]:
        """The adapter's factors "A" or "B", by name."""
        return {n: p for n, p in self.model.named_parameters() if re.search(rf"_{which}\.{NAME}(\.weight)?$", n)}

    def set(self, name: str) -> Rows:
        if not self.rows.get(name):
            raise UserError(f"this one-shot method reads the {name} set, and the data have none")
        return self.rows[name]

    def gradient(self, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Of the forget terms, by the parameters given, over all rows."""
        with scored(self.model, params):
            parts = [
                gradients(
                    self.model, params, self.set(t.batch), t, pad_id=self.pad_id, size=self.size, progress=self.progress
                )
                for t in self.forget
            ]
        return {n: torch.stack([p[n] for p in parts]).sum(0) for n in params}

    def moments(self, name: str) -> dict[Any, Moment]:
        """Second moments of what each adapted module reads on a set, the adapter off."""
        return activations(self.model, self.set(name), self.pad_id, self.progress)


@torch.no_grad()
def fill(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor] | float) -> None:
    for n, p in params.items():
        p.copy_(values[n]) if isinstance(values, Mapping) else p.fill_(values)


@oneshot("repselect", source=_REPSELECT, forget="ga", faithful="reconstructed")
def repselect(
    shot: Shot,
    *,
    rows: Literal["elicited", "gradient"] = "elicited",
    strength: NonNegative = 1.0,
    learning_rate: Annotated[float, Range(0, None, open_low=True)] = 0.05,
) -> None:
    """A: input directions of what is to be forgotten, without those that dominate the retain set; B: the forget gradient there.

    Args:
        rows: elicited: how one pass of SGD that teaches the forget set moves A, the input directions that relearning uses;
            gradient: a random sketch of the forget gradient's row space.
        strength: of the projection that takes dominant retain activations out of A (`moments.project`); 0 is plain truncation.
        learning_rate: of the teaching.

    The published form collapses the principal components of full gradients of all MLPs, on both sides, and subtracts the rest; this is
    one of rank r, collapsed on the input's side alone.
    """
    a, b = shot.side("A"), shot.side("B")
    if rows == "elicited":
        before = {n: p.detach().clone() for n, p in a.items()}
        _teach(shot, {**a, **b}, learning_rate)
        found = {n: p.detach() - before[n] for n, p in a.items()}
    else:
        g = torch.Generator().manual_seed(shot.seed)
        fill(b, {n: 1e-4 * torch.randn(p.shape, generator=g).to(p) for n, p in b.items()})
        found = shot.gradient(a)
    fill(a, found)
    fill(b, 0.0)
    moments = shot.moments("retain") if strength else {}
    for key, x, _ in factors(shot.model):
        x.data.copy_(torch.linalg.svd(x.detach().float(), full_matrices=False).Vh)  # (r, in), orthonormal rows
        if key in moments:
            project(x.data, None, moments[key], strength)
    fill(b, {n: -v for n, v in shot.gradient(b).items()})


def _teach(shot: Shot, params: Mapping[str, nn.Parameter], rate: float) -> None:
    """One pass of plain SGD on the likelihood of the forget answers."""
    parts = batches(shot.set("forget"), "forget", shot.pad_id, shot.size, next(shot.model.parameters()).device)
    with scored(shot.model, params):
        for part in parts:
            loss = -Pass(shot.model, part["forget"]).logp.mean()
            for p, g in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
                p.data.sub_(g, alpha=rate)


@oneshot("lunar_ridge", source=_LUNAR, forget="ga", faithful="reconstructed")
def lunar_ridge(
    shot: Shot, *, towards: str = "holdout", ridge: Annotated[float, Range(0, None, open_low=True)] = 0.1
) -> None:
    """Each adapted module adds c r to its output on forget tokens and nothing on retain tokens, by ridge regression: a delta of rank 1.

    r: mean output at the last prompt token on rows of `towards`, which the model cannot answer, minus that on forget rows. The optimum of
    the published mean squared error is D = c r (sum_f x)^T (C + ridge m I)^-1, C the second moment of forget and retain inputs, m its mean
    eigenvalue; c is the scale. The paper finds the same matrix with AdamW on down_proj of one layer: adapt that one alone.

    Raises:
        UserError: an adapter on experts or on a router.
    """
    forget, retain = shot.moments("forget"), shot.moments("retain")
    outputs = {n: _last_prompt(shot, n) for n in ("forget", towards)}
    fill(shot.side("A"), 0.0)
    fill(shot.side("B"), 0.0)
    for key, a, b in factors(shot.model):
        if key[1] is not None or b is None:
            raise UserError(
                "lunar_ridge works on linear layers: one mean input stands for all forget tokens, not for those of an expert"
            )
        f, r = forget[key], retain[key]
        (lf, vf), (lr, vr) = f.spectrum(), r.spectrum()
        c = (vf.T * lf) @ vf + (vr.T * lr) @ vr
        eye = torch.eye(len(c), device=c.device)
        a.data[0] = torch.linalg.solve(c / 2 + ridge * eye, f.total / f.n)
        b.data[:, 0] = outputs[towards][key[0]] - outputs["forget"][key[0]]


@torch.no_grad()
def _last_prompt(shot: Shot, name: str) -> dict[str, Tensor]:
    """Mean output of each adapted module at the position that predicts the first answer token, (out,) by module."""
    from ..folder.digest import adapter_modules
    from ..head import held

    sums: dict[str, Tensor] = {}
    at: list[Tensor] = []

    def hook(module: str):
        def take(_: Any, args: Any, out: Tensor) -> None:
            sums[module] = sums.get(module, 0) + out[torch.arange(len(at[0])), at[0]].float().sum(0)

        return take

    parts = batches(shot.set(name), name, shot.pad_id, shot.size, next(shot.model.parameters()).device)
    with held(*(m.register_forward_hook(hook(n)) for n, m in adapter_modules(shot.model).items())):
        for part in parts:
            batch = part[name]
            at[:] = [(batch["labels"] != -100).long().argmax(1) - 1]
            shot.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return {n: s / len(shot.set(name)) for n, s in sums.items()}
