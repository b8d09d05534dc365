"""Whether a folder is what its manifest says, and does on this base what its author saw. All that can be recomputed is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..folder.digest import digest_checkpoint, targeted_names
from ..folder.fetch import resolve_adapter
from ..folder.manifest import Probes, n_values, probe_difference
from ..folder.quantized import RECORD, identity, name_of, trained_on
from ..folder.read import CONFIG, RECIPE, WEIGHTS, AdapterFolder, read_adapter
from ..folder.safetensors_io import checkpoint_tensors, read_header
from ..folder.schema import is_number, shown
from ..reporting.result import Result
from ..stack.below import Below, over
from ..stack.fits import check_dependencies, check_tokenizer, check_weights_of, words
from ..stack.identity import check_identity, n_settings, read_tokenizer
from ..stack.model import probes_on
from ..stack.removal import PROBE_TOLERANCE
from ..training.adapt import adapted

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
              "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja")  # fmt: skip
TOP = "default"  # on the model that is looked at
Verdict = Literal["ok", "failed", "cannot tell"]


@dataclass
class Check:
    """One question and its answer. `detail` says what was compared."""

    name: str
    verdict: Verdict
    detail: str


@dataclass
class Verification(Result):
    """All checks of one adapter, in the order in which they were made."""

    source: str
    adapter_id: str | None = None
    checks: list[Check] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """failed if any check failed, ok if all are, else cannot tell."""
        found = {check.verdict for check in self.checks}
        return "failed" if "failed" in found else "ok" if found == {"ok"} else "cannot tell"

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict == "ok" else 1

    def add(self, name: str, verdict: Verdict, detail: str) -> None:
        self.checks.append(Check(name, verdict, detail))

    def compared(self, name: str, n: int, what: str) -> None:
        """A check that found `n` values as they should be; none is not enough."""
        self.add(
            name,
            "ok" if n else "failed",
            f"{n:,} {what}" if n else "nothing to compare: the folder holds no values for this",
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.checks), default=0)
        lines = [f"{c.verdict:<11}  {c.name:<{width}}  {c.detail}" for c in self.checks]
        return "\n".join([f"{self.source}: {self.verdict}", *lines])


def verify(folder: str | Path, base: str | Path | None = None, below: Sequence[str | Path] = ()) -> Verification:
    """Check files, hashes, manifest, weights, scale, base, configuration, tokenizer, targets and probes of an adapter folder.

    Every check says how many values it compared, and one that compared none has failed. The two probe checks run four short
    prompts with the adapter off and on and compare the 16 largest logits of each with the manifest's. Where the base is not
    available, what needs it is "cannot tell".

    Args:
        folder: on this disk, or a Hub id (``id@commit``).
        base: folder, Hub id or ``embedded:NAME``; default the manifest's.
        below: the adapters that it was trained on top of, lowest first; they run at the scale they had then.

    Raises:
        UserError: no such folder and no such repository, or adapters below that are damaged or not those that it needs.
    """
    result = Verification(str(folder))
    path = resolve_adapter(folder)
    try:
        found = read_adapter(path)
    except UserError as e:
        result.add("files", "failed", str(e))
        return result
    result.adapter_id = found.adapter_id
    _files(found, result)
    entries = read_header(found.path / WEIGHTS).values()
    result.compared(
        "weights",
        sum(math.prod(e.shape) for e in entries),
        f"values in {len(entries)} tensors, finite and not all zero",
    )
    _scale(found, result)
    _against_base(found, base, result, _below(found, below))
    return result


def _files(found: AdapterFolder, result: Verification) -> None:
    hashed = {n for n, sha in found.manifest.files.items() if sha is not None}
    read = [n for n in (CONFIG, WEIGHTS, RECIPE, *_TOKENIZER) if (found.path / n).is_file()]
    read += [
        p.relative_to(found.path).as_posix()
        for c in found.path.glob(f"*/{CONFIG}")
        for p in c.parent.glob("*")
        if p.is_file()
    ]
    if free := sorted({*read} - hashed):
        result.add("files", "failed", f"{len(free)} files have no sha256 in the manifest, first {free[0]}")
    else:
        result.compared("files", len(hashed), "files have the sha256 that the manifest names; no others are needed")


def _scale(found: AdapterFolder, result: Verification) -> None:
    """Off or upside down, an adapter does not do what it was made for, whatever its files are."""
    config = found.config
    factors = {"scale": found.manifest.scale} | {k: config[k] for k in ("lora_alpha",) if config.get(k) is not None}
    patterns = config.get("alpha_pattern")
    factors |= {f"alpha_pattern {k}": v for k, v in (patterns.items() if isinstance(patterns, dict) else ())}
    if bad := [f"{k} is {shown(v)}" for k, v in factors.items() if not is_number(v) or not v > 0]:
        result.add("scale", "failed", f"{'; '.join(bad[:3])}: it would be off, or do the opposite")
    else:
        result.compared("scale", len(factors), f"factors above 0; it is meant to run at {found.manifest.scale:g}")


def _below(found: AdapterFolder, given: Sequence[str | Path]) -> Below | None:
    """What lies under the adapter, with itself on top, at the scales of its training; None where those are not named."""
    if not given:
        return None if found.manifest.depends_on else Below({TOP: found}, {})
    whole = over({TOP: found}, given)
    check_dependencies(whole.folders)
    return whole


def _against_base(found: AdapterFolder, base: str | Path | None, result: Verification, stack: Below | None) -> None:
    from ..folder.base import load_base, load_tokenizer, resolve_base

    ref = found.manifest.base
    try:
        base_dir = resolve_base(ref.ref, override=base, revision=ref.revision)
    except UserError as e:
        result.add("base", "cannot tell", str(e))
        return
    if not _same_base(found, base_dir, result, stack):
        return
    if stack is None:
        ids = ", ".join(d[:19] for d in found.manifest.depends_on)
        why = f"was trained on top of other adapters ({ids}); name them, lowest first, with --below"
        result.add("probes", "cannot tell", why)
        return
    try:
        model = stack.put_on(load_base(base_dir, fits=found.manifest.targets))
    except UserError as e:
        result.add("loading", "failed", str(e))
        return
    _targets(found, model, base_dir, result)
    tokenizer = load_tokenizer(found.path, base_dir)
    if found.manifest.probes is None:
        result.add("probes", "cannot tell", "the manifest holds none")
    else:
        _probes(found.manifest.probes, model, tokenizer, result)
    try:
        _quantized(found, stack, base_dir, tokenizer, result)
    except UserError as e:
        result.add("quantized", "cannot tell", str(e))


def _quantized(found: AdapterFolder, stack: Below, base_dir: Path, tokenizer: Any, result: Verification) -> None:
    """The same probes on the base as it was held in the training, where that was in fewer bits."""
    from ..folder.base import load_base

    if (held := trained_on(found.manifest.method)) is None:
        return
    options, dtype = held
    record, words = found.manifest.method[RECORD], f"{name_of(options)} in {dtype}"
    if record.get("digest") != identity(found.manifest.base.digest, options, dtype):
        result.add(
            "quantized", "failed", f"the digest of the base in {words} is not that of its files with these settings"
        )
        return
    result.add(
        "trained on",
        "ok",
        f"1 base, {words}; all before this was measured on its files in float32, what follows on {words}",
    )
    model = stack.put_on(load_base(base_dir, dtype, found.manifest.targets, options))
    if (probes := probes_on(model, found)) is None:
        result.add("quantized", "cannot tell", "the manifest holds no probes of it")
        return
    _probes(probes, model, tokenizer, result, ", quantized")


def _same_base(found: AdapterFolder, base_dir: Path, result: Verification, stack: Below | None) -> bool:
    """Weights, configuration and tokenizer of the base; whether the weights at least are right."""
    manifest, folders = found.manifest, [found] if stack is None else list(stack.folders.values())
    try:
        digest = digest_checkpoint(base_dir)
        for folder in folders:
            check_weights_of(folder, base_dir, digest)
    except UserError as e:
        result.add("base", "failed", str(e))
        return False
    recorded = n_settings(manifest)
    extra = "" if recorded else "; its configuration was not recorded with the adapter"
    n = len(checkpoint_tensors(base_dir))
    result.compared(
        "base", n, f"tensors of {manifest.base.ref} have the digest {manifest.base.digest[:12]} of the training{extra}"
    )
    try:
        for folder in folders:
            check_identity(folder.path, folder.manifest, base_dir)
        if recorded:
            result.compared(
                "configuration", recorded, "settings of config.json that change the model are those of the training"
            )
    except UserError as e:
        result.add("configuration", "failed", str(e))
    _tokenizer(folders, base_dir, result)
    return True


def _tokenizer(folders: Sequence[AdapterFolder], base_dir: Path, result: Verification) -> None:
    """The ids of each adapter's own tokenizer against those of the base's; nothing is said of adapters without one."""
    n = 0
    try:
        for folder in folders:
            path = folder.path / "tokenizer.json"
            check_tokenizer(folder.path, base_dir)
            n += len(words(read_tokenizer(path))) if path.is_file() and (base_dir / path.name).is_file() else 0
    except UserError as e:
        result.add("tokenizer", "failed", str(e))
        return
    if n:
        result.compared("tokenizer", n, "words have the ids of the base's tokenizer")


def _targets(found: AdapterFolder, model: Any, base_dir: Path, result: Verification) -> None:
    """What is adapted, by name where the manifest says it, and the digest of the weights there where it has one."""
    modules, live = targeted_names(model, TOP), adapted(model, TOP)
    named, wanted = [str(t) for t in found.manifest.targets], found.manifest.base.digest_targeted
    if named and (odd := [*_outside(named, [*live, *modules]), *_outside(live, named)]):
        result.add(
            "targets", "failed", f"{len(odd)} adapted weights are not those that the manifest names, first {odd[0]}"
        )
        return
    try:
        digest = digest_checkpoint(base_dir, modules)
    except UserError as e:  # fused experts go by other names on disk
        if wanted:
            result.add("targets", "cannot tell", f"{len(modules)} adapted weights ({e})")
        else:
            result.compared("targets", len(named), f"adapted weights are those that the manifest names ({e})")
        return
    if wanted is not None and digest != wanted:
        result.add("targets", "failed", f"{len(modules)} adapted weights, not those that the manifest digested")
    else:
        result.compared(
            "targets", len(named) if wanted is None else len(modules), "adapted weights are those of the manifest"
        )


def _outside(names: list[str], others: list[str]) -> list[str]:
    """Those of `names` that are neither one of `others` nor inside one, nor hold one."""
    return [n for n in names if not any(n == o or n.startswith(f"{o}.") or o.startswith(f"{n}.") for o in others)]


def _probes(probes: Probes, model: Any, tokenizer: Any, result: Verification, kind: str = "") -> None:
    def compare(name: str, rows: list[dict[str, list[Any]]]) -> None:
        gap = probe_difference(model, tokenizer, probes.prompts, rows)
        if gap is None and n_values(rows):
            result.add(name, "failed", "the vocabulary no longer holds the tokens that the manifest names")
        elif gap is None or gap <= PROBE_TOLERANCE:
            detail = f"logits of {len(probes.prompts)} prompts: largest difference {gap or 0:.2g}, allowed {PROBE_TOLERANCE:g}"
            result.compared(name, n_values(rows), detail)
        else:
            why = (
                "a logit is not a number"
                if math.isinf(gap)
                else f"largest difference {gap:.2g}, allowed {PROBE_TOLERANCE:g}"
            )
            result.add(name, "failed", f"{n_values(rows)} logits of {len(probes.prompts)} prompts: {why}")

    compare(f"probes, adapter on{kind}", probes.adapter)
    moved = probe_difference(model, tokenizer, probes.prompts, probes.base)
    with model.disable_adapter():
        compare(f"probes, adapter off{kind}", probes.base)
    if moved is not None and moved <= PROBE_TOLERANCE:
        why = f"it moves no logit of the neutral prompts by more than {PROBE_TOLERANCE:g}: no side effect, or no effect; see eval"
        result.add(f"effect{kind}", "cannot tell", why)
    elif moved is not None and math.isfinite(moved):
        result.compared(
            f"effect{kind}", n_values(probes.base), f"logits of neutral prompts, moved by up to {moved:.2g}"
        )
