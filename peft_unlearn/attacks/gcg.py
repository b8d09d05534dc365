"""Greedy coordinate gradient: searches for words after the question that bring a forgotten answer back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch

from ..data.facts import words
from ..evaluation.measured import Unmeasured
from ..evaluation.teacher import evaluating, pad_id_of
from ..registry import Range, Source, attack
from .case import Case, Outcome, chosen, means
from .prompt_slot import PromptSlot, SlotTokens, embeddings_at, mean_nll, placeholder, spans, training_slots

Scope = Literal["universal", "per_row"]


@attack(
    "gcg",
    source=Source(
        "Universal and Transferable Adversarial Attacks on Aligned Language Models",
        "https://arxiv.org/abs/2307.15043",
        2023,
    ),
    needs=("logp",),
    faithful="reconstructed",
)
def gcg(
    case: Case,
    *,
    scope: Scope = "universal",
    length: Annotated[int, Range(1)] = 6,
    steps: Annotated[int, Range(1)] = 25,
    candidates: Annotated[int, Range(1)] = 48,
    top_k: Annotated[int, Range(1)] = 64,
    train_rows: Annotated[int, Range(1)] = 6,
) -> Outcome:
    """Searches for a suffix of words that makes the model answer, on shown facts, and scores it on facts not shown.

    universal: one suffix for all, trained on at most `train_rows` shown rows; about has what it does on those beside what
    it does on the scored rows, which it never saw: a suffix that only memorized answers does nothing there. per_row: one
    suffix for each of at most `train_rows` of the scored rows, trained on that row's own right answer and scored on that
    row; the attacker then knows what is looked for, so about says for how many the suffix itself spells the value.
    The loss is the mean over rows of the mean token NLL of the right answer. Every step tries `candidates` single-token
    changes out of the `top_k` most promising of each place. Only suffixes that a tokenizer reads back as the same tokens
    are tried, in every training prompt. The published search takes the best candidate even where it is worse; this one
    then stays where it is, so the loss never rises.

    Raises:
        Unmeasured: no shown rows (universal), plain text, or a tokenizer without offsets.
    """
    settings = Search(length, steps, candidates, top_k, case.seed)
    if scope == "per_row":
        return _per_row(case, settings, train_rows)
    train, slots, scored = training_slots(case, train_rows, "search a suffix")
    with case.subject() as model:
        before = case.before(model)
        found = search(model, slots, case.tokenizer, settings, partial(case.progress, "searching a suffix"))
        after = case.score(model, [slot.with_text(found.text) for slot in scored])
        trained = case.score(model, [slot.with_text(found.text) for slot in slots])
        plain = case.score(model, train)
    about = {
        "loss": {"first": found.losses[0], "least": found.losses[-1]},
        "trained_on": {"n": len(train), "before": means(plain), "after": means(trained)},
        "names_a_trained_value": any(_spells(found.text, slot) for slot in slots),
        "candidates_refused": found.refused,
    }
    return Outcome(before, after, len(case.rows), about)


def _per_row(case: Case, settings: Search, most: int) -> Outcome:
    picked = chosen(list(range(len(case.rows))), most, case.seed)
    slots = [PromptSlot.of(case.rows[i], case.tokenizer, case.template) for i in picked]
    with case.subject() as model:
        whole = case.before(model)
        found = []
        for k, slot in enumerate(slots):
            found.append(search(model, [slot], case.tokenizer, settings))
            case.progress("searching suffixes", k + 1, len(slots))
        after = case.score(model, [slot.with_text(f.text) for slot, f in zip(slots, found, strict=True)])
    first, least = (float(np.mean([f.losses[k] for f in found])) for k in (0, -1))
    about = {
        "loss": {"first": first, "least": least},
        "suffix_spells_the_value": sum(_spells(f.text, slot) for slot, f in zip(slots, found, strict=True)),
        "candidates_refused": sum(f.refused for f in found),
    }
    return Outcome({m: v[picked] for m, v in whole.items()}, after, len(picked), about)


def _spells(text: str, slot: PromptSlot) -> bool:
    value = words(str(slot.row.get("value") or ""))
    return bool(value) and value in words(text)


@dataclass(frozen=True)
class Search:
    """How to search; see `gcg`."""

    length: int
    steps: int
    candidates: int
    top_k: int
    seed: int = 0


@dataclass(frozen=True)
class Found:
    """text: the best suffix, as it is put after a question.   losses: before the first step, then after every step;
    never rising.   refused: candidates that did not survive decoding and encoding."""

    ids: list[int]
    text: str
    losses: list[float]
    refused: int


def search(
    model: Any,
    slots: Sequence[PromptSlot],
    tokenizer: Any,
    settings: Search,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The suffix of `settings.length` tokens with the least mean NLL of the slots' answers that was found."""
    ids, text = placeholder(slots, settings.length, tokenizer)
    rows = [s for slot in slots if (s := slot.tokens(text, tokenizer)) is not None]
    allowed = allowed_tokens(model, tokenizer)
    pad_id, rng = pad_id_of(tokenizer), np.random.default_rng(settings.seed)
    refused, losses = 0, []
    with evaluating(model):
        for step in range(settings.steps):
            loss, scores = token_gradient(model, rows, ids, pad_id)
            losses.append(loss)
            if not np.isfinite(loss):
                raise Unmeasured(f"the training loss of the suffix is {loss} at step {step}")
            scores = scores.masked_fill(~allowed.to(scores.device), float("inf"))
            best = scores.topk(min(settings.top_k, int(allowed.sum())), largest=False).indices.tolist()
            drawn = _draw(ids, best, settings.candidates, rng)
            tried = [c for c in drawn if survives(c, slots, tokenizer)]
            refused += len(drawn) - len(tried)
            if tried:
                with torch.no_grad():
                    every = mean_nll(model, [row.filled(c) for c in tried for row in rows], pad_id)
                average = every.view(len(tried), len(rows)).double().mean(1)  # NaN never wins
                least = int(torch.where(average.isnan(), torch.inf, average).argmin())
                if float(average[least]) < loss:
                    ids, text = tried[least], _text(tried[least], tokenizer)
            if progress is not None:
                progress(step + 1, settings.steps)
        with torch.no_grad():
            losses.append(float(mean_nll(model, [row.filled(ids) for row in rows], pad_id).double().mean()))
    # the same tokens in a batch of another shape differ in the last digits
    losses = np.minimum.accumulate(losses).tolist()
    return Found(ids, text, losses, refused)


