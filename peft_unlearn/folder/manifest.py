"""forget.json: what a forget adapter is, what it was trained on, and how to recognise it. Format version 1.

Nothing in it names a machine: a base is a Hub id with its commit, ``embedded:NAME`` or ``local:<first 12 digits of its
digest>``; data is named by hash and count, never by its texts. Importing this module loads neither torch nor peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import Errors, UserError, nearest

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
NEUTRAL_PROMPTS = ("The", "Question: What is the capital of France?\nAnswer:", "Once upon a time", "1 2 3 4")
"""Prompts about nothing in particular: a probe must not carry the forget set into a published file."""
PROBE_TOP = 16

_EMBEDDED = re.compile(r"embedded:[A-Za-z0-9_.-]+(\?[A-Za-z0-9_=&.-]*)?")
_LOCAL = re.compile(r"local:[0-9a-f]{12}")
_HUB = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_SHA = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def path_like(text: str) -> bool:
    """True for anything that reads as a place on somebody's machine: absolute, home, dotted, drive, or a file URL."""
    return bool(
        re.match(r"(/|~$|~[\w.-]*/|\.\.?(/|\\|$)|\\\\|file:|[A-Za-z]:[\\/])", text)
        or "/../" in text
        or text.endswith("/..")
    )


def check_base_ref(ref: str, revision: str | None) -> str | None:
    """Why `ref` (with `revision`) is not a portable name of a base, or None when it is one."""
    if path_like(ref):
        return f"base.ref is a path ({ref!r}); use a Hub id with its commit, embedded:NAME or local:<digest12>"
    if _EMBEDDED.fullmatch(ref) or _LOCAL.fullmatch(ref):
        return None
    if not _HUB.fullmatch(ref):
        return f"base.ref {ref!r} is neither a Hub id, embedded:NAME nor local:<first 12 digits of the digest>"
    if revision is None or not _COMMIT.fullmatch(revision):
        return f"base.revision must be the 40-digit commit of the Hub model {ref!r}, not {revision!r}"
    return None


@dataclass
class BaseRef:
    """The base: `ref`, for a Hub id `revision` (commit); its digest, and that of the weights under the adapter."""

    ref: str
    digest: str
    revision: str | None = None
    digest_targeted: str | None = None


@dataclass
class Probes:
    """Per prompt, at its last position: the `PROBE_TOP` largest logits (float32, descending) and their token ids.

    `base` with every adapter off, `adapter` with it on at scale 1; each a list of {"ids": [..], "logits": [..]}.
    """

    prompts: list[str]
    base: list[dict[str, list[Any]]]
    adapter: list[dict[str, list[Any]]]


