"""How deep it was forgotten: does the base still read the fact out of the unlearned model's hidden states?

At the positions that predict the fact's tokens, the output of block l of the base is replaced by the same model's output of
block l under the unlearned model, and the base's blocks above l and its head go on. What log-probability the fact has then is
what the unlearned model still carries at depth l. Idea and score: Unlearning Depth Score, arXiv 2605.24614.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import numpy as np

from ...registry import Range, metric
from ..measured import UNIT, Array, Estimate, Unmeasured, mean_of_defined
from ..provider import Context, provider
from ..shapes import Measured, Plan, SetPlan
from ..teacher import Encoded, batches, evaluating, pad_id_of
from .sources import UDS


def depth_scores(base: Array, patched: Array, reference: Array, tau: float = 0.05) -> Array:
    """Depth score of each row: 1 = in every layer as gone as in a model that never learned it, 0 = all still there.

    base: (rows,) mean log-probability of the fact's tokens under the base.   patched: (rows, layers) the same when the
    base goes on from the unlearned model's hidden states after block l.   reference: (rows, layers) from the
    retain model's. With drops D = base - reference and d = base - patched, the score is
    sum D clip(d / D, 0, 1) / sum D over the layers where D > tau nats: those by which the base has come to know more
    than the retain model. Returns (rows,) in [0, 1]; NaN for a row without such a layer: nothing there could be
    forgotten. Higher is better on a forget set, lower on a retain set.
    """
    lacking = base[:, None] - reference
    known = lacking > tau
    with np.errstate(invalid="ignore", divide="ignore"):
        gone = np.clip((base[:, None] - patched) / lacking, 0.0, 1.0)
        score = np.where(known, lacking * gone, 0.0).sum(1) / np.where(known, lacking, 0.0).sum(1)
    bad = np.isnan(base) | np.isnan(patched).any(1) | np.isnan(reference).any(1)
    return np.where(bad, np.nan, score)


def recovered(base: Array, patched: Array, reference: Array, tau: float = 0.05) -> Array:
    """(layers,) how much of the fact comes back at each layer, over all rows: 1 = as much as the base has, 0 = as little as
    the retain model.

    base: (rows,), patched, reference: (rows, layers), as for `depth_scores`. The ratio of the sums
    (patched - reference) / (base - reference), so that rows of which the base knew little weigh little; not clipped: below 0
    it is suppressed further than never learned. NaN for a layer where base and reference differ by less than tau nats on
    average: there is no fact there to recover.
    """
    lacking = (base[:, None] - reference).mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lacking > tau, (patched - reference).mean(0) / lacking, np.nan)


NOTHING = "the base knows no fact here by more than tau nats better than the retain model, in any layer"


Tau = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


def check_readable(
    fact_logp: Array, reference: Array, known_fact_logp: Array, known_reference: Array, unreadable: float
) -> None:
    """Whether the base can read the retain model's hidden states at all.

    fact_logp (rows,), reference (rows, layers): of the set in question; known_..: of rows that both models know. What the
    base loses with the reference's states counts as missing knowledge only as far as it is not lost on those rows too.
    Raises Unmeasured where more than the share `unreadable` of it is: then the two models differ in coordinates, not in facts.
    """
    lost = np.clip((fact_logp[:, None] - reference).mean(0), 0, None).sum()
    also = np.clip((known_fact_logp[:, None] - known_reference).mean(0), 0, None).sum()
    if also > unreadable * lost:
        share = f"{also / lost:.0%} as much" if lost > 0 else "more"
        raise Unmeasured(
            f"the base cannot read the retain model's hidden states: on rows that both know {share} is lost as here; the two "
            "must come from one pretrained model"
        )


@metric("unlearning_depth", source=UDS, better={"forget": "higher"}, needs=("depth", "pair"), faithful="reconstructed")
def unlearning_depth(
    fact_logp: Array,
    patched_logp: Array,
    reference_patched_logp: Array,
    against_fact_logp: Array,
    reference_against_patched_logp: Array,
    *,
    tau: Tau = 0.05,
    unreadable: Share = 0.25,
) -> Array | Estimate:
    """Depth score: 1 = in every layer as gone as in the retain model, 0 = the base still reads all of it out.

    `depth_scores` on hidden states of this model, of the retain model, and the base's own reading. Rows of which the
    base knows nothing more than the retain model are left out; n counts the others. Adapted from the paper, which has
    the same score, patches and tau as far as the authors' public code shows: there each row comes with an annotated span,
    here it is the row's `value` in the answer (the whole answer where the row has none). The prompt's positions are not
    patched, so blocks above still see the base's own reading of the question, with any source. Ours: the suite's `against`
    names rows that both know, and `check_readable` refuses a reference that the base cannot read even there.
    """
    check_readable(fact_logp, reference_patched_logp, against_fact_logp, reference_against_patched_logp, unreadable)
    values = depth_scores(fact_logp, patched_logp, reference_patched_logp, tau)
    known = np.any(fact_logp[:, None] - reference_patched_logp > tau, axis=1)
    broken = np.any(np.isnan(np.column_stack([fact_logp, patched_logp, reference_patched_logp])), axis=1)
    return mean_of_defined(values, np.logical_or(known, broken), NOTHING)


@metric("fact_recovered", source=UDS, better={"forget": "lower"}, needs=("depth", "pair"), faithful="reconstructed")
def fact_recovered(
    fact_logp: Array,
    patched_logp: Array,
    reference_patched_logp: Array,
    against_fact_logp: Array,
    reference_against_patched_logp: Array,
    *,
    tau: Tau = 0.05,
    unreadable: Share = 0.25,
) -> float:
    """The most that comes back at any layer, `recovered`: 1 = as much as the base has, 0 = as a model that never learned it.

    The ratio of sums over rows at the layer where it is largest; only layers count where the retain model lacks the
    fact by more than tau nats on average. The same check of the reference as in `unlearning_depth`.
    """
    check_readable(fact_logp, reference_patched_logp, against_fact_logp, reference_against_patched_logp, unreadable)
    curve = recovered(fact_logp, patched_logp, reference_patched_logp, tau)
    if np.isnan(curve).all():
        raise Unmeasured(NOTHING)
    return float(np.nanmax(curve))


@metric("suppression_depth", within=UNIT, source=UDS, better={"forget": "higher"}, faithful="reconstructed")
def suppression_depth(fact_logp: Array, patched_logp: Array, *, tau: Tau = 0.05) -> Array | Estimate:
    """How early the fact goes, without a retain model: 1 = in the first block, 1 / layers = only in the last.

    Mean over layers of clip((base - patched after block l) / (base - patched after the last block), 0, 1): the share of
    what this model lacks in the end that its hidden states lack already. Rows that lose at most tau nats are left out; n
    counts the others. Ours, from the same patches as `unlearning_depth`; it says where, not how thoroughly.
    """
    lost = fact_logp[:, None] - patched_logp
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.clip(lost / lost[:, -1:], 0.0, 1.0).mean(1)
    return mean_of_defined(values, ~(lost[:, -1] <= tau), "no row lost more than tau nats")


# --- reading ----------------------------------------------------------------------------------------------------------

Opened = Callable[[], AbstractContextManager[Any]]


def fact_row(prompt: str, answer: str, value: str | None, tokenizer: Any) -> Encoded:
    """Tokens of (prompt, answer); targets are the tokens of `value` in the answer, or all of the answer where it does not
    stand there. EOS is no target."""
    from ...data.collate import adds_special, encode

    row = encode(prompt, answer, tokenizer)[0]
    ids, labels = row["input_ids"], list(row["labels"])
    if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        labels[-1] = -100
    found = re.search(re.escape(value), answer, re.IGNORECASE) if value else None
    if found and getattr(tokenizer, "is_fast", False):
        text = prompt + answer
        special = adds_special(text, tokenizer)
        offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special)["offset_mapping"]
        low, high = len(prompt) + found.start(), len(prompt) + found.end()
        inside = [end > low and start < high for start, end in offsets] + [False] * (len(ids) - len(offsets))
        only = [label if keep else -100 for label, keep in zip(labels, inside, strict=True)]
        if any(label != -100 for label in only):
            labels = only
    return {"input_ids": ids, "labels": labels}


def states(model: Any, tensors: Mapping[str, Any]) -> list[Any]:
    """Outputs of every block at the positions before a target: one (n, hidden) for each block."""
    from ...forward import Pass, blocks

    layers = range(len(blocks(model)))
    p = Pass(model, tensors, layers=layers, stop=True)
    return [p.hidden(k)[:, :-1][p.mask] for k in layers]


def read_patched(model: Any, tensors: Mapping[str, Any], layer: int | None = None, put: Any = None) -> Any:
    """(n,) log-probabilities of the targets; with `put` (n, hidden) in place of block `layer`'s output where they are
    predicted."""
    import torch

    from ...forward import Pass, layer_module
    from ...head import held

    p = Pass(model, tensors)
    if layer is None:
        return p.logp

    def patch(module: Any, args: Any, output: Any) -> Any:
        hidden = output if torch.is_tensor(output) else output[0]  # (batch, seq, hidden)
        if hidden.shape[:2] != p.input_ids.shape:  # the head is tried on an input of its own before it is trusted
            return output
        hidden = hidden.clone()
        hidden[:, :-1][p.mask] = put.to(hidden)
        return hidden if torch.is_tensor(output) else (hidden, *output[1:])

    with held(layer_module(model, layer).register_forward_hook(patch)):
        return p.logp


def read_depth(
    source: Any,
    base: Opened,
    encoded: Sequence[Encoded],
    pad_id: int,
    token_budget: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, Array]:
    """(rows,) mean log-probability of the fact's tokens under the base, and (rows, layers) the same with the source's
    hidden states after each block.

    source: the model whose states are taken, switched on.   base: opens the model that reads them; it may be the same
    live model with its adapters off. Costs one source forward and layers + 1 base forwards; states of one batch are held.
    Raises Unmeasured where the two models differ in blocks or width.
    """
    import torch

    from ...data.collate import pad
    from ...forward import blocks

    own = np.full(len(encoded), np.nan)
    patched = np.full((len(encoded), len(blocks(source))), np.nan)
    device, done = source.get_input_embeddings().weight.device, 0
    for batch in batches([len(row["input_ids"]) for row in encoded], token_budget):
        tensors = {k: v.to(device) for k, v in pad([encoded[i] for i in batch], pad_id).items()}
        with torch.no_grad(), evaluating(source):
            taken = states(source, tensors)
        with base() as reader, torch.no_grad(), evaluating(reader):
            if len(blocks(reader)) != len(taken):
                raise Unmeasured(f"the base has {len(blocks(reader))} blocks and this model {len(taken)}")
            width = getattr(reader.config, "hidden_size", taken[0].shape[-1])
            if width != taken[0].shape[-1]:
                raise Unmeasured(f"the base's hidden states have {width} numbers and this model's {taken[0].shape[-1]}")
            there = reader.get_input_embeddings().weight.device
            tensors = {k: v.to(there) for k, v in tensors.items()}
            own[batch] = _per_row(read_patched(reader, tensors), tensors)
            for layer, put in enumerate(taken):
                patched[batch, layer] = _per_row(read_patched(reader, tensors, layer, put), tensors)
        done += len(batch)
        if progress is not None:
            progress(done, len(encoded))
    return own, patched


def _per_row(logp: Any, tensors: Mapping[str, Any]) -> Array:
    """Mean over each row's targets; every row has one. logp: (n,) in the order of mask.nonzero()."""
    counts = (tensors["labels"][:, 1:] != -100).sum(1).cpu().numpy()
    ends = np.cumsum(counts)[:-1]
    return np.array([part.mean() for part in np.split(logp.double().cpu().numpy(), ends)])


def _encoded(plan: Plan, s: SetPlan) -> list[Encoded]:
    pairs = (plan.pairs[i] for i in s.answer)
    return [
        fact_row(prompt, answer, str(row.get("value") or "") or None, plan.tokenizer)
        for (prompt, answer), row in zip(pairs, s.rows, strict=True)
    ]


@provider("depth", gives=("fact_logp", "patched_logp"))
def depth(model: Any, plan: Plan, measured: Measured, context: Context) -> dict[str, dict[str, Any]]:
    """What the base reads out of this model's hidden states, for every row of the sets asked about."""
    if context.base is None:
        raise Unmeasured("there is no base to read the hidden states")
    out: dict[str, dict[str, Any]] = {"fact_logp": {}, "patched_logp": {}}
    for name, s in context.sets.items():
        progress = context.progress_of("patching layers")
        own, patched = read_depth(
            model, context.base, _encoded(plan, s), pad_id_of(plan.tokenizer), context.token_budget, progress
        )
        out["fact_logp"][name], out["patched_logp"][name] = own, patched
    return out
