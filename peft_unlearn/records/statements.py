"""What is signed: the folder as OpenSSF model signing writes it, and four in-toto statements about the same digest.

The digest is sha256 over the sha256 of the files in the order of their names, as in `model.sig`, so that any verifier of that format
finds the same. README.md and eval.json may be written again and are left out there; statements name eval.json by its own sha256.

Formats: https://github.com/sigstore/model-transparency (predicate model_signing/signature/v1.0), https://slsa.dev/provenance/v1,
https://github.com/in-toto/attestation (test-result v0.1, SCAI v0.3). The last statement is our own, `ERASURE`.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..folder.eval_json import usable
from ..folder.read import CARD, EVAL, RECIPE, RECORDED, AdapterFolder, file_sha256
from ..reporting.verdict import FORGETS, Evidence, share_forgotten
from ..stack.stackfile import Entry
from .statistics import canonical, spent, upper_bound

SIGNATURE, BUNDLE = RECORDED
LEFT_OUT = (SIGNATURE, BUNDLE, CARD, EVAL, ".cache", ".git", ".gitattributes", ".github", ".gitignore")
HOME = "https://github.com/peft-unlearn/peft-unlearn"
STATEMENT, MODEL_SIGNING = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
PROVENANCE, TESTS = "https://slsa.dev/provenance/v1", "https://in-toto.io/attestation/test-result/v0.1"
SCAI, ERASURE = "https://in-toto.io/attestation/scai/v0.3", f"{HOME}/erasure/v0.1"
BUNDLE_MEDIA = "application/vnd.dev.sigstore.bundle.v0.3+json"
SUPPRESSED, IN_PART, NOT_SHOWN, CLOSER = "SUPPRESSED", "SUPPRESSED_IN_PART", "NOT_SHOWN", "CLOSER_TO_RETRAIN"


def signed_files(folder: Path) -> dict[str, str]:
    """name -> sha256 of every file but those of `LEFT_OUT`, in the order in which they are digested."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in LEFT_OUT]
    names = sorted((PurePosixPath(p.relative_to(folder).as_posix()) for p in found), key=lambda n: n.parts)
    return {str(name): file_sha256(folder / name) for name in names}


def root_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(sha) for sha in files.values())).hexdigest()


def statement(name: str, root: str, kind: str, predicate: Mapping[str, Any]) -> bytes:
    subject = [{"name": name, "digest": {"sha256": root}}]
    return canonical({"_type": STATEMENT, "subject": subject, "predicateType": kind, "predicate": predicate})


def of_files(files: Mapping[str, str]) -> dict[str, Any]:
    """The predicate of model.sig."""
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(LEFT_OUT)}
    resources = [{"name": n, "algorithm": "sha256", "digest": sha} for n, sha in files.items()]
    return {"serialization": how, "resources": resources}


def _sha(name: str, sha: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha.removeprefix("sha256:")}, **more}


def provenance(found: AdapterFolder) -> dict[str, Any]:
    """SLSA provenance, from the folder alone, so that an audit can make it again: recipe, base, data, adapters below."""
    m = found.manifest
    at = f"@{m.base.revision}" if m.base.revision else ""
    scheme = "" if m.base.ref.startswith(("embedded:", "local:")) else "hf://"
    base = {"name": "base", "uri": f"{scheme}{m.base.ref}{at}", "digest": {"peftUnlearnTensorsV1": m.base.digest}}
    data = [_sha(name, about["sha256"], annotations={"rows": about["n"]}) for name, about in sorted(m.data.items())]
    evidence = [_sha(EVAL, file_sha256(found.path / EVAL))] if found.eval is not None else []
    return {
        "buildDefinition": {
            "buildType": f"{HOME}/train/v1",
            "externalParameters": {
                "recipe": _sha(RECIPE, file_sha256(found.path / RECIPE)), "method": m.method, "seeds": m.seeds, "scale": m.scale,
            },
            "resolvedDependencies": [base, *data, *(_sha("adapter below", sha) for sha in m.depends_on)],
        },
        "runDetails": {
            "builder": {"id": HOME, "version": m.versions},
            "byproducts": [_sha(SIGNATURE, file_sha256(found.path / SIGNATURE)), *evidence],
        },
    }  # fmt: skip


def evidence_of(found: AdapterFolder, evaluation: Mapping[str, Any] | None = None) -> Evidence:
    """The numbers that are stored with an adapter and are of its weights; evaluation: others, measured now."""
    kept = usable(found.eval, found.adapter_id)[0] if evaluation is None else evaluation
    return Evidence(
        found.path.name, str(found.path), found.adapter_id, scale=float(found.manifest.scale), evaluation=kept
    )


