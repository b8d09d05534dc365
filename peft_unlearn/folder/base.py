"""From the name of a base model to its files, and back to a name that may be published."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import embedded
from ..data.chat import end_tokens
from ..errors import UserError
from .fetch import snapshot, there
from .manifest import BaseRef, path_like
from .quantized import KEY, config_of

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 10_000
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


def resolve_base(ref: str | Path | None, override: str | Path | None = None, revision: str | None = None) -> Path:
    """The folder of the base model: `override` (--base) if given, else the Hub, else an embedded base.

    ref: a manifest's or recipe's base. Raises `UserError` naming the flag that is missing.
    """
    if override is not None:
        return _find(str(override), None, "--base")
    if ref is None or str(ref) == "":
        raise UserError("No base model is named; say which with --base (a folder, a Hub id, or embedded:people).")
    text = str(ref)
    if text.startswith("local:"):
        raise UserError(
            f"The base model was a local folder, known only by its digest ({text}); say where it is with --base FOLDER."
        )
    return _find(text, revision, "base")


def _find(text: str, revision: str | None, what: str) -> Path:
    if text.startswith("embedded:"):
        return embedded.base_path(text.removeprefix("embedded:").partition("?")[0])
    folder = Path(text).expanduser()
    if there(folder) and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{what} {text}: this folder holds no model (no config.json).")
        refuse_stray(folder)
        return folder
    if there(folder):
        raise UserError(f"{what} {text}: is a file; name the folder of the model.")
    if path_like(text) or text.count("/") > 1:
        raise UserError(f"{what} {text}: no such folder.")
    hint = "; say where the model is with --base (a folder, a Hub id, or embedded:people)"
    found = snapshot(what, text, revision, _HUB_FILES, hint=hint)
    refuse_stray(found)
    return found


def refuse_stray(folder: Path) -> None:
    """Raise a `UserError` for a model's folder with an adapter's configuration in it."""
    if (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file():
        raise UserError(
            f"base {folder}: an adapter_config.json lies among the model's files, and transformers would put that adapter on the model "
            "without a word: it would not be the base that its files are. Move adapter_config.json (and adapter_model.safetensors) "
            "out of that folder."
        )


def base_reference(given: str | Path, path: str | Path, digest: str, digest_targeted: str | None = None) -> BaseRef:
    """The portable name of the base that the user called `given` and that was found at `path`.

    A Hub id gets its commit from the cache folder it was read from; anything else local is known by its digest alone.
    """
    text = str(given)
    if text.startswith("embedded:"):
        return BaseRef(text.partition("?")[0], digest, None, digest_targeted)
    parts = Path(path).parts
    if not Path(text).expanduser().exists() and "snapshots" in parts:
        return BaseRef(text, digest, parts[parts.index("snapshots") + 1], digest_targeted)
    return BaseRef(f"local:{digest[:12]}", digest, None, digest_targeted)


def peft_base_name(ref: str) -> str:
    """What adapter_config.json calls the base: its Hub id, ``peft-unlearn/NAME`` if embedded, else ""; never a path."""
    if ref.startswith("embedded:"):
        return f"peft-unlearn/{ref.removeprefix('embedded:')}"
    return "" if ref.startswith("local:") else ref


def load_base(
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    fits: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The causal language model at `path`, in evaluation mode; safetensors only, no remote code.

    float32 by default whatever the files hold: embedded bases are bfloat16 files, always computed in float32. fits: of
    `model_class`. options: of `quantized.understood`, for a base in fewer bits; what is not quantized is in `dtype`.
    """
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UserError(f"dtype {dtype!r}: expected float32, bfloat16 or float16.")
    refuse_stray(Path(path))
    config = load_config(path)
    held: dict[str, Any] = {}
    if options:
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"base {path}: its files are quantized already, and {KEY} quantizes a base while it loads; give the original files, or "
                f"leave {KEY} out"
            )
        held = {"quantization_config": config_of(options, kind)}
    try:
        model = model_class(config, fits).from_pretrained(
            str(path), dtype=kind, use_safetensors=True, trust_remote_code=False, **held
        )
    except Exception as e:  # of any class: somebody else's files, read by somebody else's code
        raise UserError(f"base {path}: transformers cannot load it ({_why(e)}).") from None
    return model.eval()


