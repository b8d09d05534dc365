"""Whether adapters may stand together on a base: its digest, its tokenizer, the order of those trained on one another."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.manifest import NEUTRAL_PROMPTS
from ..folder.read import AdapterFolder, file_sha256, read_json

_SAMPLES = (*NEUTRAL_PROMPTS, "  two  spaces, CAPITALS and digits 2026-01-31\n", "naïve café – 你好 \N{GRINNING FACE}")


def check_base(folder: AdapterFolder, base_dir: Path, digest: str) -> None:
    """Refuse `folder` on a base with other weights than it was trained on."""
    base = folder.manifest.base
    if base.digest != digest:
        raise UserError(
            f"{folder.path}: was trained on the base {base.ref} with digest {base.digest[:12]}, but {base_dir} has digest "
            f"{digest[:12]}: other weights, on which this adapter means nothing. Give the right base with --base."
        )


def check_dependencies(folders: Mapping[str, AdapterFolder], scales: Mapping[str, float] | None = None) -> None:
    """Refuse adapters without those they were trained on top of, or in another order than that of training.

    scales: the scale that each is about to run at; one that differs from the scale an adapter above was trained over is a
    warning.
    """
    below: dict[str, str] = {}
    all_ids = {f.adapter_id: name for name, f in folders.items()}
    for name, folder in folders.items():
        if lost := [d for d in folder.manifest.depends_on if d not in below]:
            above = [all_ids[d] for d in lost if d in all_ids]
            why = f"{lost[0][:19]} is not among the adapters given"
            if above:
                why = f"{', '.join(above)} {'is' if len(above) == 1 else 'are'} given after it"
            raise UserError(
                f"{folder.path}: was trained on top of {len(lost)} adapter(s) that are not below it ({why}); "
                "give those first, in the order of training, or a stack file that holds all (peft-unlearn stack add)."
            )
        for adapter, trained in scales_below(folder):
            under = below.get(adapter)
            if scales is not None and under is not None and scales[under] != trained:
                warnings.warn(
                    f"{name} was trained over {under} at scale {trained:g}, and {under} now runs at {scales[under]:g}",
                    stacklevel=3,
                )
        below[folder.adapter_id] = name


def scales_below(folder: AdapterFolder) -> list[tuple[str, float]]:
    """(adapter id, scale) of those that an adapter was trained over, as its manifest says."""
    rows = folder.manifest.method.get("stack")
    rows = rows if isinstance(rows, list) else []
    return [(str(r["id"]), float(r["scale"])) for r in rows if isinstance(r, dict) and {"id", "scale"} <= set(r)]


def dependents(folders: Mapping[str, AdapterFolder], names: Iterable[str]) -> list[str]:
    """Adapters outside `names` that were trained on top of any of them, directly or through another, in stacking order."""
    gone = {folders[n].adapter_id for n in names}
    out = []
    for name, folder in folders.items():  # dependencies stand below, so that one pass is enough
        if folder.adapter_id not in gone and gone & set(folder.manifest.depends_on):
            gone.add(folder.adapter_id)
            out.append(name)
    return out


# --- tokenizers ----------------------------------------------------------------------------------------------------------


def check_tokenizer(folder: str | Path, base_dir: str | Path) -> None:
    """Refuse an adapter whose tokenizer gives other ids than its base's: it was trained on other inputs.

    Compared are the ids of all words both know, the words themselves (tokens that one side merely added, a padding token
    say, are no matter), and the ids of a few sample texts; not the chat template, padding or truncation, and not the tokens
    put around a text, which tools write differently for one and the same tokenizer. Where either side brings no
    ``tokenizer.json`` nothing can be compared.
    """
    mine, theirs = Path(folder, "tokenizer.json"), Path(base_dir, "tokenizer.json")
    if not mine.is_file() or not theirs.is_file() or file_sha256(mine) == file_sha256(theirs):
        return
    why = _difference(_read(mine), _read(theirs))
    if why:
        raise UserError(
            f"{folder}: was trained with another tokenizer than the base's ({why}), so it has learnt on other inputs than the "
            "ones it would get here. Give the base that it was trained on; if only its tokenizer files were replaced, put "
            "the right ones back."
        )


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path, " It is not a tokenizer.")
    if not isinstance(value.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer (no `model` in it).")
    return value


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    a, b = _words(mine), _words(theirs)
    moved = sorted(w for w in a.keys() & b.keys() if a[w] != b[w])
    if moved:
        w = moved[0]
        return f"{len(moved)} of its words have other ids, e.g. {w!r}: {a[w]}, not {b[w]}"
    alone = set(a.keys() ^ b.keys()) - _added(mine) - _added(theirs)
    if alone:
        return f"{len(alone)} words are in one of the two only, e.g. {min(alone)!r}"
    from tokenizers import Tokenizer

    # Padding and truncation are switches that a call leaves behind, not part of what a tokenizer is.
    plain = [Tokenizer.from_str(json.dumps({**t, "padding": None, "truncation": None})) for t in (mine, theirs)]
    for text in _SAMPLES:
        ids = [t.encode(text, add_special_tokens=False).ids for t in plain]
        if ids[0] != ids[1]:
            return f"the text {text!r} becomes {len(ids[0])} tokens, not the base's {len(ids[1])}, or others"
    return None


def _words(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = tokenizer["model"].get("vocab") or {}
    if isinstance(vocab, list):  # unigram: [word, score], by position
        vocab = {str(row[0]): i for i, row in enumerate(vocab)}
    added = {str(t.get("content")): int(t.get("id", -1)) for t in tokenizer.get("added_tokens") or []}
    return {**vocab, **added}


def _added(tokenizer: dict[str, Any]) -> set[str]:
    return {str(t.get("content")) for t in tokenizer.get("added_tokens") or []}
