"""Vectors instead of words after the question: what an attacker with the open weights can do without training them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch

from ..evaluation.measured import Unmeasured
from ..evaluation.teacher import evaluating, pad_id_of
from ..registry import Range, Source, attack
from .case import Case, Outcome, means
from .prompt_slot import embeddings_at, mean_nll, placeholder, training_slots

Steps = Literal["adam", "sign"]


@attack(
    "suffix",
    source=Source(
        "Soft Prompt Threats: Attacking Safety Alignment and Unlearning in Open-Source LLMs through the Embedding Space",
        "https://arxiv.org/abs/2402.09063",
        2024,
    ),
    needs=("logp",),
    faithful="reconstructed",
)
def suffix(
    case: Case,
    *,
    length: Annotated[int, Range(1)] = 4,
    steps: Annotated[int, Range(1)] = 60,
    learning_rate: Annotated[float, Range(0, None, open_low=True)] = 0.1,
    optimizer: Steps = "adam",
    train_rows: Annotated[int, Range(1)] = 20,
) -> Outcome:
    """Trains a few embedding vectors after the question on shown facts, and scores them on facts not shown.

    One universal suffix of `length` vectors (length, hidden) minimizes the mean over rows of the mean token NLL of the
    shown rows' right answers; the vectors of the step with the least loss are then put after the scored rows' questions.
    Nothing of the model moves. about says what the suffix does on the rows that it was trained on, too: it is strong
    enough to write answers into a model that never knew them (arXiv 2502.15836), so that number alone is no evidence,
    and neither is any number without the retain model's beside it.

    steps, learning_rate, optimizer: "sign" takes the published signed gradient steps, "adam" Adam (the default here: it
    needs fewer). The published attack also counts a fact as found if any step on the way yields it; here the best step
    alone is scored.
    train_rows: at most so many of the shown rows.

    Raises:
        Unmeasured: no shown rows, plain text, or a tokenizer without offsets.
    """
    train, slots, scored = training_slots(case, train_rows, "train a suffix")
    run, filler = placeholder([*slots, *scored], length, case.tokenizer)
    rows = [s.filled(run) for slot in slots if (s := slot.tokens(filler, case.tokenizer)) is not None]
    with case.subject() as model:
        before = case.before(model)
        vectors, losses = fit(
            model, rows, run, pad_id_of(case.tokenizer), steps, learning_rate, optimizer,
            progress=partial(case.progress, "training the suffix"),
        )  # fmt: skip
        with embeddings_at(model, run, vectors):
            after = case.score(model, [slot.with_text(filler) for slot in scored])
            trained = case.score(model, [slot.with_text(filler) for slot in slots])
        plain = case.score(model, train)
    best = min(range(len(losses)), key=losses.__getitem__)
    about = {
        "loss": {"first": losses[0], "least": losses[best], "at_step": best},
        "trained_on": {"n": len(train), "before": means(plain), "after": means(trained)},
    }
    return Outcome(before, after, len(case.rows), about)


def fit(
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    run: Sequence[int],
    pad_id: int,
    steps: int,
    learning_rate: float,
    optimizer: Steps = "adam",
    progress: Any = None,
) -> tuple[Any, list[float]]:
    """(vectors (length, hidden) float32 with the least loss, losses before each step and after the last: steps + 1).

    rows: encoded rows that hold `run` once, whose embeddings the vectors replace; they start as `run`'s own. The loss is
    the mean of `mean_nll`. The model's parameters and their gradients are not touched.
    """
    embed = model.get_input_embeddings()
    with torch.no_grad():
        start = embed(torch.tensor([list(run)], device=embed.weight.device))[0].float()
    vectors = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([vectors], lr=learning_rate) if optimizer == "adam" else None
    best, losses = start, []
    with evaluating(model), embeddings_at(model, run, vectors):
        for step in range(steps + 1):
            with torch.enable_grad():
                loss = mean_nll(model, rows, pad_id).mean()
                (grad,) = torch.autograd.grad(loss, vectors)
            losses.append(float(loss.detach()))
            if not losses[-1] < float("inf"):
                raise Unmeasured(f"the training loss of the suffix is {losses[-1]} at step {step}")
            if losses[-1] <= min(losses):
                best = vectors.detach().clone()
            with torch.no_grad():
                if adam is None:
                    vectors -= learning_rate * grad.sign()
                else:
                    vectors.grad = grad
                    adam.step()
            if progress is not None:
                progress(step, steps)
    return best, losses
