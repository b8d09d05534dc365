"""Linear probe: whether the forgotten value can still be read off the hidden states, whatever the model says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..data.collate import encode
from ..data.formats import to_text
from ..evaluation.measured import Array, Unmeasured
from ..evaluation.plan import rows_of
from ..evaluation.teacher import evaluating, pad_id_of, teacher_forced
from ..registry import Range, Source, attack
from .case import Case, Outcome, chosen

Position = Literal["before_value", "question"]
LayerBy = Literal["retain", "shown"]
RIDGE = (1e-3, 1e-2, 1e-1, 1.0)  # times the number of rows
FOLDS = 5


@attack(
    "probe",
    source=Source("Eight Methods to Evaluate Robust Unlearning in LLMs", "https://arxiv.org/abs/2402.16835", 2024),
    needs=("hidden",),
    faithful="reconstructed",
)
def probe(
    case: Case,
    *,
    position: Position = "before_value",
    layer_by: LayerBy = "retain",
    candidates: Annotated[int, Range(2)] = 16,
    train_rows: Annotated[int, Range(10)] = 1000,
) -> Outcome:
    """Trains a linear probe on retain facts and lets it choose the forget facts' values out of a list.

    A ridge regression from the hidden states of one layer to the embedding of the value's first token is trained on retain
    rows that ask the same kind of question, and picks among `candidates` values of that kind the nearest to what it reads
    on a forget row. It regresses on embeddings because a classifier could never name a value that no retain row has. Layer
    and ridge are those with the best cross-validated choice on retain rows (no person in two folds); forget rows decide
    nothing. layer_by "shown" lets the attacker take the layer with the best mean rank on the shown forget rows instead: on
    retain rows the last layers always win, and those are where suppression is strongest.
    before: which of the same candidates the model itself gives the highest mean token log-probability, as an answer.
    after: which the probe picks. Measures: pool_choice, 1 where it is the right one (1/k where k share the best score);
    pool_rank, the share of wrong candidates below the right one (chance: 0.5).
    about: the choice at every layer, the probe trained on shuffled values, chance, and the most that a probe of first tokens
    can reach where candidates begin alike.

    position: the last token before the value inside the right answer, or the last of the question, where a model that
    answers in sentences has not looked its fact up yet.
    train_rows: at most so many retain rows.

    Raises:
        Unmeasured: rows without 'value', values not in their answers, or no retain rows that ask alike.
    """
    scored = _asked(case.rows, case, "forget")
    kinds = {a.kind for a in scored}
    shown = [a for a in _asked(case.shown, case, None) if a.kind in kinds] if layer_by == "shown" else []
    if layer_by == "shown" and not shown:
        raise Unmeasured(
            "no forget rows were shown to the attacker that ask what the scored rows ask: layer_by is 'shown'"
        )
    pool = [a for a in _asked(rows_of(case.data, "retain") or [], case, None) if a.kind in kinds]
    if missing := kinds - {a.kind for a in pool}:
        raise Unmeasured(
            f"{sum(a.kind in missing for a in scored)} of {len(scored)} rows ask what no retain row asks: there is "
            "nothing to train a probe on"
        )
    train = chosen(pool, train_rows, case.seed)
    if len({a.owner for a in train}) < FOLDS:
        raise Unmeasured(
            f"the retain rows that ask alike are about fewer than {FOLDS} subjects: no layer can be chosen"
        )
    values: dict[str, list[str]] = {}
    for a in [*train, *shown, *scored]:
        values.setdefault(a.kind, []).append(a.value)
    lists = {kind: sorted(set(found)) for kind, found in values.items()}
    if short := [kind for kind, found in lists.items() if len(found) < 2]:
        raise Unmeasured(f"there is one value only to choose from where the question is {short[0]!r}")
    rng = np.random.default_rng(case.seed)
    train_lists = [_candidates(a, lists[a.kind], candidates, rng) for a in train]
    lists_of = [_candidates(a, lists[a.kind], candidates, rng) for a in scored]
    shown_lists = [_candidates(a, lists[a.kind], candidates, rng) for a in shown]
    with case.subject() as model:
        case.tell("reading the candidates", 0, 2)
        before = _own_choice(model, case.tokenizer, scored, lists_of)
        case.tell("reading hidden states", 1, 2)
        states = [_hidden(model, case.tokenizer, rows, position) for rows in (train, scored, shown) if rows]
        vectors = _first_token(model, case.tokenizer, {v for found in lists.values() for v in found})
        case.tell("reading hidden states", 2, 2)
    clues = (states[2], shown_lists) if shown else None
    fitted = _fit_all(states[0], train, train_lists, states[1], lists_of, vectors, case.seed, clues)
    ceiling = float(np.mean([1 / sum(np.array_equal(vectors[v], vectors[c[0]]) for v in c) for c in lists_of]))
    about = {
        "layer": fitted.layer,
        "ridge": fitted.ridge,
        "trained_on": {"n": len(train), "cross_validated_choice": fitted.retain},
        "choice_by_layer": fitted.by_layer,
        "shuffled_values": fitted.shuffled,
        "shown_to_choose_the_layer": len(shown),
        "chance": float(np.mean([1 / len(c) for c in lists_of])),
        "ceiling": ceiling,
        "values_in_no_training_row": sum(a.value not in {b.value for b in train if b.kind == a.kind} for a in scored),
    }
    return Outcome(before, fitted.after, len(scored), about)


@dataclass(frozen=True)
class Asked:
    """A row as the probe sees it. kind: its question without the subject; owner: whose fact it is."""

    kind: str
    owner: str
    value: str
    prompt: str
    stem: str
    tail: str

    def answer(self, value: str) -> str:
        return self.stem + value + self.tail


def _asked(rows: Sequence[Mapping[str, Any]], case: Case, must: str | None) -> list[Asked]:
    """The rows whose answer holds their value; with `must` all have to."""
    out, lost = [], 0
    for i, row in enumerate(rows):
        prompt, answer = to_text(row, case.tokenizer, case.template)
        value, subject = str(row.get("value") or ""), str(row.get("subject") or "")
        at = answer.casefold().find(value.casefold()) if value and prompt else -1
        if at < 0:
            lost += 1
            continue
        kind = re.sub(re.escape(subject), "{}", prompt) if subject else ""
        stop = at + len(value)
        out.append(Asked(kind, subject or f"row {i}", answer[at:stop], prompt, answer[:at], answer[stop:]))
    if must and lost:
        raise Unmeasured(f"{lost} of {len(rows)} {must} rows have no 'value' that stands in their answer")
    return out


def _candidates(a: Asked, values: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """The right value first, then others of its kind."""
    others = [v for v in values if v != a.value]
    picked = rng.permutation(len(others))[: count - 1]
    return [a.value, *(others[i] for i in sorted(picked))]


def _own_choice(model: Any, tokenizer: Any, rows: Sequence[Asked], lists: Sequence[Sequence[str]]) -> dict[str, Array]:
    pairs = [(a.prompt, a.answer(v)) for a, found in zip(rows, lists, strict=True) for v in found]
    means = teacher_forced(model, tokenizer, pairs).logp.mean()
    ends = np.cumsum([len(found) for found in lists])
    return _measures(np.split(means, ends[:-1]))


def _measures(scores: Sequence[Array]) -> dict[str, Array]:
    """scores: per row one for each candidate, the right one first. NaN where a score is."""
    choice, rank = np.empty(len(scores)), np.empty(len(scores))
    for i, s in enumerate(scores):
        if not np.all(np.isfinite(s)):
            choice[i] = rank[i] = np.nan
            continue
        near = 1e-9 * max(1.0, float(np.abs(s).max()))  # candidates that begin alike get one score up to rounding
        best = s >= s.max() - near
        same = np.abs(s[1:] - s[0]) <= near
        choice[i] = 1 / best.sum() if best[0] else 0.0
        rank[i] = (np.sum((s[1:] < s[0]) & ~same) + same.sum() / 2) / (len(s) - 1)
    return {"pool_choice": choice, "pool_rank": rank}


def _hidden(model: Any, tokenizer: Any, rows: Sequence[Asked], position: Position) -> Array:
    """(layers, rows, hidden) float64: outputs of every block at the position that is read."""
    import torch

    from ..data.collate import pad
    from ..evaluation.teacher import batches
    from ..forward import Pass, blocks

    encoded = []
    for a in rows:
        stem = a.stem if position == "before_value" else ""
        kept = stem.rstrip()  # the blank belongs to the value's first token
        encoded.append(encode(a.prompt + kept, stem[len(kept) :] + a.answer(a.value)[len(stem) :], tokenizer)[0])
    layers = list(range(len(blocks(model))))
    device = model.get_input_embeddings().weight.device
    out: list[Any] = [None] * len(rows)
    with torch.no_grad(), evaluating(model):
        for batch in batches([len(row["input_ids"]) for row in encoded], 4096):
            tensors = {k: v.to(device) for k, v in pad([encoded[i] for i in batch], pad_id_of(tokenizer)).items()}
            p = Pass(model, tensors, layers=layers, stop=True)
            last = (tensors["labels"] != -100).int().argmax(1) - 1  # (batch,) before the first target
            rows_at = torch.arange(len(batch), device=device)
            for k, i in enumerate(batch):
                out[i] = [p.hidden(layer)[rows_at[k], last[k]].double().cpu().numpy() for layer in layers]
    return np.asarray(out).transpose(1, 0, 2)


def _first_token(model: Any, tokenizer: Any, values: set[str]) -> dict[str, Array]:
    """Value -> (hidden,) input embedding of its first token after a blank that is not itself blank."""
    import torch

    embed = model.get_input_embeddings()
    order = sorted(values)
    first = []
    for v in order:
        ids = tokenizer(" " + v, add_special_tokens=False)["input_ids"]
        first.append(next((i for i in ids if tokenizer.decode([i]).strip()), ids[0]))
    with torch.no_grad():
        told = embed(torch.tensor([first], device=embed.weight.device))[0].double().cpu().numpy()
    return dict(zip(order, told, strict=True))


@dataclass(frozen=True)
class Fitted:
    """after: of the chosen layer and ridge.   by_layer: mean pool_choice on the scored rows, each layer at its own best
    ridge on retain rows.   retain: cross-validated choice of the chosen layer.   shuffled: means of the control."""

    layer: int
    ridge: float
    retain: float
    after: dict[str, Array]
    by_layer: list[float]
    shuffled: dict[str, float]


def _fit_all(
    seen: Array,
    train: Sequence[Asked],
    train_lists: Sequence[Sequence[str]],
    unseen: Array,
    lists: Sequence[Sequence[str]],
    vectors: Mapping[str, Array],
    seed: int,
    clues: tuple[Array, Sequence[Sequence[str]]] | None = None,
) -> Fitted:
    """clues: hidden states and candidates of shown rows, where those choose the layer."""
    if not (np.all(np.isfinite(seen)) and np.all(np.isfinite(unseen))):
        raise Unmeasured("hidden states of the model are not finite")
    targets = np.stack([vectors[a.value] for a in train])  # (rows, hidden)
    fold = _folds([a.owner for a in train], seed)
    retain, ridges, by_layer, afters, ranks = [], [], [], [], []
    for at, (x, x_new) in enumerate(zip(seen, unseen, strict=True)):
        means = np.zeros(len(RIDGE))
        for k in range(FOLDS):
            held = np.flatnonzero(fold == k)
            offered = [train_lists[int(i)] for i in held]
            read = ridge_predict(x[fold != k], targets[fold != k], x[held], RIDGE)
            means += [_choose(r, offered, vectors)["pool_choice"].sum() for r in read]
        best = int(np.argmax(means))
        retain.append(float(means[best] / len(train)))
        ridges.append(RIDGE[best])
        afters.append(_choose(ridge_predict(x, targets, x_new, [RIDGE[best]])[0], lists, vectors))
        by_layer.append(float(afters[-1]["pool_choice"].mean()))
        if clues is not None:
            read = ridge_predict(x, targets, clues[0][at], [RIDGE[best]])[0]
            ranks.append(float(_choose(read, clues[1], vectors)["pool_rank"].mean()))
    layer = int(np.argmax(ranks or retain))
    rng = np.random.default_rng(seed)
    mixed = []
    for _ in range(5):  # values change hands among rows of one kind
        order = np.arange(len(train))
        for kind in {a.kind for a in train}:
            of = np.flatnonzero([a.kind == kind for a in train])
            order[of] = rng.permutation(of)
        read = ridge_predict(seen[layer], targets[order], unseen[layer], [ridges[layer]])[0]
        mixed.append({m: float(v.mean()) for m, v in _choose(read, lists, vectors).items()})
    shuffled = {m: float(np.mean([d[m] for d in mixed])) for m in mixed[0]}
    return Fitted(layer, ridges[layer], retain[layer], afters[layer], by_layer, shuffled)


def _folds(owners: Sequence[str], seed: int) -> NDArray[np.int64]:
    """(rows,) fold of each row; all rows of an owner share one."""
    names = sorted(set(owners))
    place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)) % FOLDS, strict=True))
    return np.array([place[owner] for owner in owners])


def ridge_predict(x: Array, y: Array, x_new: Array, ridges: Sequence[float]) -> list[Array]:
    """Predictions (new, outputs) of ridge regressions of y (rows, outputs) on standardized x (rows, features) with an
    unpenalized intercept, one for each penalty (times the number of rows).

    One eigendecomposition of the smaller Gram matrix serves all penalties.
    """
    import torch

    a, t, b = (torch.from_numpy(np.ascontiguousarray(v)) for v in (x, y, x_new))
    mean, spread = a.mean(0), a.std(0, correction=0).clamp_min(1e-12)
    a, b, center = (a - mean) / spread, (b - mean) / spread, t.mean(0)
    if a.shape[0] > a.shape[1]:
        eigen, basis = torch.linalg.eigh(a.T @ a)
        left, right = b @ basis, basis.T @ (a.T @ (t - center))
    else:
        eigen, basis = torch.linalg.eigh(a @ a.T)
        left, right = (b @ a.T) @ basis, basis.T @ (t - center)
    eigen = eigen.clamp_min(0)[:, None]
    return [(left @ (right / (eigen + r * len(a))) + center).numpy() for r in ridges]


def _choose(read: Array, lists: Sequence[Sequence[str]], vectors: Mapping[str, Array]) -> dict[str, Array]:
    """Candidates by nearness to what was read."""
    return _measures(
        [-np.square(np.stack([vectors[v] for v in found]) - r).sum(1) for r, found in zip(read, lists, strict=True)]
    )
