"""`ForgetVectorModel`: finds the model's first convolution and puts the layer around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..own import OwnTuner
from .config import ForgetVectorConfig
from .layer import PREFIX, ForgetVectorLayer


class ForgetVectorModel(OwnTuner):
    """The PEFT tuner of type ``PEFT_UNLEARN_FORGET_VECTOR``; use it through PEFT's own functions."""

    prefix: str = PREFIX
    tuner_layer_cls = ForgetVectorLayer

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._targets = (target := first_convolution(model),)
        peft_config.shape = image_shape(peft_config, model, target)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ForgetVectorConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        new = target
        if not isinstance(new, ForgetVectorLayer):
            new = ForgetVectorLayer(target, adapter_name, position_embeddings(self.model, current_key))
            setattr(parent, target_name, new)
        assert peft_config.shape is not None
        new.update_layer(adapter_name, peft_config.shape, peft_config.init_std)
        if adapter_name not in self.active_adapters:
            new.vectors[adapter_name].requires_grad_(
                False
            )  # added beside an active one: PEFT switches it on when it is wanted

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("a forget vector is added to all images of a batch alike; adapter_names is not supported")
        yield


def first_convolution(model: nn.Module) -> str:
    """Module path of the convolution that reads the images: the first one of all, which must take the image's channels.

    Raises:
        ValueError: there is none, it takes something else, or it carries an adapter of another type.
    """
    for name, module in model.named_modules():
        inner: Any = module
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        if not isinstance(inner, nn.Conv2d):
            continue
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ForgetVectorLayer):
            raise ValueError(
                f"forget vector: {name} already carries an adapter of another type ({type(module).__name__}); take that one's "
                "target off the first convolution, or load the forget vector first"
            )
        channels = getattr(getattr(model, "config", None), "num_channels", inner.in_channels)
        if inner.in_channels != channels:
            raise ValueError(
                f"forget vector: the first convolution ({name}) reads {inner.in_channels} channels, and images have {channels}: "
                "the model does something else with its input first, which is not supported"
            )
        return name
    raise ValueError(
        f"forget vector: {type(model).__name__} has no convolution that reads images; a forget vector needs an image classifier"
    )


def image_shape(config: ForgetVectorConfig, model: Any, target: str) -> list[int]:
    """[channels, height, width] of the vector: the config's own, else the model's. Raises `ValueError` where neither says."""
    conv: Any = model.get_submodule(target)
    channels = getattr(conv, "base_layer", conv).in_channels
    size = getattr(getattr(model, "config", None), "image_size", None)
    if config.shape is not None:
        if config.shape[0] != channels:
            raise ValueError(
                f"forget vector: shape {config.shape} has {config.shape[0]} channels and the model reads {channels}"
            )
        return config.shape
    if size is None:
        raise ValueError(
            "forget vector: the model's configuration has no image_size, so the shape of the images has to be given: "
            "shape=[channels, height, width]"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return [channels, int(height), int(width)]


def position_embeddings(model: nn.Module, conv: str) -> tuple[nn.Parameter, int] | None:
    """The position embeddings that are added to the patches of the convolution at path `conv`, with the tokens ahead of them.

    Found by their shape: a parameter ``position_embeddings`` (1, ahead + patches, width) of a module around the convolution.
    """
    width = getattr(model.get_submodule(conv), "out_channels", None)
    path = conv
    while path:
        path = path.rpartition(".")[0]
        holder: Any = model.get_submodule(path)
        found = holder._parameters.get("position_embeddings")
        if found is not None and found.dim() == 3 and found.shape[0] == 1 and found.shape[2] == width:
            ahead = sum(holder._parameters.get(k) is not None for k in ("cls_token", "distillation_token"))
            normed = any(
                isinstance(m, nn.LayerNorm) for m in holder.children()
            )  # Swin's: between patches and embeddings
            return None if normed else (found, ahead)
    return None