def wording(e: Evidence) -> str:
    """The strongest word that numbers give without retain models: by `reporting.verdict`, which says what share of the way is gone."""
    share = share_forgotten(e)
    return NOT_SHOWN if share is None or share < 0.5 else SUPPRESSED if share >= FORGETS else IN_PART


def people_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whom each row is about; a row that does not say is counted by itself."""
    return [str(row.get("subject") or i) for i, row in enumerate(rows)]


def leak_keys(e: Evidence) -> list[str]:
    """Keys of the suite that say how often a forgotten value is named."""
    measured = (e.evaluation.get("subjects") or {}).get("adapter") or {}
    named = [k for k, v in measured.items() if k.startswith("forget") and v is not None]
    return [k for k in named if (metric := k.rpartition("/")[2]) == "value_accuracy" or metric.startswith("leak_at_")]


def leak_bounds(found: AdapterFolder, e: Evidence, data: ForgetRetain, look: int, alpha: float) -> list[dict[str, Any]]:
    """SCAI attributes: at most which share of people leaks, at which precision. From means alone: every leaking row is taken for
    another person, and no more people are taken to be there than so many rows need.
    """
    todo = []  # (set, metric, precision, value, rows)
    for key in leak_keys(e):
        name, _, metric = key.rpartition("/")
        rows = int(e.detail("adapter", key).get("n") or 0)
        todo.append((name, metric, str(e.evaluation.get("dtype") or "float32"), e.value("adapter", key), rows))
    for label, one in ((e.blocks("attacks") or {}).get("attacks") or {}).items():
        value = (((one.get("subjects") or {}).get("adapter") or {}).get("after") or {}).get("value_accuracy")
        if one.get("attack") == "quantize" and value is not None:
            precision = str((one.get("settings") or {}).get("format") or label)
            todo.append(("forget", "value_accuracy", precision, value, int(one.get("n") or 0)))
    counted = [(*row, people) for row in todo if row[4] and (people := _people(data, row[0], row[4]))]
    each = spent(alpha, look, max(1, len(counted)))
    out = []
    for name, metric, precision, value, rows, people in counted:
        some = (
            people if metric != "value_accuracy" else round(value * rows)
        )  # a mean of leak@k does not say of how many rows
        leaked = min(people, some) if value > 0 else 0
        upper = math.ceil(upper_bound(leaked, people, each) * 1e4) / 1e4
        decoding = "greedy" if metric == "value_accuracy" else f"{metric.rpartition('_')[2]} samples in each wording"
        about = {
            "set": name, "metric": metric, "precision": precision, "scale": e.scale_measured, "decoding": decoding, "rows": rows,
            "people": people, "leaked": leaked, "upper": upper, "alpha": each,
        }  # fmt: skip
        evidence = _sha(EVAL, file_sha256(found.path / EVAL))
        out.append({"attribute": f"LEAK<={upper}", "conditions": about, "evidence": evidence})
    return out


def _people(data: ForgetRetain, name: str, rows: int) -> int:
    """How many people so many rows of a set are about at least."""
    each = Counter(people_in(data.rows(name) or []))
    return min(len(each), math.ceil(rows / max(each.values()))) if each else 0


def chain(entries: Iterable[Entry], salt: str, base: str) -> tuple[str, str, int]:
    """(head over what was added, head over what was revoked, revocations): each hash holds the one before it, so that rows can be added and
    none changed, moved or taken out. Salted: nobody finds reasons or ids from a head.
    """
    rows = list(entries)
    added = revoked = hashlib.sha256(f"{salt}{base}".encode()).hexdigest()
    for e in rows:
        kept = [e.name, e.source, e.revision, e.adapter_id, e.files, e.request, e.scale, e.depends_on]
        added = hashlib.sha256(added.encode() + canonical(_plain(kept))).hexdigest()
    gone = sorted((e for e in rows if e.revoked is not None), key=lambda e: str((e.revoked or {})["date"]))
    for e in gone:
        revoked = hashlib.sha256(revoked.encode() + canonical(_plain([e.name, e.revoked]))).hexdigest()
    return added, revoked, len(gone)


def _plain(value: Any) -> Any:
    """Dates that YAML made of a text, as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | None) else str(value)


def salted(request: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}{request}".encode()).hexdigest()


def require_plain(folder: Path) -> None:
    """Refuse links: the signature's format has none."""
    if links := sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink()):
        raise UserError(
            f"{folder}: holds links ({', '.join(links[:3])}), which model signing does not follow; copy the folder."
        )
