"""Which experts of a mixture-of-experts model answer for the forget set: affinity, its lift over the retain set, stability.

Affinity as in SEUF / UOE (arXiv 2411.18797): the gate of an expert, truncated to the top k and not renormalized, averaged
over the tokens of a sequence and then over sequences. Raw affinity reproducibly picks hub experts that serve everything, so
it is never shown without its lift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..data.bundle import ForgetRetain
from ..data.collate import pad, padding_id
from ..data.load import load_data
from ..errors import UserError
from ..folder.base import load_base, load_tokenizer, resolve_base
from ..folder.device import placed
from ..forward import Pass
from ..objectives.routing import gates, top_k_of
from ..reporting.experts import experts_picture, experts_text
from ..reporting.result import Result
from ..tuners.expert_lora.blocks import moe_blocks

MIN_LIFT = 3.0  # below it the raw top expert serves the retain set nearly as much
Ranking = Literal["affinity", "contrast"]


@dataclass
class Affinity:
    """Mean truncated gate of every expert on forget and retain sequences.

    forget, retain: (layers, experts) float64. halves: forget on its even and its odd sequences. layers: block numbers.
    """

    layers: list[int]
    forget: Tensor
    retain: Tensor
    halves: tuple[Tensor, Tensor]
    tokens: dict[str, int]
    sequences: dict[str, int]

    @property
    def lift(self) -> Tensor:
        """forget / retain, (layers, experts)."""
        return self.forget / self.retain.clamp_min(1e-12)

    def score(self, ranking: Ranking = "affinity") -> Tensor:
        """What experts are ranked by, (layers, experts): affinity, or its difference to the retain set."""
        if ranking not in get_args(Ranking):
            raise UserError(f"ranking {ranking!r} is not one of {', '.join(get_args(Ranking))}")
        return self.forget if ranking == "affinity" else self.forget - self.retain

    def choose(
        self,
        ranking: Ranking = "affinity",
        per_layer: int | None = 1,
        top: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> dict[int, list[int]]:
        """{layer: [expert ids]}: the best `per_layer` of every layer (of `layers`), or the best `top` of all of them together.

        Raises:
            UserError: a layer without experts, or more experts than there are.
        """
        rows = [i for i, k in enumerate(self.layers) if layers is None or k in layers]
        if unknown := sorted(set(layers or ()) - set(self.layers)):
            raise UserError(f"experts: blocks {unknown} have no experts; blocks with some: {self.layers}")
        score = self.score(ranking)
        n = score.shape[1]
        if top is None and (per_layer or 1) > n:
            raise UserError(f"experts: per_layer {per_layer} is more than the {n} experts of a block")
        if top is not None and top > n * len(rows):
            raise UserError(f"experts: top {top} is more than the {n * len(rows)} experts there are to choose from")
        if top is not None:
            flat = torch.full_like(score, -torch.inf)
            flat[rows] = score[rows]
            picks = flat.flatten().topk(top).indices.tolist()
            out: dict[int, list[int]] = {}
            for at in sorted(picks):
                out.setdefault(self.layers[at // score.shape[1]], []).append(at % score.shape[1])
            return out
        return {self.layers[i]: sorted(score[i].topk(per_layer or 1).indices.tolist()) for i in rows}

    def stability(self) -> dict[str, float]:
        """Agreement of the two halves: layers with the same top expert, overlap of the six best overall, rank correlation."""
        a, b = self.halves
        same = float((a.argmax(1) == b.argmax(1)).double().mean())
        k = min(6, a.numel())
        best = [set(h.flatten().topk(k).indices.tolist()) for h in (a, b)]
        ranks = [h.flatten().argsort().argsort().double() for h in (a, b)]
        centered = [r - r.mean() for r in ranks]
        spearman = float((centered[0] @ centered[1]) / (centered[0].norm() * centered[1].norm()))
        return {"same_top": same, "top6_overlap": len(best[0] & best[1]) / k, "spearman": spearman}

    def warnings(self) -> list[str]:
        """One sentence per layer whose raw top expert has a lift below `MIN_LIFT`."""
        out = []
        for i, k in enumerate(self.layers):
            e = int(self.forget[i].argmax())
            lift = float(self.lift[i, e])
            if lift < MIN_LIFT:
                out.append(
                    f"block {k}: expert {e} has the highest affinity ({float(self.forget[i, e]):.2f}) but a lift of only {lift:.1f} "
                    "over the retain set: a hub that serves everything, not an expert of the forget set"
                )
        return out

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "forget": self.forget.tolist(),
            "retain": self.retain.tolist(),
            "lift": self.lift.tolist(),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "stability": self.stability(),
            "warnings": self.warnings(),
        }


@dataclass
class Experts(Result):
    """Which experts an adapter goes into: the affinity of all of them, and {layer: [expert ids]} of the chosen ones."""

    affinity: Affinity
    chosen: dict[int, list[int]]

    def to_dict(self) -> dict[str, Any]:
        return {**self.affinity.to_dict(), "chosen": self.chosen}

    def __str__(self) -> str:
        return experts_text(self.to_dict())

    def picture(self, planted: Mapping[str, Mapping[int, int]] | None = None) -> bytes:
        """PNG of the affinities; see `reporting.experts.experts_picture`."""
        return experts_picture(self.to_dict(), planted)


def experts(base: str, data: str, *, ranking: Ranking = "affinity", token_budget: int = 100_000) -> Experts:
    """Which experts of a base answer for the forget set of a bundle, both by name.

    Args:
        ranking: by "affinity", or by "contrast", its difference to the retain set.
        token_budget: tokens of each set that are looked at.
    """
    bundle, path = load_data(None, data), resolve_base(base)
    return attribute(placed(load_base(path)), load_tokenizer(path), bundle, {"ranking": ranking}, token_budget)


def attribute(
    model: Any, tokenizer: Any, data: ForgetRetain, options: Mapping[str, Any], token_budget: int = 100_000
) -> Experts:
    """Affinity for the forget set beside the retain set, and the experts that it picks; `options` are those of `Affinity.choose`."""
    if not data.retain:
        raise UserError("attribution shows affinity beside the retain set, and the data have none")
    pad = padding_id(tokenizer)
    found = affinity(model, data.encode("forget", tokenizer), data.encode("retain", tokenizer), pad, token_budget)
    return Experts(found, found.choose(**options))


def _batches(
    rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device, size: int = 32
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for at in range(0, len(order), size):
        part = order[at : at + size]
        yield part, {k: v.to(device) for k, v in pad([rows[i] for i in part], pad_id).items()}


@torch.no_grad()
def _per_sequence(model: nn.Module, rows: Sequence[Mapping[str, Any]], pad_id: int, layers: list[int]) -> Tensor:
    """Mean truncated gate of every sequence: (sequences, layers, experts) float64."""
    top_k, device = top_k_of(model), next(model.parameters()).device
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    for part, batch in _batches(rows, pad_id, device):
        p = Pass(model, batch, routers=layers, stop=True)
        mask = batch["attention_mask"].double()  # (batch, seq)
        by_layer = []
        for k in layers:
            g = gates(p.router(k), top_k).double().view(*mask.shape, -1)  # (batch, seq, experts)
            by_layer.append((g * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        for i, s in zip(part, torch.stack(by_layer, 1).cpu(), strict=True):
            out[i] = s
    return torch.stack(out)


def within(rows: Sequence[Mapping[str, Any]], budget: int) -> list[Mapping[str, Any]]:
    """Evenly spaced rows of at most `budget` tokens together (at least two)."""
    total = sum(len(r["input_ids"]) for r in rows)
    keep = len(rows) if total <= budget else max(2, int(len(rows) * budget / total))
    return [rows[int(i * len(rows) / keep)] for i in range(keep)]


def affinity(
    model: nn.Module,
    forget: Sequence[Mapping[str, Any]],
    retain: Sequence[Mapping[str, Any]],
    pad_id: int = 0,
    token_budget: int = 100_000,
) -> Affinity:
    """Affinity of every expert in every mixture-of-experts layer, on encoded rows (`collate.encode`).

    Args:
        token_budget: rows beyond so many tokens of each set are left out, evenly (the paper uses 100k).

    Raises:
        UserError: the model has no experts, or there are fewer than two rows.
    """
    layers = [k for k, b in moe_blocks(model).items() if b.router is not None]
    if not layers:
        raise UserError("this model has no experts: attribution and expert adapters need a mixture-of-experts base")
    if len(forget) < 2 or not retain:
        raise UserError("affinity needs at least two forget rows and one retain row")
    own, other = within(forget, token_budget), within(retain, token_budget)
    training = model.training
    model.eval()
    try:
        f, r = _per_sequence(model, own, pad_id, layers), _per_sequence(model, other, pad_id, layers)
    finally:
        model.train(training)
    return Affinity(
        layers,
        f.mean(0),
        r.mean(0),
        (f[0::2].mean(0), f[1::2].mean(0)),
        {"forget": sum(len(x["input_ids"]) for x in own), "retain": sum(len(x["input_ids"]) for x in other)},
        {"forget": len(own), "retain": len(other)},
    )


@torch.no_grad()
def selected(model: nn.Module, rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[int, Tensor]:
    """{layer: (tokens, top k) chosen experts of every unpadded token}, in the order of `rows`."""
    layers = [k for k, b in moe_blocks(model).items() if b.router is not None]
    top_k, device = top_k_of(model), next(model.parameters()).device
    out: dict[int, list[Tensor]] = {k: [torch.empty(0)] * len(rows) for k in layers}
    for part, batch in _batches(rows, pad_id, device):
        p = Pass(model, batch, routers=layers, stop=True)
        mask = batch["attention_mask"].bool()
        for k in layers:
            ids = p.router(k).topk(top_k, dim=-1).indices.view(*mask.shape, -1)  # (batch, seq, k)
            for j, i in enumerate(part):
                out[k][i] = ids[j][mask[j]].cpu()
    return {k: torch.cat(v) for k, v in out.items()}


def overlap(before: Mapping[int, Tensor], after: Mapping[int, Tensor]) -> dict[int, float]:
    """{layer: share of a token's chosen experts that are still chosen}: 1 = no selection shift."""
    return {k: float((after[k][:, :, None] == before[k][:, None, :]).any(-1).double().mean()) for k in before}
