"""Whether a folder is what its manifest says, and does on this base what its author saw. All that can be recomputed is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..folder.digest import digest_checkpoint, targeted_names
from ..folder.fetch import resolve_adapter
from ..folder.manifest import probe_difference
from ..folder.read import AdapterFolder, read_adapter
from ..reporting.result import Result
from ..stack.below import Below
from ..stack.fits import check_base, check_dependencies, scales_below
from ..stack.removal import PROBE_TOLERANCE

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

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        width = max((len(c.name) for c in self.checks), default=0)
        lines = [f"{c.verdict:<11}  {c.name:<{width}}  {c.detail}" for c in self.checks]
        return "\n".join([f"{self.source}: {self.verdict}", *lines])


def verify(folder: str | Path, base: str | Path | None = None, below: Sequence[str | Path] = ()) -> Verification:
    """Check files, hashes, manifest, weights, base digest, targets and probes of an adapter folder.

    The two probe checks run four short prompts with the adapter off and on and compare the 16 largest logits of each
    with the manifest's. Where the base is not available, what needs it is "cannot tell".

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
    listed = sum(sha is not None for sha in found.manifest.files.values())
    result.add("files", "ok", f"{listed} files have the sha256 that the manifest names; no others are needed")
    result.add("weights", "ok", "finite and not zero")
    _against_base(found, base, result, _below(found, below))
    return result


def _below(found: AdapterFolder, given: Sequence[str | Path]) -> Below | None:
    """What lies under the adapter, with itself on top, at the scales of its training; None where those are not named."""
    if not given:
        return None if found.manifest.depends_on else Below({TOP: found}, {})
    lower = {f"below_{i}": read_adapter(resolve_adapter(ref)) for i, ref in enumerate(given)}
    needed = set(found.manifest.depends_on).union(*(f.manifest.depends_on for f in lower.values()))
    for folder in lower.values():
        if folder.adapter_id not in needed:
            why = "was not trained on top of it; name with --below what it was trained on"
            raise UserError(f"{folder.path}: {found.path} {why}")
    check_dependencies({**lower, TOP: found})
    trained = dict(scales_below(found))
    scales = {n: trained.get(f.adapter_id, float(f.manifest.scale)) for n, f in lower.items()}
    return Below({**lower, TOP: found}, scales)


def _against_base(found: AdapterFolder, base: str | Path | None, result: Verification, stack: Below | None) -> None:
    from ..folder.base import load_base, load_tokenizer, resolve_base

    ref = found.manifest.base
    try:
        base_dir = resolve_base(ref.ref, override=base, revision=ref.revision)
    except UserError as e:
        result.add("base", "cannot tell", str(e))
        return
    try:
        digest = digest_checkpoint(base_dir)
        for folder in [found] if stack is None else stack.folders.values():
            check_base(folder, base_dir, digest)
    except UserError as e:
        result.add("base", "failed", str(e))
        return
    result.add("base", "ok", f"the files of {ref.ref} have the digest {ref.digest[:12]} of the adapter's training")
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
    if found.manifest.probes is None:
        result.add("probes", "cannot tell", "the manifest holds none")
        return
    _probes(found, model, load_tokenizer(found.path, base_dir), result)


def _targets(found: AdapterFolder, model: Any, base_dir: Path, result: Verification) -> None:
    modules = targeted_names(model, TOP)
    wanted = found.manifest.base.digest_targeted
    try:
        digest = digest_checkpoint(base_dir, modules)
    except UserError as e:  # fused experts go by other names on disk
        result.add("targets", "cannot tell" if wanted else "ok", f"{len(modules)} adapted weights ({e})")
        return
    same = wanted is None or digest == wanted
    what = f"{len(modules)} adapted weights"
    result.add("targets", "ok" if same else "failed", what if same else f"{what}, not those that the manifest digested")


def _probes(found: AdapterFolder, model: Any, tokenizer: Any, result: Verification) -> None:
    probes = found.manifest.probes
    assert probes is not None

    def compare(name: str, rows: list[dict[str, list[Any]]]) -> None:
        gap = probe_difference(model, tokenizer, probes.prompts, rows)
        if gap is None:
            result.add(name, "failed", "the vocabulary no longer holds the tokens that the manifest names")
        else:
            detail = f"largest logit difference {gap:.2g}, allowed {PROBE_TOLERANCE:g}"
            result.add(name, "ok" if gap <= PROBE_TOLERANCE else "failed", detail)

    compare("probes, adapter on", probes.adapter)
    moved = probe_difference(model, tokenizer, probes.prompts, probes.base)
    with model.disable_adapter():
        compare("probes, adapter off", probes.base)
    if moved is not None and moved <= PROBE_TOLERANCE:
        why = f"it moves no logit of the neutral prompts by more than {PROBE_TOLERANCE:g}: no side effect, or no effect; see eval"
        result.add("effect", "cannot tell", why)
    elif moved is not None:
        result.add("effect", "ok", f"the adapter moves logits of neutral prompts by up to {moved:.2g}")
