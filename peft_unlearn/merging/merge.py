"""Writing adapters into their base's weights: cast(W + D) in float32 with one cast, and what that cast kept.

Rounding to a short dtype can swallow a small delta whole: what was kept is cast(W + D) - cast(W), and the table gives, per
layer (per expert, where experts are fused), its cosine with the wanted D and the share of weights that changed at all. The
base's files are streamed into the merged model's (`stream`); no model is built unless `in_memory` asks for it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folder.base import resolve_base
from ..folder.digest import combined, digest_checkpoint
from ..folder.dtype import own_dtype
from ..folder.fetch import resolve_adapter
from ..folder.merge_record import RECORD, read_record, write_record
from ..folder.read import AdapterFolder, read_adapter
from ..folder.safetensors_io import WEIGHTS, TensorEntry, checkpoint_tensors
from ..stack.fits import check_dependencies, check_tokenizer
from ..stack.identity import check_identity
from ..stack.names import Adapters, names_of, scales_of
from ..stack.stackfile import is_stack, load
from .gate import Judge, by_probes, gate
from .layout import Layout
from .onto import weights
from .report import MIN_COSINE, Job, LayerMerge, MergeReport
from .rounding import DTYPES, ROUNDINGS, Sums
from .sidecars import write_index, write_sidecars
from .stage import MergeStage, check_destination, sweep
from .stream import Stream, empty_table, shards


def merge(
    adapters: Adapters,
    base_dir: str | Path | None = None,
    out: str | Path = "",
    dtype: str = "auto",
    scale: float | Sequence[float] | Mapping[str, float] | None = None,
    min_cosine: float = MIN_COSINE,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    onto: str | Path | None = None,
    in_memory: bool = False,
    check: bool = False,
    force: bool = False,
    judge: Judge = by_probes,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Write base + adapters as a plain model to `out`, loadable by AutoModelForCausalLM.

    The folder appears whole or not at all; a run that was cut short is gone on with by the same call, and one that is done,
    killed before it could say so, say, is reported as done.

    Args:
        adapters: one folder (or Hub id), or several in stacking order; their deltas are summed in one pass. Or a stack file:
            its active adapters at their scales.
        base_dir: default the first manifest's base.
        dtype: float32, bfloat16, float16, or auto: the base's own; what the class keeps in float32 stays in it.
        scale: default each manifest's own; one number for one adapter, else a list or name -> number.
        min_cosine: where a layer's kept delta has a smaller cosine with the wanted one, the merged model is judged before it
            appears (`gate.gate`): it has to behave as the unmerged one.
        rounding: "nearest", or "stochastic": the delta in expectation, with noise (`seed`). Its cosine is low by nature and
            is reported, not refused; refused is a gain further than `MAX_DRIFT` from 1.
        onto: take the weights from this folder instead of the base: same architecture, other numbers (the base quantized
            and dequantized, say). Nothing can say then whether the adapter means anything on them. For an adapter that was trained on
            a quantized base it has to be said: "original" (the base's files) or "dequantized" (what it was trained on, as floats).
        in_memory: build the model; for the rare layouts that cannot be streamed.
        check: judge it in any case; the numbers are in `report.check`.
        force: write it whatever was lost.
        judge: compares the merged model in a folder with the unmerged one, see `gate`; None where it cannot.
        progress: called with ("shards", how many are written, of how many).

    Raises:
        MergeRefused: rounding would lose the adapter. UserError: an adapter that is no plain sum, other weights, a
            value that does not fit the dtype, an `out` that holds anything, a damaged file.
    """
    with weights(given(adapters, None)[0], base_dir, onto, out) as place:
        job = _prepare(adapters, base_dir, out, dtype, scale, rounding, seed, place)
        passes = partial(gate, job, min_cosine=min_cosine, judge=judge, check=check, force=force)
        if _done(job):
            passes(job.out)
        elif in_memory:
            from .in_memory import merge_in_memory

            merge_in_memory(job, passes)
        else:
            _stream(job, passes, progress or (lambda *_: None))
        return job.report


def _prepare(
    adapters: Adapters, base_dir: Any, out: Any, dtype: str, scale: Any, rounding: str, seed: int, onto: Any
) -> Job:
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}.")
    if rounding not in ROUNDINGS:
        raise UserError(f"rounding {rounding!r}: expected one of {', '.join(ROUNDINGS)}.")
    if not str(out):
        raise UserError("merge: say where to write the merged model (--out).")
    target = Path(out).expanduser()
    if not (target / RECORD).is_file():  # else `_done` looks closer
        check_destination(target.resolve() if target.is_symlink() else target)
    folders, scales = given(adapters, scale)
    check_dependencies(folders, scales)
    ref = next(iter(folders.values())).manifest.base
    base_path = resolve_base(ref.ref, override=onto or base_dir, revision=ref.revision)
    if (earlier := read_record(base_path)) is not None and onto is None:
        names = ", ".join(str(a.get("name")) for a in earlier.get("adapters", []))
        raise UserError(
            f"{base_path}: is itself a merged model ({RECORD}: {names}), and an adapter is merged once, into the base that it "
            "was trained on. Give that base with --base, and all adapters in one call."
        )
    dtype = own_dtype(base_path) if dtype == "auto" else dtype
    if rounding == "stochastic" and dtype == "float32":
        raise UserError("rounding 'stochastic' is for bfloat16 and float16: nothing is rounded away in float32.")
    digests = {f.manifest.base.digest for f in folders.values()}
    if len(digests) > 1:
        raise UserError(
            f"These adapters were trained on {len(digests)} different bases; only those of one can be summed."
        )
    for folder in folders.values():
        check_tokenizer(folder.path, base_path)
        if onto is None:
            check_identity(folder.path, folder.manifest, base_path)
    return Job(folders, scales, base_path, None if onto else digests.pop(), target, dtype, rounding, seed)


