"""`audit`: what of a record can be confirmed here, what is only signed, what is contradicted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.plan import Progress
from ..folder import schema as s
from ..folder.fetch import resolve_adapter
from ..folder.read import EVAL, AdapterFolder, read_adapter
from ..folder.yaml_io import parse_json, read_text
from ..sharing.verify import verify
from ..stack import stackfile
from . import statements as st
from .claims import Audit
from .keys import Key, load_key, opened
from .measured import numbers
from .record import derived_of, private_file
from .statistics import canonical

_SHARE = s.shape("a share", lambda v: s.is_number(v) and 0 < v <= 1)
_BOUND = {
    **dict.fromkeys(("set", "metric", "precision", "decoding"), s.TEXT), "rows": s.WHOLE, "upper": _SHARE,
    "alpha": s.shape("between 0 and 1", lambda v: s.is_number(v) and 0 < v < 1),
}  # fmt: skip
_ATTRIBUTES = s.record(
    {"attributes": s.list_of(s.record({"conditions": s.record(_BOUND, _BOUND, more=True)}, more=True))},
    ("attributes",),
    more=True,
)
_LEDGER = {"entries": s.WHOLE, "revocations": s.WHOLE, "head": s.TEXT, "revokedHead": s.TEXT}
_SIGNED = {
    "statements": s.LIST, "wording": s.TEXT, "alpha": _SHARE, "requests": s.list_of(s.record({"id": s.TEXT}, ("id",), more=True)),
    "derived": s.list_of(s.record({"name": s.TEXT, "digest": s.MAPPING}, ("name", "digest"), more=True)),
}  # fmt: skip
_ERASURE = s.record({**_SIGNED, "ledger": s.maybe(s.record(_LEDGER, _LEDGER, more=True))}, _SIGNED, more=True)
"""What of a stranger's statements is read here; they may hold more."""


def audit(
    folder: str | Path,
    *,
    key: str | Path | None = None,
    base: str | None = None,
    data: str | None = None,
    stack: str | Path | None = None,
    derived: Sequence[str | Path] = (),
    retain_models: Sequence[str] = (),
    rerun: bool = True,
    progress: Progress | None = None,
) -> Audit:
    """Check every claim of an adapter's record, and measure again what can be measured here.

    Args:
        folder: on this disk, or a Hub id.
        key: PEM file of the signer's public key, from a source of your own; without it nobody knows who signed.
        base, data: default the manifest's. stack: the ledger. derived: the merged models that it lists.
        retain_models: five or more models that were trained without the forget set, for the relative test.
        rerun: False leaves the suite out, and with it every number.

    Raises:
        UserError: no folder, no record in it, no such key; never what a record says wrongly.
    """
    out, path = Audit(str(folder)), resolve_adapter(folder)
    if missing := [n for n in (st.SIGNATURE, st.BUNDLE) if not (path / n).is_file()]:
        raise UserError(f"{folder}: holds no record ({' and '.join(missing)} missing); peft-unlearn record makes one.")
    owner = None if key is None else load_key(key, private=False)
    root = _signature(path, owner, out)
    told = _statements(path, owner, root, out)
    if told is None:
        return out
    erasure = told[st.ERASURE]
    out.wording = str(erasure.get("wording"))
    try:
        found = read_adapter(path)
    except UserError as e:
        out.add("adapter", False, str(e))
        return out
    _of_folder(found, told, out)
    checks = verify(found.path, base)
    for c in checks.checks:
        out.add(f"verify: {c.name}", {"ok": True, "failed": False, "cannot tell": None}[c.verdict], c.detail)
    _ledger(found, erasure, stack, out)
    _copies(found, erasure, derived, out)
    able = rerun and all(c.verdict != "failed" for c in checks.checks)
    numbers(found, told, (base, data, retain_models) if able else None, progress, out)
    return out


def _signature(path: Path, owner: Key | None, out: Audit) -> str | None:
    """The digest that model.sig signs, None where it cannot be read."""
    try:
        whole = parse_json(read_text(path / st.SIGNATURE), st.SIGNATURE)
        payload, signature = opened(whole.get("dsseEnvelope"), st.SIGNATURE)
        told = json.loads(payload)
        root, listed = told["subject"][0]["digest"]["sha256"], told["predicate"]["resources"]
        signed = {r["name"]: r["digest"] for r in listed}
    except (UserError, ValueError, KeyError, TypeError, IndexError, RecursionError) as e:
        out.add("signature", False, f"{st.SIGNATURE} cannot be read ({e})")
        return None
    out.add("signature", *_signed_by(owner, signature, payload, f"{st.SIGNATURE}"))
    here = st.signed_files(path)
    if odd := sorted(set(here.items()) ^ set(signed.items())):
        names = list(dict.fromkeys(n for n, _ in odd))
        out.add("files", False, f"{len(names)} files are not as they were signed, first {names[0]}")
    else:
        out.add(
            "files",
            root == st.root_of(here),
            f"{len(here)} files have the sha256 that is signed; {', '.join(st.LEFT_OUT[2:4])} are not signed here",
        )
    return str(root)


def _signed_by(owner: Key | None, signature: bytes, payload: bytes, what: str) -> tuple[bool | None, str]:
    if owner is None:
        return None, f"{what}: no public key was given (--public-key), so whoever changed the folder may have signed it"
    made = owner.made(signature, payload)
    return made, f"{what}: {'made by' if made else 'not made by'} the key {owner.hint[:12]}"