def _draw(ids: list[int], best: list[list[int]], count: int, rng: np.random.Generator) -> list[list[int]]:
    """At most `count` different suffixes one token away from `ids`, places in turn, tokens out of each place's best."""
    out: dict[tuple[int, ...], None] = {}
    for k in range(count):
        place = k % len(ids)
        token = best[place][int(rng.integers(len(best[place])))]
        if token != ids[place]:
            out.setdefault((*ids[:place], token, *ids[place + 1 :]))
    return [list(c) for c in out]


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def survives(ids: Sequence[int], slots: Sequence[PromptSlot], tokenizer: Any) -> bool:
    """Whether these tokens, decoded after every slot's question, are encoded to the same tokens again."""
    text = _text(ids, tokenizer)
    found, bare = (spans([slot.parts(added) for slot in slots], tokenizer) for added in (text, ""))
    return all(
        s is not None and b is not None and s[1] == list(ids) and s[0] == b[0] and s[2] == b[2]
        for s, b in zip(found, bare, strict=True)
    )


def allowed_tokens(model: Any, tokenizer: Any) -> Any:
    """(vocab,) bool: tokens that a person could type: no special ones, printable when decoded alone."""
    size = model.get_input_embeddings().weight.shape[0]
    known = range(min(size, len(tokenizer)))
    texts = tokenizer.batch_decode([[i] for i in known], clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    ok = [i not in special and bool(t.strip()) and t.isprintable() and "\ufffd" not in t for i, t in enumerate(texts)]
    if not any(ok):
        raise Unmeasured("the tokenizer has no token that is printable text")
    return torch.tensor(ok + [False] * (size - len(ok)))


def token_gradient(model: Any, rows: Sequence[SlotTokens], ids: Sequence[int], pad_id: int) -> tuple[float, Any]:
    """(loss, d loss / d one-hot weights (length, vocab)) of the mean over rows of `mean_nll`, at the suffix `ids`.

    The one-hot weights multiply what the input embeddings give for each token, whatever scale or adapter they carry.
    """
    embed = model.get_input_embeddings()
    shift = torch.zeros(len(ids), embed.weight.shape[1], device=embed.weight.device, dtype=embed.weight.dtype)
    shift.requires_grad_(True)
    with torch.enable_grad(), embeddings_at(model, ids, shift, add=True):
        loss = mean_nll(model, [row.filled(ids) for row in rows], pad_id).mean()
        (grad,) = torch.autograd.grad(loss, shift)  # (length, hidden)
    with torch.no_grad():
        vocab = torch.arange(embed.weight.shape[0], device=embed.weight.device)
        scores = torch.cat([grad.float() @ embed(part[None])[0].float().T for part in vocab.split(8192)], 1)
    return float(loss.detach()), scores  # (length, vocab)