@dataclass
class Manifest:
    """forget.json, field by field.

    `method`: every hyper-parameter of terms, rule, smoothing and so on, resolved. `data`: set name -> {"sha256", "n",
    and where it has them "ref", "revision", "format"}. `depends_on`: ids ("sha256:..") of adapters that must be active
    below this one. `files`: file name -> sha256, None for files that may be edited afterwards (card, evaluation);
    filled by the writer.
    """

    base: BaseRef
    method: dict[str, Any]
    data: dict[str, dict[str, Any]]
    reference: str = "before"
    effective_batch: dict[str, int] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    depends_on: list[str] = field(default_factory=list)
    scale: float = 1.0
    probes: Probes | None = None
    targets: list[str] = field(default_factory=list)
    files: dict[str, str | None] = field(default_factory=dict)
    name: str = ""
    description: str = ""
    format: int = FORMAT

    @property
    def adapter_id(self) -> str | None:
        """ "sha256:" and the hash of adapter_model.safetensors, once the writer has filled `files`."""
        sha = self.files.get("adapter_model.safetensors")
        return f"sha256:{sha}" if sha else None

    def to_json(self) -> str:
        """The text of forget.json, keys sorted: equal manifests are equal bytes. Raises `UserError` if invalid."""
        self.check("forget.json")
        return json.dumps(asdict(self), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "forget.json") -> Manifest:
        """Read and check. `where` names the file in messages."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: not JSON ({e}).") from None
        if not isinstance(raw, dict):
            raise UserError(f"{where}: expected an object, found {_kind(raw)}.")
        version = raw.get("format")
        if version is None:
            raise UserError(f"{where}: no `format` field; this is not the manifest of a forget adapter.")
        if version != FORMAT or isinstance(version, bool):
            raise UserError(
                f"{where}: manifest format {version!r} is unknown to this version, which reads format {FORMAT}; "
                "a newer peft-unlearn wrote it (pip install -U peft-unlearn)."
            )
        errors = Errors()
        required = ("base", "method", "data", "reference", "scale")
        known = {f.name for f in fields(cls)}
        for name in sorted(set(raw) - known):
            errors.add(f"unknown field {name!r}.{nearest(name, known)}")
        for name in required:
            if name not in raw:
                errors.add(f"the field {name!r} is missing")
        raw["base"] = _sub(BaseRef, raw.get("base"), "base", ("ref", "digest"), errors)
        if raw.get("probes") is not None:
            raw["probes"] = _sub(Probes, raw["probes"], "probes", ("prompts", "base", "adapter"), errors)
        errors.raise_if_any(where)
        manifest = cls(**raw)
        manifest.check(where)
        return manifest

    def check(self, where: str = "forget.json") -> None:
        """Raise one `UserError` naming every field of a wrong type, every path, every number that is not finite."""
        errors = Errors()
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            ok = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
            if not ok and not (name == "probes" and value is None):
                errors.add(f"{name} should be {_NAMES[kind]}, found {_kind(value)}")
        errors.raise_if_any(where)
        self._check_parts(errors)
        for place, value in _leaves(asdict(self), ""):
            if isinstance(value, float) and not math.isfinite(value):
                errors.add(f"{place} is {value}; numbers must be finite")
            elif isinstance(value, str) and path_like(value) and not place.startswith(("probes.prompts", "base.ref")):
                errors.add(f"{place} holds a path ({value!r}); a published manifest must not name a machine")
            elif not isinstance(value, str | int | float | bool | None):
                errors.add(f"{place} holds {_kind(value)}, which JSON cannot")
        errors.raise_if_any(where)

    def _check_parts(self, errors: Errors) -> None:
        for name in ("digest", "digest_targeted"):
            sha = getattr(self.base, name)
            if not (isinstance(sha, str) and _SHA.fullmatch(sha)) and not (sha is None and name == "digest_targeted"):
                errors.add(f"base.{name} should be 64 hexadecimal digits, found {sha!r}")
        if not isinstance(self.base.ref, str):
            errors.add(f"base.ref should be text, found {_kind(self.base.ref)}")
        elif problem := check_base_ref(self.base.ref, self.base.revision):
            errors.add(problem)
        elif self.base.ref.startswith("local:") and not str(self.base.digest).startswith(self.base.ref[6:]):
            errors.add(f"base.ref {self.base.ref!r} is not the start of base.digest")
        for name, row in self.data.items():
            if not isinstance(row, dict):
                errors.add(f"data.{name} should be an object, found {_kind(row)}")
                continue
            if not _SHA.fullmatch(str(row.get("sha256"))):
                errors.add(f"data.{name}.sha256 should be 64 hexadecimal digits, found {row.get('sha256')!r}")
            if not isinstance(row.get("n"), int) or isinstance(row.get("n"), bool):
                errors.add(f"data.{name}.n should be the number of rows, found {row.get('n')!r}")
            for key in sorted(set(row) - {"sha256", "n", "ref", "revision", "format"}):
                errors.add(f"data.{name}.{key} is not a field: hashes and counts only, never texts")
        for i, dep in enumerate(self.depends_on):
            if not isinstance(dep, str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", dep):
                errors.add(f"depends_on[{i}] should be an adapter id (sha256:..), found {dep!r}")
        for kind in ("effective_batch", "seeds"):
            for name, value in getattr(self, kind).items():
                if not isinstance(value, int) or isinstance(value, bool):
                    errors.add(f"{kind}.{name} should be a whole number, found {_kind(value)}")
        for name, sha in self.files.items():
            if sha is not None and not _SHA.fullmatch(str(sha)):
                errors.add(f"files.{name} should be 64 hexadecimal digits or null, found {sha!r}")
        if self.probes is not None:
            for side in ("base", "adapter"):
                _check_probe_rows(side, getattr(self.probes, side), self.probes.prompts, errors)


_KINDS: dict[str, Any] = {
    "base": BaseRef, "method": dict, "data": dict, "reference": str, "effective_batch": dict, "seeds": dict,
    "versions": dict, "depends_on": list, "scale": (int, float), "probes": Probes, "targets": list, "files": dict,
    "name": str, "description": str, "format": int,
}  # fmt: skip
_NAMES: dict[Any, str] = {
    BaseRef: "an object", Probes: "an object", dict: "an object", list: "a list", str: "text", int: "a whole number",
    (int, float): "a number",
}  # fmt: skip


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()}"
    for kind, name in ((dict, "an object"), (list, "a list"), (str, "text"), (int, "a number"), (float, "a number")):
        if isinstance(value, kind):
            return f"{name} ({value!r})" if kind in (str, int, float) else name
    return f"a {type(value).__name__}"


def _sub(cls: Any, raw: Any, name: str, required: tuple[str, ...], errors: Errors) -> Any:
    if not isinstance(raw, dict):
        if raw is not None:
            errors.add(f"{name} should be an object, found {_kind(raw)}")
        return None
    known = [f.name for f in fields(cls)]
    for key in sorted(set(raw) - set(known)):
        errors.add(f"unknown field {name}.{key!r}.{nearest(key, known)}")
    missing = [key for key in required if key not in raw]
    for key in missing:
        errors.add(f"the field {name}.{key} is missing")
    return None if missing else cls(**{k: v for k, v in raw.items() if k in known})


def _check_probe_rows(side: str, rows: Any, prompts: Any, errors: Errors) -> None:
    if not isinstance(prompts, list) or not isinstance(rows, list) or len(rows) != len(prompts):
        errors.add(f"probes.{side} should be a list with one entry per prompt")
        return
    for i, row in enumerate(rows):
        ids, logits = (row.get("ids"), row.get("logits")) if isinstance(row, dict) else (None, None)
        if not isinstance(ids, list) or not isinstance(logits, list) or len(ids) != len(logits):
            errors.add(f"probes.{side}[{i}] should hold `ids` and `logits` of one length")
        elif not all(isinstance(n, int) and n >= 0 for n in ids) or not all(isinstance(x, int | float) for x in logits):
            errors.add(f"probes.{side}[{i}] should hold token ids and numbers")


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{place}[{i}]")
    else:
        yield place, value


def probe_logits(model: nn.Module, tokenizer: Any, prompts: list[str] | tuple[str, ...]) -> Any:
    """(len(prompts), vocab) float32, CPU: logits at each prompt's last position, one prompt at a time (no padding)."""
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows = []
    try:
        with torch.no_grad():
            for prompt in prompts:
                ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id or 0]
                rows.append(model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].float().cpu())
    finally:
        model.train(was_training)
    return torch.stack(rows)