def given(adapters: Adapters, scale: Any) -> tuple[dict[str, AdapterFolder], dict[str, float]]:
    """The adapters' folders, or those of a stack file, and the scale of each."""
    if isinstance(scale, int | float):
        scale = [scale]
    if isinstance(adapters, str | Path) and is_stack(adapters):
        stack = load(adapters)
        folders, written = stack.folders(), stack.scales()
        scale = {**written, **scale} if isinstance(scale, Mapping) else scale or written
    else:
        folders = {name: read_adapter(resolve_adapter(ref)) for name, ref in names_of(adapters).items()}
    scales = {n: float(v) for n, v in scales_of(folders, scale).items()}
    for name, value in scales.items():
        if not math.isfinite(value):
            raise UserError(f"scale of {name!r}: expected a finite number, found {value!r}.")
    if not any(scales.values()):
        raise UserError("merge: every scale is 0, so the result would be the base; name another scale.")
    return folders, scales


def _done(job: Job) -> bool:
    """Whether this very merge lies at its destination, whole; the report is filled from its record then.

    Raises:
        UserError: something else lies there.
    """
    place = job.out.resolve() if job.out.is_symlink() else job.out
    if not (place / RECORD).is_file():
        return False
    try:
        record = read_record(place) or {}
        same = record["digest"] == digest_checkpoint(place) and (place / "config.json").is_file()
        layers = [LayerMerge(**row) for row in record["layers"]]
    except (UserError, KeyError, TypeError):
        same, layers = False, []
    if same:
        job.was_read(digest_checkpoint(job.base_path))
        same = all(record.get(k) == v for k, v in job.record().items() if k not in ("digest", "worst_cosine", "layers"))
    if not same:
        check_destination(place)
    sweep(place)
    job.report.digest, job.report.layers, job.report.done = record["digest"], layers, True
    return True


def _stream(job: Job, passes: Callable[[Path], None], progress: Callable[[str, int, int], None]) -> None:
    entries = checkpoint_tensors(job.base_path)
    layout = Layout(job.base_path, entries, job.targets)
    stream = Stream(layout, job.overlay(layout.model), job.dtype, job.rounding, job.seed)
    by_shard = {p.relative_to(job.base_path).as_posix(): es for p, es in shards(entries.values()).items()}
    about = {
        "stage": 1, "base": job.expected or digest_checkpoint(job.base_path), "dtype": job.dtype, "rounding": job.rounding,
        "seed": job.seed, "adapters": [[f.adapter_id, job.scales[n]] for n, f in job.folders.items()],
        "files": {Path(s).name: sum(e.end - e.begin for e in es) for s, es in by_shard.items()},
    }  # fmt: skip
    with MergeStage(job.out, about) as stage:
        try:
            records = _write_shards(job, stream, by_shard, stage, progress)
            _account(job, stream, records)
            _sidecars(job, stage.model, records)
            passes(stage.model)
            stage.finish()
        except UserError:
            stage.discard()
            raise
        except OSError as e:
            raise UserError(
                f"{job.out}: cannot be written ({e.strerror}). Whole shards are kept beside it; the same call goes on there."
            ) from None


def _write_shards(
    job: Job,
    stream: Stream,
    by_shard: Mapping[str, list[TensorEntry]],
    stage: MergeStage,
    progress: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """Shard -> its record, an earlier run's where that is still good."""
    records, flushed = {}, []
    with ThreadPoolExecutor(1) as disk:  # the next shard is under way while the last one reaches the disk
        for i, (name, members) in enumerate(by_shard.items()):
            record = stage.done(name)
            if record is None:
                need, free = sum(map(stream.size, members)), shutil.disk_usage(stage.root).free
                if free < need:
                    raise OSError(28, f"{name} needs {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free")
                record = stream.write(members, stage.model / name)
                flushed.append(disk.submit(stage.record, name, record))
            else:
                job.report.resumed += 1
            records[name] = record
            progress("shards", i + 1, len(by_shard))
        for record in flushed:
            record.result()
    return records


def _account(job: Job, stream: Stream, records: Mapping[str, dict[str, Any]]) -> None:
    """The base's digest, from what was read; the output's; and the table."""
    read, written, sums = {}, {}, empty_table(stream.units)
    for record in records.values():
        for name, row in record["tensors"].items():
            entry = stream.layout.entries[name]
            read[name] = (entry.dtype, entry.shape, row["in"])
            written[name] = (row["dtype"], tuple(row["shape"]), row["out"])
        for weight, expert, *values in record["sums"]:
            sums[weight, expert].add(Sums(*values))
    job.was_read(combined(read))
    job.report.digest = combined(written)
    job.account(sums)


def _sidecars(job: Job, model: Path, records: Mapping[str, dict[str, Any]]) -> None:
    if list(records) != [WEIGHTS]:
        write_index(model, records)
    write_record(model, job.record())
    write_sidecars(model, job.base_path, job.tokenizers, job.dtype)
