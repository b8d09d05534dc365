"""Fine-tuning, on a few forget rows or on something unrelated: whether the other forget facts come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..data.collate import encode, pad, padding_id
from ..data.formats import to_text
from ..errors import UserError
from ..evaluation.measured import Array, Unmeasured
from ..evaluation.rows import rows_of
from ..evaluation.teacher import evaluating
from ..folder.schema import is_number
from ..forward import Pass
from ..head import causal_lm, held
from ..registry import Range, Source, attack
from ..tuners.bypass import refuse_bypass
from .case import MEASURES, Case, Outcome, Rows, chosen, mean, means
from .weights import base_parameters, linears, opened

SMOOTH = Source(
    "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization Perspective and Beyond",
    "https://arxiv.org/abs/2502.05374",
    2025,
)
BENIGN = Source(
    "Unlearning or Obfuscating? Jogging the Memory of Unlearned LLMs via Benign Relearning",
    "https://arxiv.org/abs/2406.13356",
    2025,
)
Weights = Literal["full", "lora"]


@attack("relearn", source=SMOOTH)
def relearn(
    case: Case,
    *,
    rows: Annotated[int, Range(1)] = 20,
    steps: list[int] = [20],  # noqa: B006
    learning_rate: list[float] = [3e-4],  # noqa: B006
    batch: Annotated[int, Range(1)] = 20,
    weights: Weights = "full",
    r: Annotated[int, Range(1)] = 8,
    lora_alpha: Annotated[float, Range(0)] = 32.0,
) -> Outcome:
    """Fine-tunes on a few forget rows and asks for the facts that were not among them.

    rows: forget rows shown.   steps: optimizer steps, each on `batch` rows dealt from permutations of those shown;
    several: looked at after each.   learning_rate: of AdamW without weight decay; several: each anew. Of all
    looks the strongest is the outcome (per subject, so on the retain model too), and all stand in `about`.
    weights: full = every weight of the model with the adapter merged; lora = rank r on every linear layer, on top.
    The loss is the mean negative log-likelihood of the answers' tokens. Raises `Unmeasured` where no row is shown.
    """
    if not case.shown:
        raise Unmeasured("the forget set has no fact to spare: all that could be shown would have to be scored")
    tuning = Tuning("relearn", steps, learning_rate, batch, weights, r, lora_alpha)
    return tuned(case, chosen(case.shown, rows, case.seed), tuning)


@attack("benign", source=BENIGN, faithful="reconstructed")
def benign(
    case: Case,
    *,
    source: Literal["auto", "general", "retain"] = "auto",
    rows: Annotated[int, Range(1)] = 100,
    steps: list[int] = [20],  # noqa: B006
    learning_rate: list[float] = [3e-4],  # noqa: B006
    batch: Annotated[int, Range(1)] = 20,
    weights: Weights = "full",
    r: Annotated[int, Range(1)] = 8,
    lora_alpha: Annotated[float, Range(0)] = 32.0,
) -> Outcome:
    """Fine-tunes on rows that have nothing to do with the forget set, and asks for the forget facts.

    source: general = the bundle's set of that name, retain = the retain set, whose questions may be worded like the forget
    questions (likeness of wording, more than of subject, is what brings things back: arXiv 2602.03379); auto = general,
    or retain where there is none.   rows: at most so many of it. The other settings are those of `relearn`. Raises
    `Unmeasured` where there is no such set.
    """
    name, found = _unrelated(case, source)
    tuning = Tuning("benign", steps, learning_rate, batch, weights, r, lora_alpha)
    outcome = tuned(case, chosen(found, rows, case.seed), tuning)
    outcome.about["set"] = name
    return outcome


def _unrelated(case: Case, source: str) -> tuple[str, Rows]:
    for name in ("general", "retain") if source == "auto" else (source,):
        if found := rows_of(case.data, name):
            return name, found
    wanted = "neither general rows nor a retain set" if source == "auto" else f"no {source} set"
    raise Unmeasured(f"the data have {wanted}")


@dataclass(frozen=True)
class Tuning:
    """Settings of a fine-tuning; see `relearn`."""

    what: str
    steps: Sequence[int]
    rates: Sequence[float]
    batch: int
    weights: Weights
    r: int
    lora_alpha: float

    def check(self) -> None:
        """Raise `UserError` for lists that hold anything else than numbers from 0 up."""
        for name, values, kind in (("learning_rate", self.rates, (int, float)), ("steps", self.steps, (int,))):
            good = all(is_number(x) and isinstance(x, kind) and 0 <= x < math.inf for x in values)
            if not good or not values:
                raise UserError(f"{self.what}.{name}: wanted numbers from 0 up, one or a list, not {list(values)!r}")


def tuned(case: Case, rows: Rows, tuning: Tuning) -> Outcome:
    """The case's subject before and after fine-tuning on `rows`; the model is as before when it returns."""
    tuning.check()
    looks: list[dict[str, Any]] = []
    best: dict[str, Array] | None = None
    about: dict[str, Any] = {"rows": len(rows)}
    with case.subject() as model:
        before = case.before(model)
        lead = next(m for m in MEASURES if m in before)
        for rate in tuning.rates:
            with _writable(case, model, tuning) as (parameters, about["adapter"]):
                about["parameters"] = sum(p.numel() for p in parameters)
                for step, loss in finetune(case, model, parameters, rows, tuning, rate):
                    after = case.score(model)
                    looks.append({"learning_rate": rate, "steps": step, "loss": loss, "after": means(after)})
                    if best is None or (mean(after[lead]) or 0.0) > (mean(best[lead]) or 0.0):
                        best, about["strongest"] = after, {"learning_rate": rate, "steps": step}
    assert best is not None
    return Outcome(before, best, len(case.rows), {**about, "looks": looks})


