"""Tiny image classifiers and images for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

_VIT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
)
_MADE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit": (ViTForImageClassification, ViTConfig, _VIT),
    "deit": (DeiTForImageClassification, DeiTConfig, _VIT),
    "beit": (BeitForImageClassification, BeitConfig, {**_VIT, "use_absolute_position_embeddings": True}),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config, _VIT),
    "resnet": (ResNetForImageClassification, ResNetConfig, dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                                layer_type="basic")),
    "convnext": (ConvNextForImageClassification, ConvNextConfig, dict(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)),
    "swin": (SwinForImageClassification, SwinConfig, dict(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=16,
                                                          patch_size=2, window_size=4, use_absolute_embeddings=True)),
}  # fmt: skip
FAMILIES = tuple(_MADE)
MERGEABLE = ("vit", "deit", "beit", "dinov2")


def classifier(kind: str = "resnet", seed: int = 0, labels: int = 4) -> Any:
    """A randomly initialized classifier of one-channel images, in evaluation mode."""
    model, config, settings = _MADE[kind]
    torch.manual_seed(seed)
    return model(config(num_channels=1, num_labels=labels, **settings)).eval()


def size_of(kind: str) -> int:
    return 32 if kind == "convnext" else 16


def images(n: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    """(n, 1, size, size)"""
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def rows(n: int, label: int, seed: int = 0, size: int = 16) -> list[dict[str, Any]]:
    """n rows of one class: noise around the class's own pattern."""
    pattern = np.random.default_rng(label).normal(size=(1, size, size))
    noise = np.random.default_rng([seed, label]).normal(size=(n, 1, size, size))
    return [{"pixel_values": (pattern + 0.3 * e).astype(np.float32), "label": label} for e in noise]
