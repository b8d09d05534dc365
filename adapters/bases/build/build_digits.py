"""Build the embedded image classifiers, a ResNet and a ViT of about 0.1M parameters, each with its retain model.

The base learns the 1,257 training images of `data.digits`, the retain model those of nine classes: same initialization, same schedule,
without the class that the default request forgets. Seconds each, on one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from build_people import Wanted, failures, write_verified
from pretrain import Progress

from peft_unlearn.data import digits

# accuracy of what is built: (set, "min" | "max", bound)
BASE_BOUNDS = (("forget", "min", 0.98), ("retain", "min", 0.98), ("holdout", "min", 0.94), ("forget_test", "min", 0.85))
RETAIN_MODEL_BOUNDS = (
    ("forget", "max", 0.0),
    ("forget_test", "max", 0.0),
    ("retain", "min", 0.98),
    ("holdout", "min", 0.94),
)


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, a linear warm-up and a cosine to zero."""

    epochs: int
    learning_rate: float
    batch_size: int = 64
    weight_decay: float = 0.05
    warmup_steps: int = 20


RECIPES = {"digits-resnet": Recipe(10, 5e-3), "digits-vit": Recipe(25, 2e-3)}


def make_classifier(name: str, seed: int) -> Any:
    """A randomly initialized ``digits-resnet`` or ``digits-vit``."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    labels: dict[str, Any] = {"num_channels": 1, "num_labels": digits.CLASSES}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "digits-resnet":
            return ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", **labels
                )
            )
        return ViTForImageClassification(
            ViTConfig(
                image_size=digits.SIZE,
                patch_size=4,
                hidden_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=128,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **labels,
            )
        )


def train_classifier(
    model: Any,
    rows: Sequence[dict[str, Any]],
    recipe: Recipe,
    seed: int,
    progress: Progress | None = None,
    stage: str = "train",
) -> int:
    """Cross-entropy on rows of images. Returns the steps taken."""
    import numpy as np
    import torch
    from transformers import get_cosine_schedule_with_warmup

    x = torch.from_numpy(np.stack([r["pixel_values"] for r in rows]))
    y = torch.tensor([r["label"] for r in rows])
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps = recipe.epochs * -(-len(x) // recipe.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, steps)
    model.train()
    step = 0
    for _ in range(recipe.epochs):
        for part in torch.randperm(len(x), generator=rng).split(recipe.batch_size):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=x[part]).logits, y[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if progress is not None:
                progress(stage, step, steps)
    model.eval()
    return steps


def accuracies(model: Any, sets: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Share of rows whose class the model names, by set."""
    import numpy as np
    import torch

    out = {}
    for name, rows in sets.items():
        with torch.no_grad():
            best = model(pixel_values=torch.from_numpy(np.stack([r["pixel_values"] for r in rows]))).logits.argmax(1)
        out[name] = float((best == torch.tensor([r["label"] for r in rows])).float().mean())
    return out


def build_digits(
    out: str | Path,
    seed: int = 0,
    retain_models: int = 1,
    progress: Progress | None = None,
    recipes: dict[str, Recipe] | None = None,
) -> dict[str, dict[str, Any]]:
    """Train both classifiers and, with `retain_models`, the retain model of each; verify them, and only then write them.

    Returns:
        {folder name: the content of its build.json}.

    Raises:
        UserError: a model misses its bounds; nothing is written.
    """
    sets = digits.generate()

    def wanted(name: str, without: bool) -> Wanted:
        recipe = (recipes or RECIPES)[name]
        rows = sets["retain"] if without else digits.rows(True)
        folder = f"{name}-retain" if without else name

        def train() -> tuple[Any, int]:
            model = make_classifier(name, seed)
            return model, train_classifier(model, rows, recipe, seed, progress, f"train {folder}")

        def verify(loaded: Any) -> tuple[dict[str, Any], list[str]]:
            figures = accuracies(loaded, sets)
            missed = failures(figures, RETAIN_MODEL_BOUNDS if without else BASE_BOUNDS)
            return {"accuracy": {k: round(v, 4) for k, v in figures.items()}}, missed

        about = {"role": "retain model" if without else "base", "data": "embedded:digits?forget=3&seed=0",
                 "trained_rows_per_epoch": len(rows), "recipe": asdict(recipe)}  # fmt: skip
        return Wanted(folder, seed, train, verify, about)

    models = [
        wanted(name, without) for name in recipes or RECIPES for without in (False, True)[: 1 + bool(retain_models)]
    ]
    return write_verified(Path(out), models, None, {"n": {k: len(v) for k, v in sets.items()}, "arithmetic": "float32"})
