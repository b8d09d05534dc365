"""Teacher-forced reading of answers: one forward for each (prompt, answer), from which every likelihood metric
follows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .measured import Ragged

if TYPE_CHECKING:
    from .cache import Wanted

Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class TeacherForced:
    """What one forward said about each row.

    logp: token log-probabilities of the answer, EOS included.   correct: 1.0 / 0.0 arg-max right, without the end token; NaN
    where the logits were not finite.   complete: (rows,) every target right, EOS too: greedy says exactly this answer.
    """

    logp: Ragged
    correct: Ragged
    complete: NDArray[np.bool_]
    logp_mean: Ragged  # of log p over the vocabulary under p, as logp; empty rows where nobody asked
    logp_std: Ragged
    greedy: dict[int, list[int]] = field(default_factory=dict)  # row -> greedy answer, tokens without the end token


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside; each module's own train/eval flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each at most `token_budget` padded tokens (or one row)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, token_budget // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


def logp_and_correct(z: Any, y: Any) -> Any:
    """z: (m, vocab) float32, y: (m,) -> (m, 2): log p(y), and whether y is the arg-max (NaN where z is not finite).

    Works in z's own memory: with a small model three passes over the logits cost as much as a layer.
    """
    import torch

    target = z.gather(1, y[:, None]).squeeze(1)  # (m,)
    top, best = z.max(-1)
    logp = target - top - z.sub_(top[:, None]).exp_().sum(-1).log_()
    return torch.stack([logp, torch.where(logp.isnan(), logp, (best == y).to(logp.dtype))], 1)


def _with_moments(z: Any, y: Any) -> Any:
    """The same and the mean and standard deviation of log p over the vocabulary under p: (m, 4)."""
    import torch

    target = z.gather(1, y[:, None]).squeeze(1)  # (m,)
    top, best = z.max(-1)
    d = z.sub_(top[:, None]).clamp_(min=-1e4)  # -inf has no weight, and 0 * -inf would be NaN
    weight = d.exp()
    total = weight.sum(-1)
    mean = torch.linalg.vecdot(weight, d) / total  # of z - top
    # from the deviations: the difference of two large second moments would leave nothing in float32
    d.sub_(mean[:, None])
    std = (torch.linalg.vecdot(weight.mul_(d), d) / total).sqrt_()
    logp = target - top - total.log()
    correct = torch.where(logp.isnan(), logp, (best == y).to(logp.dtype))
    return torch.stack([logp, correct, mean - total.log(), std], 1)


def read_encoded(
    model: Any,
    encoded: Sequence[Encoded],
    pad_id: int,
    ends: Container[int] = (),
    token_budget: int = 4096,
    progress: Callable[[int, int], None] | None = None,
    moments: NDArray[np.bool_] | None = None,
    readable: NDArray[np.bool_] | None = None,
    decode: Mapping[int, Wanted] | None = None,
    stops: set[int] | None = None,
) -> TeacherForced:
    """`teacher_forced` for rows that are tokens already (`data.collate.encode`). What rows begin with is read once, where the model
    allows it (`cache`).

    ends: tokens that are no part of an answer's body where they are its last target (`data.chat.end_tokens`).
    readable: (rows,) False where the model cannot read a row; it stays empty. Default all.
    moments: (rows,) where `logp_mean` and `logp_std` are wanted too; they cost two more passes over the logits.
    decode: row -> the greedy answer that is wanted of it; those that could be given are in `greedy`.   stops: tokens that end one.
    """
    import torch

    from .cache import Reader

    nothing: list[NDArray[Any]] = [np.zeros(0)] * len(encoded)
    logp, correct, mean, std = (list(nothing) for _ in range(4))
    complete, greedy = np.zeros(len(encoded), dtype=np.bool_), {}
    more = np.zeros(len(encoded), dtype=np.bool_) if moments is None else moments
    done = 0
    with torch.no_grad(), evaluating(model):
        for wanted in (True, False):
            mine = np.flatnonzero((more == wanted) & (True if readable is None else readable)).tolist()
            reader = Reader(model, encoded, mine, pad_id, decode or {}, stops or set())
            look = _with_likeliest(_with_moments if wanted else logp_and_correct)
            for rows in reader.batches(token_budget):
                p, go_on = reader.read(rows)
                # (n, 3 or 5), row after row
                columns = p.map_logits(look).double().cpu().numpy()
                parts = np.split(columns, np.cumsum(p.mask.sum(1).cpu().numpy())[:-1])
                for i, part in zip(rows, parts, strict=True):
                    logp[i], correct[i] = part[:, 0], part[: body(encoded[i], ends), 1]
                    complete[i] = bool((part[:, 1] == 1.0).all())
                    if wanted:
                        mean[i], std[i] = part[:, 2], part[:, 3]
                go_on([(part[:, 1], part[:, -1]) for part in parts])
                done += len(rows)
                if progress is not None:
                    progress(done, len(encoded))
            greedy.update(reader.greedy)
    return TeacherForced(Ragged.of(logp), Ragged.of(correct), complete, Ragged.of(mean), Ragged.of(std), greedy)


def _with_likeliest(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`fn` with the likeliest token as one more column (exact in float32: no vocabulary has 2 ** 24 tokens)."""
    import torch

    def look(z: Any, y: Any) -> Any:
        best = z.argmax(-1).to(z.dtype)  # first: fn works in z's memory
        return torch.cat([fn(z, y), best[:, None]], 1)

    return look


def body(row: Encoded, ends: Container[int]) -> int | None:
    """Where a row's targets end without the end token: -1, or None (a row cut at max_length has none)."""
    return -1 if row["labels"][-1] in ends else None


def pad_id_of(tokenizer: Any) -> int:
    """Any id will do for padding: it is masked and right of everything."""
    return int(next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None))


def teacher_forced(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    token_budget: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherForced:
    """Read every (prompt, answer) once, in batches of like length, without gradients and without a (batch, seq,
    vocab) tensor.

    rows: (prompt, answer) as `data.formats.to_text` makes them.   token_budget: padded tokens in a batch.
    progress: called as progress(done, total). The result is in the order of `rows`.
    """
    from ..data.chat import end_tokens
    from ..data.collate import encode

    encoded = [encode(prompt, answer, tokenizer)[0] for prompt, answer in rows]
    return read_encoded(model, encoded, pad_id_of(tokenizer), end_tokens(tokenizer), token_budget, progress)