def probe_rows(logits: Any) -> list[dict[str, list[Any]]]:
    """The `PROBE_TOP` largest logits of each row, as the manifest holds them."""
    top = logits.topk(min(PROBE_TOP, logits.shape[-1]), dim=-1)
    return [{"ids": i.tolist(), "logits": v.tolist()} for i, v in zip(top.indices, top.values, strict=True)]


def probes(model: Any, tokenizer: Any, prompts: tuple[str, ...] | list[str] = NEUTRAL_PROMPTS) -> Probes:
    """Probe a PeftModel with its adapters off, then on. Runs `len(prompts)` short forwards in each state.

    The trainable flags are put back: PEFT turns them on for every active adapter when it re-enables them.
    """
    on = probe_rows(probe_logits(model, tokenizer, prompts))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        off = probe_rows(probe_logits(model, tokenizer, prompts))
    for n, p in model.named_parameters():
        p.requires_grad_(flags[n])
    return Probes(prompts=list(prompts), base=off, adapter=on)


def probe_difference(
    model: nn.Module, tokenizer: Any, prompts: list[str], rows: list[dict[str, list[Any]]]
) -> float | None:
    """Largest |logit now - logit stored| over the stored ids. None when the vocabulary no longer holds them."""
    import torch

    logits = probe_logits(model, tokenizer, prompts)
    worst = 0.0
    for now, row in zip(logits, rows, strict=True):
        if row["ids"] and max(row["ids"]) >= now.shape[0]:
            return None
        gap = now[torch.tensor(row["ids"], dtype=torch.long)] - torch.tensor(row["logits"])
        worst = max(worst, gap.abs().max().item() if gap.numel() else 0.0)
    return worst
