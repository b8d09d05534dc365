"""Arithmetic of adapters: a signed sum of several as one stock adapter, exactly, or cut to a rank with the error said.

sum_i c_i B_i A_i = B A with A = [A_1; A_2; ..] and B = [c_1 B_1, c_2 B_2, ..]: concatenation is exact for any ranks and
signs, where adding the A's and the B's (PEFT's "linear") also adds the cross terms B_i A_j. Cutting to rank r is the best
approximation of that sum (Eckart and Young), found from the factors alone: with B = Q_b R_b and A^T = Q_a R_a the singular
values of B A are those of the small R_b R_a^T, so no matrix of a weight's size is ever formed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..folder.atomic import room_for
from ..folder.base import load_base, load_tokenizer, peft_base_name, resolve_base
from ..folder.digest import digest_checkpoint, targeted_names
from ..folder.fetch import resolve_adapter
from ..folder.manifest import NEUTRAL_PROMPTS, Manifest, neutral_images, probes
from ..folder.read import CONFIG, MANIFEST, AdapterFolder, read_adapter
from ..folder.versions import versions
from ..folder.write import check_destination, write_adapter
from ..folder.yaml_io import read_text
from ..reporting.result import Result
from ..reporting.tables import Table, to_text
from ..stack.attach import attach, load_by_peft
from ..stack.fits import check_base, check_tokenizer
from ..stack.identity import identity_in
from ..stack.removal import unload
from ..tuners.delta import Deltas, is_sparse
from ..tuners.peft_type import FORGET_VECTOR
from ..tuners.sparse.delta import SparseDeltas
from ..tuners.sparse.export import STOCK, Entries, linear_in
from ..tuners.sparse.export import write as write_sparse
from ..tuners.stock import write_stock
from .layout import meta_model
from .summed import Summed, summed
from .vectors import is_vector, vector_sum

Part = tuple[str | Path, float]


@dataclass
class Composition(Result):
    """What was written. terms: of the sum, as the recipe has them. errors: weight -> |D - D_r| / |D| (Frobenius) where it was
    cut to a rank, else empty. entries: of a sum of sparse adapters, which has no rank."""

    folder: AdapterFolder
    terms: list[dict[str, Any]]
    rank: int | None
    n_weights: int
    errors: dict[str, float] = field(default_factory=dict)
    probed: bool = False
    entries: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.folder.path), "adapter_id": self.folder.adapter_id, "parts": self.terms, "rank": self.rank,
            "weights": self.n_weights, "errors": self.errors, "worst_error": max(self.errors.values(), default=None),
            "probes": self.probed, **({} if self.entries is None else {"entries": self.entries}),
        }  # fmt: skip

    def __str__(self) -> str:
        terms = " ".join(
            f"{p['weight']:+g} {p['name']}" + (f" (at its scale {p['scale']:g})" if p["scale"] != 1 else "")
            for p in self.terms
        )
        size = f"rank {self.rank}" if self.entries is None else f"{self.entries:,} entries"
        head = f"{self.folder.path}: {terms}, {size}, {self.n_weights} weights, {self.folder.adapter_id[:19]}"
        rows = [(name, f"{error:.2e}") for name, error in self.errors.items()]
        table = (
            to_text(Table(("weight", "relative error"), rows))
            if rows
            else f"exact: the {'factors stand side by side' if self.entries is None else 'union of the entries'}"
        )
        return f"{head}\n{table}"


def parse_part(text: str) -> Part:
    """("DIR", 0.5) of ``DIR:0.5``; without a weight it is 1."""
    head, sign, tail = text.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0
    if not sign or not head:
        raise UserError(f"compose {text!r}: expected ADAPTER:WEIGHT, for example out/people:-0.5.")
    if not math.isfinite(weight):
        raise UserError(f"compose {text!r}: the weight must be a finite number.")
    return head, weight


def compose(
    parts: Sequence[Part],
    out: str | Path,
    *,
    rank: int | None = None,
    base: str | Path | None = None,
    probe: bool = True,
    name: str = "",
    description: str = "",
    learned: Mapping[str, Any] | None = None,
) -> Composition:
    """Write the sum of weight times adapter as a forget adapter of its own that plain PEFT loads at scale 1.

    Args:
        parts: (folder or Hub id, weight); the weight multiplies the adapter at its own manifest's scale, so that weights
            of 1 are what `ForgetModel.from_pretrained` runs. One adapter alone may be given: -1 negates it.
        rank: cut every weight's sum to this rank; default the exact sum, whose rank is the sum of ranks.
        base: of the adapters, for the probes; default the one their manifests name.
        probe: False where the base cannot be had: the result then holds no probes.
        learned: how the weights were found, where they were learned, and the data that they were learned on.

    Raises:
        UserError: an adapter that is not a plain sum, adapters of different bases, a sum that is zero, or something at
            `out` that is not a forget adapter. Nothing is written then.
    """
    _refuse_trained(out)
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UserError(f"compose: rank must be a whole number from 1 on, not {rank!r}.")
    given = _collected(parts)
    check_destination(out, (folder.path for folder, _ in given))
    base_dir = _base_of(given, base, probe)
    vector = vector_sum(given, rank)
    union = None if vector is not None else _union(given, rank, base_dir)
    rows = (
        {}
        if union is not None or vector is not None
        else summed([Deltas(f) for f, _ in given], [w * float(f.manifest.scale) for f, w in given])
    )
    errors = {} if rank is None else {weight: row.cut(rank) for weight, row in rows.items()}
    described = [
        {"adapter": f.adapter_id, "name": _name(f), "weight": w, "scale": float(f.manifest.scale)} for f, w in given
    ]
    recipe = {
        "name": name or " ".join(f"{p['weight']:+g} {p['name']}" for p in described),
        "description": description or _in_words(described, rank, errors),
        "base": given[0][0].manifest.base.ref,
        "compose": {"parts": described, "rank": rank},
    }
    if learned is not None:
        recipe["compose"]["learned"] = {k: v for k, v in learned.items() if k != "data"}
    at = {n.removesuffix(".weight") for n in union} if union is not None else {
        r.like.weight if r.like.kind == "parameter" else r.like.module for r in rows.values()
    }  # fmt: skip
    manifest = _manifest(given, recipe, sorted(at or given[0][0].manifest.targets), errors)
    if learned is not None:
        manifest = replace(manifest, data=dict(learned["data"]))
    if vector is not None:
        manifest = replace(manifest, method={**manifest.method, "peft_type": FORGET_VECTOR})
    tokenizer = _tokenizer(given[0][0], base_dir)

    def write(stage: Path) -> dict[str, Tensor]:
        name = peft_base_name(manifest.base.ref), manifest.base.revision
        if union is not None:
            return write_sparse(
                stage, union, _linear(given, base_dir), 1.0, given[0][0].config.get("task_type"), *name
            )[0]
        tensors, config = vector or _stock(rows, given)
        write_stock(stage, config, tensors, *name)
        return tensors

    if probe and base_dir is not None and (tokenizer is not None or vector is not None) and not manifest.depends_on:
        with room_for(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            manifest = _probed(manifest, Path(scratch), base_dir, tokenizer)
    folder = write_adapter(out, None, manifest, recipe, tokenizer=tokenizer, save=write)
    if vector is not None:
        size = sum(t.numel() for t in vector[0].values())
        return Composition(folder, described, None, 1, {}, manifest.probes is not None, size)
    if union is not None:
        return Composition(
            folder, described, None, len(union), {}, manifest.probes is not None, sum(map(len, union.values()))
        )
    return Composition(folder, described, folder.config["r"], len(rows), errors, manifest.probes is not None)


def _refuse_trained(out: str | Path) -> None:
    """A sum replaces another sum, which can be made again, and never an adapter that somebody trained."""
    there = Path(out).expanduser() / MANIFEST
    if there.is_file() and "compose" not in Manifest.from_text(read_text(there), str(there)).method:
        raise UserError(f"{out}: holds an adapter that was trained, which a sum does not replace; name another folder.")


def _name(folder: AdapterFolder) -> str:
    return folder.manifest.name or folder.path.resolve().name


def _in_words(parts: list[dict[str, Any]], rank: int | None, errors: dict[str, float]) -> str:
    terms = "; ".join(f"{p['weight']:g} times {p['name']} ({p['adapter'][:19]})" for p in parts)
    if rank is None:
        return f"The exact sum of forget adapters: {terms}."
    return f"A sum of forget adapters, cut to rank {rank} (relative error at most {max(errors.values()):.2g}): {terms}."


def _collected(parts: Sequence[Part]) -> list[tuple[AdapterFolder, float]]:
    """The adapters, each once, with what they weigh together; those of weight zero are left out."""
    if not parts:
        raise UserError("compose: give at least one adapter, e.g. A:1 B:-0.5.")
    found: dict[tuple[str, float], tuple[AdapterFolder, float]] = {}
    for ref, weight in parts:
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"compose {ref}: the weight must be a finite number, not {weight!r}.")
        folder = read_adapter(resolve_adapter(ref))
        key = folder.adapter_id, float(folder.manifest.scale)
        found[key] = folder, float(weight) + (found[key][1] if key in found else 0.0)
    given = [(f, w) for f, w in found.values() if w * float(f.manifest.scale) != 0]
    if not given:
        raise UserError("compose: the sum is zero, which is the base itself; no adapter was written.")
    first = given[0][0]
    for folder, _ in given[1:]:
        a, b = folder.manifest.base, first.manifest.base
        if a.digest != b.digest:
            raise UserError(
                f"{folder.path}: stands on {a.ref} with digest {a.digest[:12]}, and {first.path} on {b.ref} with digest "
                f"{b.digest[:12]}; adapters of different bases have no sum."
            )
    return given


def _base_of(given: list[tuple[AdapterFolder, float]], base: str | Path | None, probe: bool) -> Path | None:
    ref = given[0][0].manifest.base
    try:
        found = resolve_base(ref.ref, override=base, revision=ref.revision)
    except UserError as e:
        if base is None and not probe:
            return None
        raise UserError(f"{e} The probes need it; without them: --no-probes.") from None
    digest = digest_checkpoint(found)
    for folder, _ in given:
        check_base(folder, found, digest)
        check_tokenizer(folder.path, found)
    return found


def _union(
    given: list[tuple[AdapterFolder, float]], rank: int | None, base_dir: Path | None
) -> dict[str, Entries] | None:
    """The sum of sparse adapters, parameter by parameter: the union of their entries. None where all are low-rank.

    Raises:
        UserError: low-rank ones among them, a rank, or a sum that is zero.
    """
    sparse = [is_sparse(f) for f, _ in given]
    if not any(sparse):
        return None
    if not all(sparse):
        low, other = (given[sparse.index(kind)][0].path for kind in (False, True))
        raise UserError(
            f"{low} is low-rank and {other} sparse: their sum is neither, and as a whole matrix it would be the size of the base. Stack "
            "them (peft-unlearn stack), or merge both into the base (peft-unlearn merge)."
        )
    if rank is not None:
        raise UserError("compose: sparse adapters have no rank to be cut to; leave --rank out.")
    model = None if base_dir is None else meta_model(base_dir)
    found: dict[str, list[tuple[Entries, float]]] = {}
    for folder, weight in given:
        deltas = SparseDeltas(folder, model)
        for name, e in deltas.entries.items():
            found.setdefault(name, []).append((e, weight * float(folder.manifest.scale) * deltas.scale))
    out = {name: Entries.summed(parts) for name, parts in sorted(found.items())}
    if not any(bool(e.values.any()) for e in out.values()):
        raise UserError("compose: the sum is zero, which is the base itself; no adapter was written.")
    return out


def _linear(given: list[tuple[AdapterFolder, float]], base_dir: Path | None) -> Callable[[str], bool]:
    """Whether a parameter is the weight of a linear layer: as the base says; without it, as those on top say that SHiRA holds."""
    if base_dir is not None:
        return linear_in(meta_model(base_dir))
    known = {n for f, _ in given if f.config["peft_type"] in STOCK for n in SparseDeltas(f).entries}
    return lambda name: name in known


# --- writing -------------------------------------------------------------------------------------------------------------


def _stock(rows: dict[str, Summed], given: list[tuple[AdapterFolder, float]]) -> tuple[dict[str, Tensor], Any]:
    """(tensors, ``LoraConfig``) as stock PEFT reads them; one rank for all modules, with scaling 1."""
    from peft import LoraConfig

    modules = {w: r for w, r in rows.items() if r.like.kind != "parameter"}
    parameters = {w: r for w, r in rows.items() if r.like.kind == "parameter"}
    r = max(row.rank for row in (modules or parameters).values())
    ranks = {w: row.rank for w, row in parameters.items() if row.rank != r}
    tensors: dict[str, Tensor] = {}
    for weight, row in {**modules, **parameters}.items():
        at, rank = row.like.module, r
        if weight in parameters:
            at, rank = at + ".base_layer" * _depth(weight, row, parameters), row.rank
        infix, end = ("lora_embedding_", "") if row.like.kind == "embedding" else ("lora_", ".weight")
        for which, t in zip("AB", row.padded(rank), strict=True):
            tensors[f"base_model.model.{at}.{infix}{which}{end}"] = t
    config = LoraConfig(
        r=r, lora_alpha=r, target_modules=sorted({row.like.module for row in modules.values()}),
        target_parameters=sorted(parameters) or None, rank_pattern=ranks, alpha_pattern=dict(ranks),
        fan_in_fan_out=any(f.config.get("fan_in_fan_out") for f, _ in given),
        task_type=given[0][0].config.get("task_type"),
    )  # fmt: skip
    return tensors, config


def _depth(weight: str, row: Summed, parameters: dict[str, Summed]) -> int:
    """How many wrappers stand around this parameter's own: PEFT puts the one its module holds first inmost."""
    beside = [w for w, r in parameters.items() if r.like.module == row.like.module]
    order = sorted(beside, key=lambda w: (not w.rpartition(".")[2].startswith("gate_up"), w))  # as `delta` reads them
    return len(order) - 1 - order.index(weight)