def _statements(path: Path, owner: Key | None, root: str | None, out: Audit) -> dict[str, Any] | None:
    """Predicates by type, None where the bundle is not four statements, each spelled in the one way in which they are written."""
    try:
        raw = (path / st.BUNDLE).read_bytes()
        lines = [json.loads(line) for line in raw.decode().splitlines()]
        if raw != b"".join(canonical(line) + b"\n" for line in lines):
            raise ValueError("spelled otherwise than it was written")
        signed = [opened(line, st.BUNDLE) for line in lines]
        if [_again(line, *pair) for line, pair in zip(lines, signed, strict=True)] != lines:
            raise ValueError("spelled otherwise than it was written")
        found = [json.loads(payload) for payload, _ in signed]
        kinds = [one["predicateType"] for one in found]
        if kinds != [st.PROVENANCE, st.TESTS, st.SCAI, st.ERASURE]:
            raise ValueError(f"its statements are {', '.join(map(str, kinds)) or 'none'}")
        s.require(found[2]["predicate"], _ATTRIBUTES, st.SCAI)
        s.require(erasure := found[-1]["predicate"], _ERASURE, st.ERASURE)
        sums = [hashlib.sha256(payload).hexdigest() for payload, _ in signed[:-1]]
        whole = erasure["statements"] == sums and all(one["subject"][0]["digest"]["sha256"] == root for one in found)
    except (UserError, ValueError, KeyError, TypeError, IndexError, RecursionError) as e:
        out.add("statements", False, f"{st.BUNDLE}: {' '.join(str(e).split())}")
        return None
    if not whole:
        out.add("statements", False, f"{st.BUNDLE}: its statements are not of one record, or not of these files")
        return None
    answers = [_signed_by(owner, sig, payload, f"{st.BUNDLE}, 4 statements of one digest") for payload, sig in signed]
    out.add("statements", *min(answers, key=lambda a: (a[0] is not False, a[0] is not None)))
    named = {line["signatures"][0]["keyid"] for line in lines}
    if owner is not None and named != {owner.hint}:
        out.add("key", False, f"{st.BUNDLE} names another key")
    return {one["predicateType"]: one["predicate"] for one in found}


def _again(line: Mapping[str, Any], payload: bytes, signature: bytes) -> dict[str, Any]:
    from base64 import b64encode

    signed = {"sig": b64encode(signature).decode(), "keyid": line["signatures"][0]["keyid"]}
    return {"payload": b64encode(payload).decode(), "payloadType": line["payloadType"], "signatures": [signed]}


def _of_folder(found: AdapterFolder, told: Mapping[str, Any], out: Audit) -> None:
    """What the folder itself says: provenance made again, and whether eval.json is the one that was signed."""
    again = json.loads(canonical(st.provenance(found)))
    told_here = told[st.PROVENANCE]
    if again == told_here:
        m = found.manifest
        out.add(
            "provenance",
            True,
            f"recipe, base {m.base.ref}, {len(m.data)} sets and {len(m.depends_on)} adapters below are the folder's own",
        )
    else:
        same_build = again["buildDefinition"] == told_here.get("buildDefinition")
        what = (
            f"{st.SIGNATURE} or {EVAL} is not the one that was signed"
            if same_build
            else "it is not what the folder says"
        )
        out.add("provenance", False, what)
    out.add("adapter", told[st.ERASURE].get("adapter") == found.adapter_id, f"{found.adapter_id[:19]}")


def _ledger(found: AdapterFolder, erasure: Mapping[str, Any], stack: str | Path | None, out: Audit) -> None:
    """Whether the ledger that is given began as the one that was signed, and whose requests are meant."""
    told, private = erasure.get("ledger"), private_file(found)
    if told is None and not erasure.get("requests"):
        return
    if not private.is_file() or (told is not None and stack is None):
        need = "the salt that record wrote beside the folder" if not private.is_file() else "the ledger (--stack)"
        out.add(
            "requests", None, f"{len(erasure['requests'])} requests, as salted hashes; to check them {need} is needed"
        )
        return
    held = parse_json(read_text(private), str(private))
    salt, ids = str(held["salt"]), [str(r) for r in held.get("requests", ())]
    if told is not None and stack is not None:
        book = stackfile.load(stack)
        kept, gone = (
            book.entries[: told["entries"]],
            sorted((e for e in book.entries if e.revoked), key=lambda e: str((e.revoked or {})["date"]))[
                : told["revocations"]
            ],
        )
        then = [e if e in gone else replace(e, revoked=None) for e in kept]
        added, revoked, n = st.chain(then, salt, book.base.digest)
        same = (len(kept), added, n, revoked) == (
            told["entries"],
            told["head"],
            told["revocations"],
            told["revokedHead"],
        )
        out.add("ledger", same, f"{told['entries']} entries and {told['revocations']} revocations "
                + ("are as they were signed" if same else "are not those of this ledger"))  # fmt: skip
        ids += [str(e.request["id"]) for e in book.entries]
        own = [e for e in book.entries if e.adapter_id == found.adapter_id and e.revoked]
        if own and not any("revokedAt" in r for r in erasure["requests"]):
            date = str((own[0].revoked or {})["date"])[:10]
            out.add(
                "in force", False, f"revoked on {date}, after this record: its requests are no longer answered by it"
            )
    known = {st.salted(i, salt) for i in ids}
    odd = [r for r in erasure["requests"] if r["id"] not in known]
    out.add(
        "requests",
        not odd,
        f"{len(erasure['requests'])} requests"
        + (f", {len(odd)} of them unknown here" if odd else " are those on record here"),
    )


def _copies(found: AdapterFolder, erasure: Mapping[str, Any], derived: Sequence[str | Path], out: Audit) -> None:
    told = {d["name"]: d["digest"] for d in erasure.get("derived") or []}
    for given in derived:
        here = derived_of(found, given)
        out.add(f"copy {here['name']}", told.pop(here["name"], None) == here["digest"], "its tensors, by their digest")
    for name in told:
        out.add(f"copy {name}", None, "a merged model, known by its digest (--derived)")