@contextmanager
def _writable(case: Case, model: Any, tuning: Tuning) -> Iterator[tuple[list[Any], str]]:
    """(what is trained, how the adapter takes part); afterwards the model is as before."""
    if tuning.weights == "lora":
        with low_rank(model, tuning.r, tuning.lora_alpha, case.seed) as factors:
            yield factors, "live"
    else:
        parameters = base_parameters(model)
        with opened(model, parameters, case.checkpoint) as adapter:
            yield list(parameters.values()), adapter


def finetune(
    case: Case, model: Any, parameters: Sequence[Any], rows: Rows, tuning: Tuning, rate: float
) -> Iterator[tuple[int, float | None]]:
    """Minimize the mean negative log-likelihood of the rows' answers over `parameters`, in place.

    Yields (steps done, loss of the last batch) after each number of steps that `tuning` names, with nothing requiring a
    gradient meanwhile. Raises `Unmeasured` where the loss is not finite.
    """
    texts = (to_text(row, case.tokenizer, case.template) for row in rows)
    encoded = [encode(*text, case.tokenizer)[0] for text in texts]  # as training sees them
    pad_id = padding_id(case.tokenizer)
    device = model.get_input_embeddings().weight.device
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order = _dealt(len(encoded), case.seed)
    marks, loss = sorted(set(tuning.steps)), None
    for step in range(marks[-1] + 1):
        if step in marks:
            yield step, loss
        if step == marks[-1]:
            return
        some = [encoded[next(order)] for _ in range(min(tuning.batch, len(encoded)))]
        tensors = {k: v.to(device) for k, v in pad(some, pad_id).items()}
        _require(parameters, True)
        try:
            with evaluating(model), torch.enable_grad():  # no dropout: the same steps for every subject
                nll = -Pass(model, tensors).logp.mean()
                loss = float(nll.detach())
                if not math.isfinite(loss):
                    raise Unmeasured(f"the loss is {loss} at step {step} of fine-tuning at rate {rate:g}")
                nll.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            _require(parameters, False)
        case.progress(f"{tuning.what} {rate:g}", step + 1, marks[-1])


def _require(parameters: Sequence[Any], flag: bool) -> None:
    for p in parameters:
        p.requires_grad_(flag)


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
    from transformers.pytorch_utils import Conv1D

    refuse_bypass(model, "relearning with weights: lora")
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
