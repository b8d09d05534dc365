"""`record`: signs an adapter's folder and what is known of it."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..data.bundle import ForgetRetain
from ..errors import UserError
from ..evaluation.subjects import bundle_of, matches, work_data
from ..folder.atomic import write_text
from ..folder.digest import digest_checkpoint
from ..folder.fetch import commit_of
from ..folder.merge_record import RECORD, read_record
from ..folder.read import AdapterFolder, file_sha256, read_adapter
from ..folder.results import check_writable, writing
from ..folder.yaml_io import parse_json, read_text
from ..reporting.result import Result, fields_of
from ..sharing.verify import Verification, verify
from ..stack import stackfile
from . import statements as st
from .keys import Key, envelope, load_key, opened
from .statistics import canonical

DOES_NOT_SAY = (
    "The base is as it was: without the adapter it answers as before, and so does every copy that is not listed.",
    "Numbers are of the rows, wordings, precision and scale that stand beside them.",
    "No model that was trained without the forget set is compared with, unless the wording says so.",
)


@dataclass
class Record(Result):
    """What was signed. root: the digest that all statements are about; bounds: at most which share of people leaks; private: the file
    with the salt, which stays here and which an auditor of requests and ledger needs."""

    folder: str
    root: str
    key: str
    wording: str
    files: int
    look: int
    bounds: list[dict[str, Any]]
    private: str
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return fields_of(self)

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: signed {self.files} files and 4 statements, digest {self.root[:19]}, key {self.key[:19]}"
        ]
        lines += [f"  wording: {self.wording}"]
        for b in (b["conditions"] for b in self.bounds):
            lines.append(f"  at most {b['upper']:.1%} of people leak in {b['set']} ({b['precision']}, {b['decoding']}; "
                         f"{b['leaked']} of {b['people']} seen)")  # fmt: skip
        return "\n".join([*lines, f"  salt, for auditors of requests and ledger only: {self.private}"])

    def remarks(self) -> list[str]:
        return self.notes


def record(
    folder: str | Path,
    key: str | Path,
    *,
    base: str | None = None,
    data: str | None = None,
    stack: str | Path | None = None,
    requests: Sequence[str] = (),
    derived: Sequence[str | Path] = (),
    commitment: str | None = None,
    alpha: float = 0.05,
) -> Record:
    """Write `model.sig` and `erasure.intoto.jsonl` into an adapter's folder, signed with one key.

    Args:
        key: PEM file of an elliptic private key.
        base, data: as in `verify` and `evaluate`; what is not available is left out of the record, and a note says so.
        stack: the ledger; its head is signed, and the ids of this adapter's requests.
        requests: further ids of requests that it answers. Ids are signed as salted hashes.
        derived: folders of models that it was merged into, signed by their digest.
        commitment: of canaries, as it was published before the training (see `statistics.commitment`).
        alpha: what all bounds of all records of this adapter may be wrong with together.

    Raises:
        UserError: a folder of the Hub's cache, a check of `verify` that fails, a model that was not made of this adapter, no key.
    """
    owner = load_key(key, private=True)
    found = read_adapter(folder)
    if commit_of(found.path):
        raise UserError(
            f"{folder}: is a copy in the Hub's cache; sign your own folder (peft-unlearn pull fetches one), then push it."
        )
    check_writable(found.path)
    st.require_plain(found.path)
    checks = verify(found.path, base)
    if failed := [f"{c.name}: {c.detail}" for c in checks.checks if c.verdict == "failed"]:
        raise UserError(f"{folder}: nothing was signed, since verify says no: {'; '.join(failed)}")
    notes = [f"{c.name} could not be checked: {c.detail}" for c in checks.checks if c.verdict == "cannot tell"]
    private, salt = _private(found, requests)
    evidence, previous, look = st.evidence_of(found), *_before(found)
    bundle = rows_of(found, data, notes)
    bounds = [] if bundle is None else st.leak_bounds(found, evidence, bundle, look, alpha)
    erasure: dict[str, Any] = {
        "adapter": found.adapter_id, "wording": st.wording(evidence), "recordedAt": now(), "look": look, "alpha": alpha,
        "previous": previous, "requests": [{"id": st.salted(r, salt)} for r in requests],
        "derived": [derived_of(found, d) for d in derived], "canaries": commitment,
        "revocation": "peft-unlearn stack revoke marks it; loading the base without it takes it back, bit for bit (peft-unlearn remove)",
        "doesNotSay": list(DOES_NOT_SAY),
    }  # fmt: skip
    if stack is not None:
        _add_ledger(erasure, stackfile.load(stack), found, salt)
    files = st.signed_files(found.path)
    with writing(found.path):
        _write(
            found,
            owner,
            files,
            [(st.TESTS, tests(checks)), (st.SCAI, {"attributes": bounds or [{"attribute": "NO_LEAK_BOUND"}]})],
            erasure,
        )
    return Record(
        str(folder), st.root_of(files), owner.hint, erasure["wording"], len(files), look, bounds, str(private), notes
    )


def _write(
    found: AdapterFolder, key: Key, files: dict[str, str], middle: list[tuple[str, Any]], erasure: dict[str, Any]
) -> None:
    name, root = found.path.resolve().name, st.root_of(files)
    signed = envelope(st.statement(name, root, st.MODEL_SIGNING, st.of_files(files)), key, "")
    material = {"publicKey": {"hint": key.hint}, "tlogEntries": []}
    whole = {"mediaType": st.BUNDLE_MEDIA, "verificationMaterial": material, "dsseEnvelope": signed}
    write_text(found.path / st.SIGNATURE, json.dumps(whole))
    payloads = [st.statement(name, root, kind, p) for kind, p in ((st.PROVENANCE, st.provenance(found)), *middle)]
    erasure["statements"] = [hashlib.sha256(p).hexdigest() for p in payloads]
    payloads.append(st.statement(name, root, st.ERASURE, erasure))
    write_text(found.path / st.BUNDLE, "".join(canonical(envelope(p, key, key.hint)).decode() + "\n" for p in payloads))


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def rows_of(found: AdapterFolder, data: str | None, notes: list[str]) -> ForgetRetain | None:
    """The adapter's own data, None (and a note) where they are not here."""
    why = "the rows are not those that it was trained to forget"
    try:
        bundle = bundle_of(found, data)
    except UserError as e:
        bundle, why = None, str(e)
    if bundle is None or matches(bundle, found.manifest) is False:
        if data is not None:
            raise UserError(f"--data {data}: {why}.")
        notes.append(f"no bounds and no numbers, since the rows are not here (--data): {why}")
        return None
    return bundle