def load_around(path: str | Path, tensors: Mapping[str, torch.Tensor], fits: Iterable[str] = ()) -> Any | None:
    """As `load_base` in float32, with these tensors, by their names in the model, as its own: nothing is read or copied. None for a
    configuration that several classes have a model of."""
    import torch

    config = load_config(path)
    found = model_class(config, fits)._model_mapping[type(config)]
    if isinstance(found, tuple):
        return None
    with torch.random.fork_rng(devices=[]):
        return found.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=torch.float32).eval()


def model_class(config: Any, fits: Iterable[str] = ()) -> Any:
    """The auto class that has a model of this configuration: of causal language models, of those that see images as well, or of
    image classifiers.

    fits: modules of an adapter, which decide where both have one (Llama 4, Qwen3.5): those call their modules differently.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForImageTextToText

    classifies = type(config) in AutoModelForImageClassification._model_mapping
    if classifies and any("ImageClassification" in str(name) for name in config.architectures or ()):
        return AutoModelForImageClassification
    found = [c for c in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in c._model_mapping]
    wanted = next(iter(fits), None)
    if wanted is not None and len({c._model_mapping[type(config)] for c in found}) > 1:
        with torch.device("meta"):
            model = found[0].from_config(config, trust_remote_code=False)
        if wanted not in {n for n, _ in [*model.named_modules(), *model.named_parameters()]}:
            return found[1]
    return found[0] if found else AutoModelForCausalLM


def load_tokenizer(*places: str | Path) -> Any:
    """The tokenizer of the first of `places` that holds one (an adapter folder, then its base); of an image classifier its image
    processor, or None where it has none."""
    if _classifies_images(Path(places[-1])):
        return _image_processor(*places)
    from transformers import AutoTokenizer

    for place in places:
        if any((Path(place) / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
            try:
                found = AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
                _ = found("a b"), end_tokens(found)  # some damage shows here alone
                return found
            except (
                BaseException
            ) as e:  # of any class (Rust's panics too): somebody else's files and somebody else's code
                raise UserError(f"tokenizer in {place}: cannot be loaded ({_why(e)}).") from None
    raise UserError(f"No tokenizer files in {' or '.join(str(p) for p in places)}.")


def _classifies_images(place: Path) -> bool:
    """Whether the model in a folder says that it is an image classifier."""
    try:
        names = json.loads((place / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(names, list) and any(str(n).endswith("ForImageClassification") for n in names)


def _image_processor(*places: str | Path) -> Any:
    from transformers import AutoImageProcessor

    for place in places:
        if (Path(place) / "preprocessor_config.json").is_file():
            try:
                return AutoImageProcessor.from_pretrained(str(place), trust_remote_code=False)
            except Exception as e:  # as above
                raise UserError(f"image processor in {place}: cannot be loaded ({_why(e)}).") from None
    return None


def load_config(path: str | Path) -> Any:
    """transformers' configuration of the model at `path`; no remote code."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as e:  # of any class: somebody else's files, read by somebody else's code
        raise UserError(f"base {path}: transformers cannot load its configuration ({_why(e)}).") from None
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise UserError(
            f"base {path}: its config.json asks for {layers:,} layers, more than any model has ({MAX_LAYERS:,})."
        )
    return config


def on_meta(path: str | Path, fits: Iterable[str] = ()) -> Any:
    """The model at `path` without storage for its weights."""
    import torch

    config = load_config(path)
    try:
        with torch.device("meta"):
            return model_class(config, fits).from_config(config, trust_remote_code=False)
    except Exception as e:  # as above
        raise UserError(f"base {path}: transformers cannot build its model ({_why(e)}).") from None


def _why(e: BaseException) -> str:
    theirs = isinstance(e, Exception) or type(e).__name__ == "PanicException"
    if not theirs or isinstance(e, UserError | MemoryError) or type(e).__name__ == "OutOfMemoryError":
        raise e
    if "trust_remote_code" in str(e):
        return "it needs code of its own (auto_map), which is never run; only what transformers itself knows is loaded"
    return next(iter(str(e).strip().splitlines()), type(e).__name__)
