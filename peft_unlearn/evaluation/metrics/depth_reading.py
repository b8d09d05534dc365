"""Hidden states of one model put into another, layer by layer: what does the base still read out of them?

At the positions that predict the fact's tokens, the output of block l of the base is replaced by the same model's output
of block l under the unlearned model, and the base's blocks above l and its head go on. What log-probability the fact has
then is what the unlearned model still carries at depth l. Idea and score: Unlearning Depth Score, arXiv 2605.24614.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ...data.collate import adds_special, encode
from ..measured import Array, Unmeasured
from ..plan import Measured, Plan
from ..provider import Context, provider
from ..teacher import Encoded, batches, evaluating, pad_id_of
from .depth import NOTHING, check_readable, depth_scores, recovered

Opened = Callable[[], AbstractContextManager[Any]]


def fact_row(prompt: str, answer: str, value: str | None, tokenizer: Any) -> Encoded:
    """Tokens of (prompt, answer); targets are the tokens of `value` in the answer, or all of the answer where it does not
    stand there. EOS is no target."""
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


def _encoded(plan: Plan, s: Any) -> list[Encoded]:
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
        tell = _telling(context, "patching layers")
        own, patched = read_depth(
            model, context.base, _encoded(plan, s), pad_id_of(plan.tokenizer), context.token_budget, tell
        )
        out["fact_logp"][name], out["patched_logp"][name] = own, patched
    return out


def _telling(context: Context, what: str) -> Callable[[int, int], None] | None:
    report = context.progress
    return None if report is None else lambda done, total: report(what, done, total)


def depth_curves(
    subjects: Mapping[str, Opened | None],
    pairs: Sequence[tuple[str, str]],
    values: Sequence[str | None],
    tokenizer: Any,
    *,
    known: tuple[Sequence[tuple[str, str]], Sequence[str | None]] = ((), ()),
    reference: str = "retain_only",
    tau: float = 0.05,
    unreadable: float = 0.25,
    token_budget: int = 4096,
) -> dict[str, Any]:
    """The curve per layer of every subject, JSON-ready: what a report draws.

    subjects: as for `score`; "base" must be there. pairs, values: (prompt, answer) and fact of each row.   known: the same of
    rows that base and reference both know (retain rows); without them nothing is said about recovery (`check_readable`).
    Returns {"n", "layers", "base": nats, "subjects": {name: {"logp": [..], "recovered": [..] | null, "depth": x | null,
    "n": rows behind it, "reason"}}}; layers count from block 0; "logp" is the mean log-probability of the fact read out.
    """
    base = subjects.get("base")
    if base is None:
        raise Unmeasured("there is no base to read the hidden states")
    encoded = [fact_row(p, a, v, tokenizer) for (p, a), v in zip(pairs, values, strict=True)]
    read: dict[str, tuple[Array, Array]] = {}
    for name, opened in subjects.items():
        if opened is not None and name != "base":
            with opened() as model:
                read[name] = read_depth(model, base, encoded, pad_id_of(tokenizer), token_budget)
    why = _unusable(subjects, base, reference, read, known, tokenizer, token_budget, unreadable)
    out: dict[str, Any] = {"n": len(encoded), "subjects": {}}
    for name, (own, patched) in read.items():
        out["base"], out["layers"] = float(own.mean()), patched.shape[1]
        about: dict[str, Any] = {"logp": patched.mean(0).tolist(), "recovered": None, "depth": None, "n": 0}
        if why is None:
            curve = recovered(own, patched, read[reference][1], tau)
            scores = depth_scores(own, patched, read[reference][1], tau)
            sure = scores[np.isfinite(scores)]
            about["recovered"] = [None if np.isnan(x) else float(x) for x in curve]
            about["depth"], about["n"] = float(sure.mean()) if len(sure) else None, len(sure)
        about["reason"] = why or (None if about["n"] else NOTHING)
        out["subjects"][name] = about
    return out


def _unusable(
    subjects: Mapping[str, Opened | None],
    base: Opened,
    reference: str,
    read: Mapping[str, tuple[Array, Array]],
    known: tuple[Sequence[tuple[str, str]], Sequence[str | None]],
    tokenizer: Any,
    token_budget: int,
    unreadable: float,
) -> str | None:
    """Why nothing can be said about recovery, or None."""
    opened = subjects.get(reference)
    if reference not in read or opened is None:
        return "there is no retain-only model to compare with"
    if not len(known[0]):
        return "no rows are given that base and retain-only model both know"
    encoded = [fact_row(p, a, v, tokenizer) for (p, a), v in zip(*known, strict=True)]
    with opened() as model:
        control = read_depth(model, base, encoded, pad_id_of(tokenizer), token_budget)
    try:
        check_readable(*read[reference], *control, unreadable)
    except Unmeasured as problem:
        return str(problem)
    return None