def _manifest(
    given: list[tuple[AdapterFolder, float]], recipe: dict[str, Any], targets: list[str], errors: dict[str, float]
) -> Manifest:
    ids = {f.adapter_id for f, _ in given}
    needs = dict.fromkeys(d for f, _ in given for d in f.manifest.depends_on if d not in ids)
    data: dict[str, dict[str, Any]] = {}
    for folder, _ in given:
        for key, about in folder.manifest.data.items():
            whose = f"{_name(folder)}/{key}"
            free, k = key, 1
            while data.get(free, about) != about:  # another set of the same name: say whose it is
                free, k = whose if k == 1 else f"{whose}_{k}", k + 1
            data[free] = about
    base = given[0][0].manifest.base
    method = {
        "compose": recipe["compose"]["parts"],
        "rank": recipe["compose"]["rank"],
        **identity_in(given[0][0].manifest),
    }
    if errors:
        method["worst_error"] = max(errors.values())
    return Manifest(
        base=replace(base, digest_targeted=None),
        method=method,
        data=data,
        versions=versions(),
        depends_on=list(needs),
        targets=targets,
        name=recipe["name"],
        description=recipe["description"],
    )


def _tokenizer(folder: AdapterFolder, base_dir: Path | None) -> Any:
    try:
        return load_tokenizer(folder.path, *([] if base_dir is None else [base_dir]))
    except UserError:
        return None


def _probed(manifest: Manifest, stage: Path, base_dir: Path, tokenizer: Any) -> Manifest:
    """`manifest` with the probes of what was composed, and the digest of the weights under it.

    The base is loaded with it by PEFT's own means first, as anyone would; every tensor has to arrive.
    """
    folder = AdapterFolder(stage, manifest, {}, json.loads((stage / CONFIG).read_text(encoding="utf-8")), None)
    base = load_base(base_dir, fits=manifest.targets)
    try:
        model = attach(base, {"default": folder}) if is_sparse(folder) else load_by_peft(base, "default", stage)
    except ValueError as e:
        raise RuntimeError(f"PEFT does not load what was composed: {e}") from None
    shape = folder.config.get("shape") if is_vector(folder) else None
    found = probes(model.eval(), tokenizer, neutral_images(*shape) if shape else NEUTRAL_PROMPTS)
    modules = targeted_names(attach(unload(model), {"default": folder}))  # the names that a check will ask for
    try:
        targeted = digest_checkpoint(base_dir, modules)
    except UserError:
        targeted = None  # the files call these weights otherwise
    return replace(manifest, probes=found, base=replace(manifest.base, digest_targeted=targeted))
