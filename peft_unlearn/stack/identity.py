"""What a base is besides its weights: the settings that they are computed with, and the ids of its tokenizer's words.

Both stand in the manifest, under ``method.base_config`` and ``method.base_tokenizer`` (adapters/README.md); adapters from
before have neither, and nothing is said of these then.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.base import load_config
from ..folder.manifest import NEUTRAL_PROMPTS, Manifest, path_like
from ..folder.read import file_sha256, read_json
from ..folder.schema import shown
from ..folder.yaml_io import read_text

CONFIG, TOKENIZER = "base_config", "base_tokenizer"
SAMPLES = (*NEUTRAL_PROMPTS, "  two  spaces, CAPITALS and digits 2026-01-31\n", "naïve café – 你好 \N{GRINNING FACE}")
# Of config.json: says nothing of the logits (names, storage, training, how text is generated).
_IDLE = re.compile(
    r"_.*|(torch_)?dtype|transformers_version|name_or_path|architectures|auto_map|use_cache|use_bfloat16|output_.*|return_dict.*"
    r"|id2label|label2id|problem_type|finetuning_task|task_specific_params|tokenizer_class|initializer_.*|.*drop.*"
    r"|gradient_checkpointing|(pad|bos|eos|sep|cls|decoder_start|forced_[be]os)_token_id"
)


class OtherBase(UserError):
    """An adapter does not belong to the base that it was to be used on."""


def identity_of(base_dir: Path) -> dict[str, Any]:
    """What a manifest's `method` records of the base in `base_dir`; a tokenizer only where there is a ``tokenizer.json``."""
    path = base_dir / "tokenizer.json"
    words = {TOKENIZER: {"sha256": file_sha256(path), "ids": _ids(path, file_sha256(path))}} if path.is_file() else {}
    return {CONFIG: _kept(_raw(base_dir)), **words}


def identity_in(manifest: Manifest) -> dict[str, Any]:
    """What `identity_of` recorded of the adapter's base, for an adapter that is made from it."""
    return {k: manifest.method[k] for k in (CONFIG, TOKENIZER) if k in manifest.method}


def check_identity(where: Path, manifest: Manifest, base_dir: Path) -> None:
    """Raise `OtherBase`, naming the settings or the tokenizer, where the base in `base_dir` is not as it was recorded."""
    found = identity_in(manifest)
    if CONFIG in found:
        _check_config(where, found[CONFIG], base_dir)
    if TOKENIZER in found:
        _check_ids(where, found[TOKENIZER], base_dir)


def n_settings(manifest: Manifest) -> int:
    """How many settings of config.json were recorded."""
    return sum(1 for _ in _leaves(manifest.method.get(CONFIG, {})))


# --- config.json ---------------------------------------------------------------------------------------------------------


def config_difference(mine: Any, theirs: Any) -> list[str]:
    """Settings in which two transformers configurations differ, as far as they change what a model computes."""
    return _different(_plain(mine.to_dict()), _plain(theirs.to_dict()))


def _check_config(where: Path, stored: Any, base_dir: Path) -> None:
    now = _kept(_raw(base_dir))
    if not isinstance(stored, Mapping) or not stored:
        raise OtherBase(f"{where}: method.{CONFIG} of its manifest is no configuration, so its base cannot be told.")
    if stored != now:  # perhaps only written otherwise: let transformers read both
        try:
            odd = _different(_resolved(stored), _resolved(_raw(base_dir)))
        except UserError:
            odd = _different(dict(stored), now)
        if odd:
            more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
            raise OtherBase(
                f"{where}: the weights in {base_dir} are those of its base, but config.json there computes something else with them: "
                f"{'; '.join(odd[:4])}{more}. Put the right config.json back, or give the right base with --base."
            )


def _raw(base_dir: Path) -> dict[str, Any]:
    path = base_dir / "config.json"
    try:
        found = json.loads(read_text(path))  # infinities too: some families have them
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a model's configuration.")
    return found


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a config.json with its default, under the names that this version of transformers uses."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_text(json.dumps(config), encoding="utf-8")
        return _plain(load_config(scratch).to_dict())


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return _kept(json.loads(json.dumps(config, default=str)))


def _kept(value: Any) -> Any:
    """A configuration without what changes no logit and without paths, as strict JSON."""
    if isinstance(value, Mapping):
        return {
            str(k): _kept(v) for k, v in sorted(value.items())
            if not _IDLE.fullmatch(str(k)) and not (isinstance(v, str) and path_like(v))
        }  # fmt: skip
    if isinstance(value, list | tuple):
        return [_kept(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return {
            "__float__": {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
        }  # as transformers writes it
    return value


def _different(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    a, b = dict(_leaves(was)), dict(_leaves(now))
    return [f"{k} is {shown(b.get(k))}, was {shown(a.get(k))}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    rows = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in rows:
        yield from _leaves(item, f"{place}.{key}" if place else str(key))
    if not isinstance(value, Mapping | list):
        yield place, value


# --- tokenizer -----------------------------------------------------------------------------------------------------------


def _check_ids(where: Path, stored: Any, base_dir: Path) -> None:
    path = base_dir / "tokenizer.json"
    if not path.is_file():
        raise OtherBase(f"{where}: its base came with a tokenizer.json, and {base_dir} has none.")
    sha = file_sha256(path)
    if not isinstance(stored, Mapping) or (stored.get("sha256") != sha and stored.get("ids") != _ids(path, sha)):
        raise OtherBase(
            f"{where}: the weights in {base_dir} are those of its base, but tokenizer.json there gives other ids than in training, so "
            "that the model reads other inputs. Put the right tokenizer back, or give the right base with --base."
        )


@cache
def _ids(path: Path, sha: str) -> str:
    """Hash of a tokenizer's own words with their ids, and of the ids of `SAMPLES`; tokens merely added are no matter."""
    found = read_tokenizer(path)
    rows = [sorted(base_words(found).items()), sample_ids(found)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def read_tokenizer(path: Path) -> dict[str, Any]:
    value = read_json(path, " It is not a tokenizer.")
    if not isinstance(value.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer (no `model` in it).")
    return value


def base_words(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Words of a tokenizer.json's model with their ids."""
    vocab = tokenizer["model"].get("vocab") or {}
    if isinstance(vocab, list):  # unigram: [word, score], by position
        vocab = {str(row[0]): i for i, row in enumerate(vocab)}
    return dict(vocab)


def sample_ids(tokenizer: Mapping[str, Any]) -> list[list[int]]:
    """The ids of `SAMPLES`, without special tokens."""
    from tokenizers import Tokenizer

    # Padding and truncation are switches that a call leaves behind, not part of what a tokenizer is.
    plain = Tokenizer.from_str(json.dumps({**tokenizer, "padding": None, "truncation": None}))
    return [plain.encode(text, add_special_tokens=False).ids for text in SAMPLES]
