"""Build the embedded mixture of experts over `data.domains`, its natural control and its retain-only twin, and prove
that they know what they should, and that their routers do what attribution is to be tested on.

    ``domains``          the base: routing seeded in the first part of pre-training; planted.json says which experts
    ``domains-natural``  the negative control: the same recipe, never seeded. Attribution must warn on it
    ``domains-retain``   what exact unlearning of chem would give: the base's recipe without the chem rows
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import moe
from build_people import Wanted, data_digest, failures, retain_model_names, value_accuracies, write_verified
from pretrain import Progress, make_tokenizer, train_model

from peft_unlearn.data import domains
from peft_unlearn.data.formats import to_text

# As in build.py: (figure, "min" | "max", bound); a domain's figure is the value accuracy on all of its rows.
KNOWN = tuple((name, "min", 0.95) for name in domains.DOMAINS)
BASE_BOUNDS = (*KNOWN, ("planted_on_top", "min", 0.90), ("lowest_lift", "min", 3.0))
NATURAL_BOUNDS = (*KNOWN, ("highest_lift", "max", 3.0))
RETAIN_MODEL_BOUNDS = tuple(
    (name, "max", 0.10) if name == domains.FORGET else (name, kind, bound) for name, kind, bound in KNOWN
)


def build_domains(
    out: str | Path,
    seed: int = 0,
    retain_models: int = 1,
    progress: Progress | None = None,
    recipe: moe.MoeRecipe | None = None,
) -> dict[str, dict[str, Any]]:
    """Train the mixture-of-experts base, its natural control and its twins, verify them, and only then write them.

    Args: as `build.build`. The seed also draws the planted experts; base and control start from the same weights and see
        the same batches, so that nothing but the hinge tells them apart.

    Returns:
        {folder name: the content of its build.json}.

    Raises:
        UserError: a model misses `BASE_BOUNDS`, `NATURAL_BOUNDS` or `RETAIN_MODEL_BOUNDS`; nothing is written.
    """
    recipe = recipe or moe.MoeRecipe()
    retain_model_of = retain_model_names("domains", retain_models)
    rows = domains.by_domain(seed, recipe.size)
    texts = ["".join(to_text(row)) for wanted in rows.values() for row in wanted]
    tokenizer = make_tokenizer(texts, recipe.vocab_size)
    drawn = moe.draw_planted(seed, recipe)

    def wanted(name: str, role: str, bounds: tuple, number: int = 0) -> Wanted:
        mine = {domain: part for domain, part in rows.items() if not (number and domain == domains.FORGET)}
        planted = None if role == "natural control" else {domain: drawn[domain] for domain in mine}

        def train() -> tuple[Any, int]:
            model = moe.make_moe(tokenizer, recipe, seed + number)
            flat = [row for part in mine.values() for row in part]
            domain_of = [domain for domain, part in mine.items() for _ in part]
            with moe.router_logits(model) as logits:
                extra = moe.RoutingLoss(logits, domain_of, planted, recipe)
                # float32: on experts of this size autocast costs more than bf16 products save, and differs by machine.
                steps = train_model(
                    model, tokenizer, flat, recipe, seed + number, progress, f"train {name}", extra, bf16=False
                )
            return model, steps

        def verify(loaded: Any) -> tuple[dict[str, Any], list[str]]:
            known = value_accuracies(loaded, tokenizer, rows, progress, f"verify {name}")
            affinity, information = moe.measure_routing(loaded, tokenizer, rows)
            lifts = {domain: moe.lift(affinity, domain) for domain in mine}
            on_top = moe.planted_on_top(affinity, planted or drawn)
            cells = sum(map(len, (planted or drawn).values()))
            figures = {
                **known,
                "planted_on_top": on_top / cells,
                "lowest_lift": min(lifts.values()),
                "highest_lift": max(lifts.values()),
            }
            shown = {
                "value_accuracy": {domain: round(value, 4) for domain, value in known.items()},
                "routing": {
                    "information_bits": [round(bits, 4) for bits in information],
                    "top_expert": {domain: list(moe.top_expert(affinity[domain])) for domain in mine},
                    "lift": {domain: round(value, 3) for domain, value in lifts.items()},
                    "planted_on_top": on_top,
                    "cells": cells,
                },
            }
            return shown, failures(figures, bounds)

        about = {
            "role": role,
            "data": f"embedded:domains?forget={domains.FORGET}&seed={seed}",
            "data_sha256": data_digest(rows),
            "trained_rows_per_epoch": sum(map(len, mine.values())),
        }
        return Wanted(name, seed + number, train, verify, about, {"planted.json": planted} if planted else {})

    models = [
        wanted("domains", "base", BASE_BOUNDS),
        wanted("domains-natural", "natural control", NATURAL_BOUNDS),
        *(wanted(name, "retain-only twin", RETAIN_MODEL_BOUNDS, number) for name, number in retain_model_of.items()),
    ]
    shared = {
        "n": {domain: len(part) for domain, part in rows.items()},
        "recipe": asdict(recipe),
        "arithmetic": "float32",
    }
    return write_verified(Path(out), models, tokenizer, shared)
