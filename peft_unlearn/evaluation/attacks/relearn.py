"""Relearning: fine-tune on a few forget rows, and see whether the others come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from ...errors import UserError
from ...registry import Range, Source, attack
from ..measured import Array, Unmeasured
from .case import MEASURES, Case, Outcome, Rows, chosen
from .weights import base_parameters, linears, opened

if TYPE_CHECKING:
    from torch import Tensor

SMOOTH = Source(
    paper="Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and Beyond",
    url="https://arxiv.org/abs/2502.05374",
    year=2025,
)
Weights = Literal["full", "lora"]


@attack("relearn", source=SMOOTH)
def relearn(
    case: Case,
    *,
    rows: Annotated[int, Range(1)] = 20,
    steps: Annotated[int, Range(0)] = 20,
    learning_rate: list[float] = [3e-4],  # noqa: B006
    batch: Annotated[int, Range(1)] = 20,
    weights: Weights = "full",
    r: Annotated[int, Range(1)] = 8,
    lora_alpha: Annotated[float, Range(0)] = 32.0,
) -> Outcome:
    """Fine-tunes on a few forget rows and asks for the facts that were not among them.

    rows: forget rows shown.   steps: optimizer steps, each on `batch` rows, dealt from permutations of those shown.
    learning_rate: of AdamW without weight decay; with several the strongest is the outcome and all are shown.
    weights: full = every weight of the model with the adapter merged; lora = rank r on every linear layer, on top.
    The loss is the mean negative log-likelihood of the answers' tokens. Raises `Unmeasured` where no row is shown.
    """
    if not case.shown:
        raise Unmeasured("the forget set has no fact to spare: all that could be shown would have to be scored")
    shown = chosen(case.shown, rows, case.seed)
    settings = dict(steps=steps, batch=batch, weights=weights, r=r, lora_alpha=lora_alpha)
    return tuned(case, "relearn", shown, learning_rate, settings)


def tuned(case: Case, what: str, rows: Rows, rates: Sequence[float], settings: dict[str, Any]) -> Outcome:
    """The case's subject before and after fine-tuning on `rows`, at each rate anew; the outcome is the strongest."""
    rates = _checked(what, rates)
    runs: list[dict[str, Any]] = []
    best: dict[str, Array] | None = None
    with case.subject() as model:
        before = case.before(model)
        lead = next(m for m in MEASURES if m in before)
        for rate in rates:
            after, about = _run(case, model, what, rows, rate, **settings)
            means = {m: _mean(v) for m, v in after.items()}
            runs.append({"learning_rate": rate, "after": means, **about})
            if best is None or (means[lead] is not None and means[lead] >= (_mean(best[lead]) or 0.0)):
                best, picked = after, len(runs) - 1
    assert best is not None
    about = {"rows": len(rows), "adapter": runs[picked].pop("adapter"), "strongest": rates[picked]}
    for run in runs:
        run.pop("adapter", None)
    return Outcome(before, best, len(case.rows), {**about, "runs": runs})


def _checked(what: str, rates: Sequence[float]) -> list[float]:
    good = [x for x in rates if isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) and x >= 0]
    if len(good) < len(rates) or not good:
        raise UserError(f"{what}.learning_rate: wanted numbers from 0 up, e.g. 3e-4 or [1e-4, 3e-4], not {rates!r}")
    return [float(x) for x in good]


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _run(
    case: Case,
    model: Any,
    what: str,
    rows: Rows,
    rate: float,
    *,
    steps: int,
    batch: int,
    weights: Weights,
    r: int,
    lora_alpha: float,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """(scores after, details) of one fine-tuning; the model is as before when it returns."""
    if weights == "lora":
        with low_rank(model, r, lora_alpha, case.seed) as factors:
            losses = finetune(case, model, factors, rows, what, steps, batch, rate)
            return case.score(model), {**losses, "parameters": sum(p.numel() for p in factors), "adapter": "live"}
    with opened(model, base_parameters(model), case.checkpoint) as found:
        parameters = list(found.parameters.values())
        losses = finetune(case, model, parameters, rows, what, steps, batch, rate)
        about = {**losses, "parameters": sum(p.numel() for p in parameters), "adapter": found.adapter}
        return case.score(model), about


def finetune(
    case: Case, model: Any, parameters: Sequence[Any], rows: Rows, what: str, steps: int, batch: int, rate: float
) -> dict[str, Any]:
    """Minimize the mean negative log-likelihood of the rows' answers over `parameters`, in place.

    Returns {"first_loss", "last_loss"}, each over one batch. Raises `Unmeasured` where the loss is not finite.
    """
    import torch

    from ...data.collate import pad, padding_id
    from ...forward import Pass
    from ..teacher import evaluating

    encoded, pad_id = case.encoded(rows), padding_id(case.tokenizer)
    device = model.get_input_embeddings().weight.device
    for p in parameters:
        p.requires_grad_(True)
    losses: list[float] = []
    try:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        order = _dealt(len(encoded), case.seed)
        with evaluating(model):  # no dropout: the same steps for every subject
            for step in range(steps):
                some = [encoded[next(order)] for _ in range(min(batch, len(encoded)))]
                tensors = {k: v.to(device) for k, v in pad(some, pad_id).items()}
                with torch.enable_grad():
                    loss = -Pass(model, tensors).logp.mean()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise Unmeasured(f"the loss is {losses[-1]} at step {step} of fine-tuning")
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                case.tell(what, step + 1, steps)
    finally:
        for p in parameters:
            p.requires_grad_(False)
    return {"first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None}


def _dealt(n: int, seed: int) -> Iterator[int]:
    """Row numbers without end, one permutation after the other."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(n).tolist()


@contextmanager
def low_rank(model: Any, r: int, alpha: float, seed: int) -> Iterator[list[Tensor]]:
    """Inside, every linear layer of the base adds alpha/r * B A x, with B zero at first; yields the factors.

    Forward hooks on the base's own modules, so that it works on any subject: under adapters of any kind, with adapters
    off, on a plain model. Fused experts have no linear modules and get none.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from ...head import causal_lm, held

    weights = {id(w.weight): w for w in linears(model)}
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    handles = []
    for module in causal_lm(model).modules():
        found = weights.get(id(module._parameters.get("weight")))
        if found is None or not isinstance(module, nn.Linear | Conv1D):
            continue
        outputs, inputs = next(found.matrices()).shape
        bound = 1 / math.sqrt(inputs)
        a = torch.empty(r, inputs).uniform_(-bound, bound, generator=generator).to(found.weight.device)
        b = torch.zeros(outputs, r, device=a.device)
        factors += [a, b]

        def add(module: Any, args: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return output + (alpha / r * (args[0].to(a.dtype) @ a.T @ b.T)).to(output.dtype)

        handles.append(module.register_forward_hook(add))
    if not factors:
        raise Unmeasured("the model has no linear layers that low-rank factors could be put on")
    with held(*handles):
        yield factors
