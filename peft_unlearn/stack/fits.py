"""Whether adapters may stand together on a base: its digest, its tokenizer, the order of those trained on one another."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.read import AdapterFolder, file_sha256
from .identity import SAMPLES, OtherBase, base_words, check_identity, read_tokenizer, sample_ids


def check_base(folder: AdapterFolder, base_dir: Path, digest: str) -> None:
    """Refuse `folder` on a base with other weights, another configuration or another tokenizer than it was trained on."""
    check_weights_of(folder, base_dir, digest)
    check_identity(folder.path, folder.manifest, base_dir)


def check_weights_of(folder: AdapterFolder, base_dir: Path, digest: str) -> None:
    """`check_base`, the weights alone."""
    base = folder.manifest.base
    if base.digest != digest:
        raise OtherBase(
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
    """Refuse an adapter whose tokenizer gives other ids than its base's: it was trained on other inputs."""
    if why := tokenizer_difference(folder, base_dir):
        raise OtherBase(
            f"{folder}: was trained with another tokenizer than the base's ({why}), so it has learnt on other inputs than the "
            "ones it would get here. Give the base that it was trained on; if only its tokenizer files were replaced, put "
            "the right ones back."
        )


def tokenizer_difference(folder: str | Path, base_dir: str | Path) -> str | None:
    """In what the tokenizer of `folder` gives other ids than that of `base_dir`; None where in nothing.

    Compared are the ids of all words both know, the words themselves (tokens that one side merely added, a padding token
    say, are no matter), and the ids of a few sample texts; not the chat template, padding or truncation, and not the tokens
    put around a text, which tools write differently for one and the same tokenizer. Where either side brings no
    ``tokenizer.json`` nothing can be compared.
    """
    mine, theirs = Path(folder, "tokenizer.json"), Path(base_dir, "tokenizer.json")
    if not mine.is_file() or not theirs.is_file() or file_sha256(mine) == file_sha256(theirs):
        return None
    return _difference(read_tokenizer(mine), read_tokenizer(theirs))


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    a, b = words(mine), words(theirs)
    moved = sorted(w for w in a.keys() & b.keys() if a[w] != b[w])
    if moved:
        w = moved[0]
        return f"{len(moved)} of its words have other ids, e.g. {w!r}: {a[w]}, not {b[w]}"
    alone = set(a.keys() ^ b.keys()) - _added(mine).keys() - _added(theirs).keys()
    if alone:
        return f"{len(alone)} words are in one of the two only, e.g. {min(alone)!r}"
    for text, x, y in zip(SAMPLES, sample_ids(mine), sample_ids(theirs), strict=True):
        if x != y:
            return f"the text {text!r} becomes {len(x)} tokens, not the base's {len(y)}, or others"
    return None


def words(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Word -> id, added ones too; of those that the model has itself its id counts."""
    return {**_added(tokenizer), **base_words(tokenizer)}


def _added(tokenizer: dict[str, Any]) -> dict[str, int]:
    return {str(t.get("content")): int(t.get("id", -1)) for t in tokenizer.get("added_tokens") or []}
