"""A record holds until one byte of it changes, and says no more than was measured."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from keyfiles import write_key

from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.records import statements as st
from peft_unlearn.records.audit import _of_folder, _signature, _statements, audit
from peft_unlearn.records.claims import CONFIRMED, CONTRADICTED, SIGNED, Audit
from peft_unlearn.records.keys import PASSWORD, envelope, load_key, opened
from peft_unlearn.records.record import private_file, record
from peft_unlearn.records.statistics import canonical
from peft_unlearn.stack import stackfile
from peft_unlearn.stack.stackfile import add, revoke

pytest.importorskip("cryptography")  # an extra; with [dev] it is there
ROOT = Path(__file__).resolve().parents[2]


def of(found: Audit, name: str) -> str:
    return next(c.answer for c in found.claims if c.name == name)


def checked(folder: Path, pub: Path) -> bool:
    """Signatures, files, statements and what the folder says: all that needs no base."""
    out, owner = Audit(""), load_key(pub, private=False)
    told = _statements(folder, owner, _signature(folder, owner, out), out)
    if told is not None:
        try:
            _of_folder(read_adapter(folder), told, out)
        except UserError as e:
            out.add("adapter", False, str(e))
    return out.verdict != CONTRADICTED


def test_a_whole_record_is_confirmed(place, base_dir):
    found = audit(place.adapter, key=place.pub, base=str(base_dir), stack=place.stack)
    assert {
        of(found, n) for n in ("signature", "files", "statements", "provenance", "verify: base", "ledger", "requests")
    } == {CONFIRMED}
    assert found.verdict == SIGNED and found.exit_code == 5  # no suite was measured
    assert json.loads(json.dumps(found.to_dict()))["verdict"] == SIGNED
    assert "erased" not in str(found).lower()


def test_the_card_may_be_written_again_and_numbers_may_not(place):
    (place.adapter / "README.md").write_text("new words\n")
    assert checked(place.adapter, place.pub)
    (place.adapter / "eval.json").write_text('{"format": 1, "x": 1}\n')
    assert not checked(place.adapter, place.pub)


def test_any_changed_byte_of_a_statement_is_found(place):
    for name in (st.SIGNATURE, st.BUNDLE):
        path = place.adapter / name
        whole = path.read_bytes()
        for i in range(0, len(whole), 61):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            assert not checked(place.adapter, place.pub), (name, i, whole[i - 9 : i + 9])
        for other in (whole + b"\n", whole[:-1], whole.replace(b":", b": ", 1), b""):
            path.write_bytes(other)
            assert not checked(place.adapter, place.pub), (name, other[-20:])
        path.write_bytes(whole)
    assert checked(place.adapter, place.pub)


@pytest.mark.slow
def test_every_changed_byte_of_a_statement_is_found(place):
    for name in (st.SIGNATURE, st.BUNDLE):
        path = place.adapter / name
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
            assert not checked(place.adapter, place.pub), (name, i)


def test_any_changed_byte_of_a_signed_file_is_found(place):
    files = st.signed_files(place.adapter)
    assert len(files) >= 4 and not {"README.md", "eval.json"} & set(files)
    for name in files:
        path = place.adapter / name
        whole = path.read_bytes()
        for i in range(0, len(whole), max(1, len(whole) // 7)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 32]) + whole[i + 1 :])
            assert not checked(place.adapter, place.pub), (name, i)
        path.write_bytes(whole)
    (place.adapter / "more.txt").write_text("x")
    assert not checked(place.adapter, place.pub)


def test_any_changed_row_of_the_ledger_is_found(place):
    found = read_adapter(place.adapter)
    erasure = _statements(place.adapter, None, st.root_of(st.signed_files(place.adapter)), Audit(""))[st.ERASURE]  # type: ignore[index]
    salt = json.loads(private_file(found).read_text())["salt"]
    before = stackfile.load(place.stack)
    whole, caught = place.stack.read_bytes(), 0
    for i in range(0, len(whole), 7):
        place.stack.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        try:
            book = stackfile.load(place.stack)
        except UserError:
            continue
        if (book.entries, book.base.digest) == (before.entries, before.base.digest):
            continue  # a comment
        assert st.chain(book.entries, salt, book.base.digest)[0] != erasure["ledger"]["head"], i
        caught += 1
    assert caught > 20
    place.stack.write_bytes(whole)


def test_a_ledger_grows_and_keeps_what_was_signed(place, base_dir):
    import tinyfolder

    def now() -> Audit:
        return audit(place.adapter, key=place.pub, base=str(base_dir), stack=place.stack, rerun=False)

    tinyfolder.write(place.root / "c", base_dir, seed=9)
    add(place.stack, place.root / "c", request_id="R-c", reason="later")
    revoke(place.stack, "b", "not any more")
    assert of(now(), "ledger") == of(now(), "requests") == CONFIRMED
    revoke(place.stack, "a")
    assert of(now(), "in force") == CONTRADICTED
    book = stackfile.load(place.stack)
    book.entries[0].request["reason"] = "another one"
    stackfile.save(book)
    assert of(now(), "ledger") == CONTRADICTED


def test_another_key_is_contradicted_and_no_key_is_said(place, base_dir):
    (place.root / "other").mkdir()
    write_key(place.root / "other", "SECP384R1")
    found = audit(place.adapter, key=place.root / "other" / "key.pub", base=str(base_dir), rerun=False)
    assert of(found, "signature") == of(found, "statements") == CONTRADICTED and found.exit_code == 1
    found = audit(place.adapter, base=str(base_dir), rerun=False)
    assert of(found, "signature") == SIGNED and of(found, "files") == CONFIRMED


def test_statements_of_an_earlier_record_do_not_pass(place, base_dir):
    old = (place.adapter / st.BUNDLE).read_text().splitlines(keepends=True)
    done = record(place.adapter, place.key, base=str(base_dir))
    assert done.look == 1 and checked(place.adapter, place.pub)
    new = (place.adapter / st.BUNDLE).read_text().splitlines(keepends=True)
    for mixed in (old, [*new[:3], old[3]], [*old[:3], new[3]], new[:3], [new[1], new[0], *new[2:]], [*new, new[3]]):
        (place.adapter / st.BUNDLE).write_text("".join(mixed))
        assert not checked(place.adapter, place.pub)


@pytest.mark.parametrize(
    ("line", "change"),
    [
        (2, {"attributes": [{"conditions": {"set": 1}}]}),
        (3, {"requests": 3}),
        (3, {"wording": None}),
        (3, {"ledger": {"entries": "x"}}),
    ],
)
def test_statements_that_a_stranger_signed_in_another_shape(place, base_dir, line, change):
    """Signed by the right key, and still no record: a message, no traceback."""
    path, key = place.adapter / st.BUNDLE, load_key(place.key, private=True)
    told = [json.loads(opened(json.loads(one), "")[0]) for one in path.read_text().splitlines()]
    told[line]["predicate"] |= change
    payloads = [canonical(one) for one in told]
    told[3]["predicate"]["statements"] = [hashlib.sha256(p).hexdigest() for p in payloads[:3]]
    payloads[3] = canonical(told[3])
    path.write_text("".join(canonical(envelope(p, key, key.hint)).decode() + "\n" for p in payloads))
    found = audit(place.adapter, key=place.pub, base=str(base_dir))
    assert of(found, "statements") == CONTRADICTED and (st.SCAI, st.ERASURE)[line - 2] in str(found)


def test_nothing_is_signed_that_verify_refuses(place, base_dir):
    path = place.adapter / "forget.json"
    told = json.loads(path.read_text())
    told["probes"]["adapter"] = told["probes"]["base"]
    path.write_text(json.dumps(told))
    before = (place.adapter / st.SIGNATURE).read_bytes()
    with pytest.raises(UserError, match=r"nothing was signed.*probes, adapter on"):
        record(place.adapter, place.key, base=str(base_dir))
    assert (place.adapter / st.SIGNATURE).read_bytes() == before


def test_what_a_user_does_wrong(place, base_dir, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no private key"):
        record(place.adapter, place.pub)
    with pytest.raises(UserError, match="ecparam -name prime256v1"):
        record(place.adapter, tmp_path / "none.pem")
    locked = write_key(tmp_path, "SECP521R1", b"secret")
    with pytest.raises(UserError, match=PASSWORD):
        load_key(locked, private=True)
    monkeypatch.setenv(PASSWORD, "secret")
    assert load_key(locked, private=True).hint == load_key(tmp_path / "key.pub", private=False).hint
    (tmp_path / "no.pem").write_text("hello")
    with pytest.raises(UserError, match="not an elliptic key"):
        load_key(tmp_path / "no.pem", private=False)
    shutil.copytree(place.adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("*.sig"))
    with pytest.raises(UserError, match=r"holds no record \(model.sig missing\)"):
        audit(tmp_path / "bare")
    with pytest.raises(UserError, match="is not in this stack"):
        record(place.root / "b", place.key, base=str(base_dir), stack=_without(place.stack, "b"))
    (place.adapter / "link").symlink_to("README.md")
    with pytest.raises(UserError, match="holds links"):
        record(place.adapter, place.key, base=str(base_dir))


def _without(stack: Path, name: str) -> Path:
    book = stackfile.load(stack)
    book.entries = [e for e in book.entries if e.name != name]
    stackfile.save(book)
    return stack


def test_without_cryptography_it_says_what_to_install(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(UserError, match=r"pip install 'peft-unlearn\[record\]'"):
        record(place.adapter, place.key)


def test_the_salt_stays_beside_the_folder(place):
    private = private_file(read_adapter(place.adapter))
    assert private.stat().st_mode & 0o077 == 0
    salt = json.loads(private.read_text())["salt"]
    text = b"".join(p.read_bytes() for p in place.adapter.rglob("*") if p.is_file()).decode("latin-1")
    assert salt not in text and "R-a" not in text and "R-0" not in text


@pytest.mark.slow
def test_numbers_of_an_embedded_adapter_are_measured_again(tmp_path):
    """Honest numbers are confirmed, forged ones are not, whatever was signed."""
    folder = Path(shutil.copytree(ROOT / "adapters/published/npo", tmp_path / "npo"))
    key = write_key(tmp_path)
    done = record(folder, key)
    assert done.wording == st.SUPPRESSED and len(done.bounds) == 6
    found = audit(folder, key=tmp_path / "key.pub")
    assert of(found, "numbers") == of(found, "wording") == of(found, "leak, forget_other, float32") == CONFIRMED
    assert of(found, "leak, forget, int4") == of(found, "attacks") == SIGNED and found.exit_code == 5
    told = json.loads((folder / "eval.json").read_text())
    told["subjects"]["adapter"]["forget_other/value_accuracy"] = 0.0  # 3 of 100 leak
    (folder / "eval.json").write_text(json.dumps(told))
    record(folder, key)
    forged = audit(folder, key=tmp_path / "key.pub")
    assert of(forged, "numbers") == of(forged, "leak, forget_other, float32") == CONTRADICTED and forged.exit_code == 1
