"""The embedded mixture of experts: a small OLMoE, routing that is seeded early, and what its routers then do.

Experts of so small a model do not specialize by themselves: measured, an expert tells 0.05 of 2.3 bits about the domain.
So the released base is given a start: for the first part of pre-training a hinge asks every router to give a *planted*
expert at least half of the probability on the tokens of its domain; then it is off and the rest is ordinary training.
The result is a stock OLMoE and a known answer for attribution. It shows what a method does when experts specialize; it is
no evidence that they do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log2
from typing import TYPE_CHECKING, Any

from peft_unlearn.data import domains
from peft_unlearn.data.formats import to_text

if TYPE_CHECKING:
    import torch

Planted = dict[str, dict[int, int]]  # {domain: {layer: expert}}
Affinity = dict[str, list[list[float]]]  # {domain: (layers, experts)}


@dataclass(frozen=True)
class MoeRecipe:
    """How a mixture-of-experts model is pre-trained. The defaults are the released models'."""

    epochs: int = 27
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_rate: float = 0.05
    weight_decay: float = 0.01
    vocab_size: int = 1536
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 128  # of one expert
    experts: int = 8
    experts_per_token: int = 2
    balance: float = 0.001  # weight of the load-balancing loss
    hinge: float = 1.0  # weight of the planting hinge while it is on
    hinge_until: float = 0.3  # share of the steps after which it is off
    hinge_target: float = 0.5  # router probability above which it asks for no more
    size: domains.Size = field(default_factory=domains.Size)


def make_moe(tokenizer, recipe: MoeRecipe, seed: int):
    """A randomly initialized OLMoE of about 2M parameters, in float32."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        norm_topk_prob=False,
        router_aux_loss_coef=recipe.balance,
        output_router_logits=False,  # on, it would add the balancing loss wherever someone passes labels
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # the fastest on a CPU: batched_mm takes 20 times as long
    return model


def draw_planted(seed: int, recipe: MoeRecipe) -> Planted:
    """Per layer one expert of its own for every domain; the experts left over stay free."""
    rng = random.Random(seed)
    drawn = [rng.sample(range(recipe.experts), len(domains.DOMAINS)) for _ in range(recipe.layers)]
    return {name: {layer: experts[i] for layer, experts in enumerate(drawn)} for i, name in enumerate(domains.DOMAINS)}


@contextmanager
def router_logits(model) -> Iterator[list[torch.Tensor]]:
    """Inside, a list that after every forward holds each layer's raw router logits, (batch * seq, experts)."""
    found: list[Any] = [None] * model.config.num_hidden_layers
    handles = []
    for i, layer in enumerate(model.model.layers):

        def keep(module, args, output, i=i) -> None:
            found[i] = output[0]

        handles.append(layer.mlp.gate.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class RoutingLoss:
    """Load balancing always, and while it is on the hinge that plants experts: `Extra` of `train_model`.

    logits: the list of `router_logits`.   domain_of: (rows,) domain of each row.   planted: None for a natural model.
    """

    def __init__(self, logits: list, domain_of: list[str], planted: Planted | None, recipe: MoeRecipe) -> None:
        import torch

        self.logits, self.recipe = logits, recipe
        self.wanted = None  # (rows, layers)
        if planted is not None:
            self.wanted = torch.tensor([[planted[name][k] for k in range(recipe.layers)] for name in domain_of])

    def __call__(self, rows: list[int], real: torch.Tensor, part: float) -> torch.Tensor:
        import torch
        from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

        recipe, hinges = self.recipe, []
        balance = load_balancing_loss_func(tuple(self.logits), recipe.experts, recipe.experts_per_token, real.long())
        loss = torch.as_tensor(recipe.balance * balance)
        if self.wanted is None or part >= recipe.hinge_until:
            return loss
        tokens = real.flatten()
        for layer, logits in enumerate(self.logits):
            wanted = self.wanted[rows, layer][:, None].expand_as(real).reshape(-1, 1)  # (batch * seq, 1)
            # A hinge and not a cross-entropy: the second slot stays free for what all domains share.
            q = logits.float().softmax(-1).gather(1, wanted)[:, 0]
            hinges.append((recipe.hinge_target - q).clamp(min=0)[tokens].mean())
        return loss + recipe.hinge * torch.stack(hinges).mean()


def measure_routing(model, tokenizer, rows: Mapping[str, list[dict]]) -> tuple[Affinity, list[float]]:
    """What the routers do on every domain, answers included, padding left out.

    Returns: affinity, {domain: (layers, experts)}: the router's probability of an expert where it is among the chosen, else 0,
        averaged over the tokens of a row and then over rows; and information, (layers,): mutual information in bits
        between a token's domain and the experts chosen for it, all domains weighted alike.

    Source of the affinity: UOE / SEUF (https://arxiv.org/abs/2411.18797).
    """
    import torch

    k, pad = model.config.num_experts_per_tok, tokenizer.pad_token_id
    affinity, chosen = {}, {}
    with torch.no_grad(), router_logits(model) as logits:
        for name, wanted in rows.items():
            shape = model.config.num_hidden_layers, model.config.num_experts
            gates, counts = torch.zeros(shape), torch.zeros(shape)
            for start in range(0, len(wanted), 64):
                texts = ["".join(to_text(row)) for row in wanted[start : start + 64]]
                ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
                width = max(map(len, ids))
                input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])  # (batch, seq)
                real = (input_ids != pad).float()[..., None]
                model(input_ids=input_ids)
                for_layer, slots = [], []
                for found in logits:
                    q = found.float().softmax(-1).view(*input_ids.shape, -1)  # (batch, seq, experts)
                    top = torch.zeros_like(q).scatter(-1, q.topk(k).indices, 1.0) * real
                    for_layer.append(((q * top).sum(1) / real.sum(1)).sum(0))
                    slots.append(top.sum((0, 1)))
                gates = gates + torch.stack(for_layer)
                counts = counts + torch.stack(slots)
            affinity[name] = (gates / len(wanted)).tolist()
            chosen[name] = (counts / counts.sum(-1, keepdim=True)).tolist()
    return affinity, [_information([chosen[name][layer] for name in rows]) for layer in range(len(chosen[name]))]


def _information(given: list[list[float]]) -> float:
    """Bits that one draw from one of these distributions tells about which of them it came from."""
    mean = [sum(column) / len(given) for column in zip(*given, strict=True)]
    return sum(p * log2(p / m) for row in given for p, m in zip(row, mean, strict=True) if p > 0) / len(given)


def top_expert(affinity: list[list[float]]) -> tuple[int, int]:
    """(layer, expert) of the highest affinity."""
    return max(
        ((k, e) for k, row in enumerate(affinity) for e in range(len(row))), key=lambda at: affinity[at[0]][at[1]]
    )


def lift(affinity: Affinity, name: str) -> float:
    """How far the raw-affinity top expert of a domain is that domain's own: its affinity over the mean of the others'."""
    layer, expert = top_expert(affinity[name])
    others = [rows[layer][expert] for other, rows in affinity.items() if other != name]
    return affinity[name][layer][expert] * len(others) / max(sum(others), 1e-9)


def planted_on_top(affinity: Affinity, planted: Planted) -> int:
    """In how many (layer, domain) cells the planted expert has the highest affinity of its layer."""
    return sum(
        max(range(len(row)), key=row.__getitem__) == planted[name][layer]
        for name in planted
        for layer, row in enumerate(affinity[name])
    )