def tests(checks: Verification) -> dict[str, Any]:
    """The predicate of test-result: what `verify` answered."""
    by = {v: [c.name for c in checks.checks if c.verdict == v] for v in ("ok", "cannot tell", "failed")}
    result = "FAILED" if by["failed"] else "WARNED" if by["cannot tell"] else "PASSED"
    lists = {"passedTests": by["ok"], "warnedTests": by["cannot tell"], "failedTests": by["failed"]}
    return {"result": result, "configuration": [{"name": "peft-unlearn verify"}], **lists}


def private_file(found: AdapterFolder) -> Path:
    return work_data(found.path.resolve()).with_name("record.json")


def _private(found: AdapterFolder, requests: Sequence[str]) -> tuple[Path, str]:
    """The file beside the folder that holds salt and ids, readable by its owner alone; the salt stays the same over records."""
    path = private_file(found)
    with writing(path):
        held = parse_json(read_text(path), str(path)) if path.is_file() else {}
        salt = str(held.get("salt") or secrets.token_hex(32))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            path,
            json.dumps({"salt": salt, "requests": sorted({*held.get("requests", ()), *requests})}, indent=2) + "\n",
        )
        path.chmod(0o600)
    return path, salt


def _before(found: AdapterFolder) -> tuple[str | None, int]:
    """(sha256 of the bundle that this one replaces, number of this look): each look spends less of alpha."""
    path = found.path / st.BUNDLE
    if not path.is_file():
        return None, 0
    last = parse_json(read_text(path).splitlines()[-1], f"{path}, last line")
    before = json.loads(opened(last, str(path))[0])["predicate"]
    return file_sha256(path), int(before["look"]) + 1


def _add_ledger(erasure: dict[str, Any], stack: stackfile.Stack, found: AdapterFolder, salt: str) -> None:
    own = [e for e in stack.entries if e.adapter_id == found.adapter_id]
    if not own:
        raise UserError(f"{stack.path}: {found.path} is not in this stack; add it first (peft-unlearn stack add).")
    added, revoked, n = st.chain(stack.entries, salt, stack.base.digest)
    erasure["ledger"] = {"entries": len(stack.entries), "head": added, "revocations": n, "revokedHead": revoked}
    for e in own:
        dates = {"answeredAt": str(e.request["date"])} | ({"revokedAt": str(e.revoked["date"])} if e.revoked else {})
        erasure["requests"].append({"id": st.salted(str(e.request["id"]), salt), **dates})


def derived_of(found: AdapterFolder, model: str | Path) -> dict[str, Any]:
    """A merged or quantized model by its tensors, which says itself that this adapter is in it."""
    path = Path(model).expanduser()
    told = read_record(path)
    if told is None or found.adapter_id not in {a["adapter_id"] for a in told["adapters"]}:
        raise UserError(
            f"{model}: does not say that {found.path} was merged into it ({RECORD}); only such copies are recorded."
        )
    return {"name": path.resolve().name, "digest": {"peftUnlearnTensorsV1": digest_checkpoint(path)}}
