"""`ForgetRetain`: where the sets come from, their digests, and what may not stand in both."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny

from peft_unlearn.data.bundle import ForgetRetain, near_duplicates
from peft_unlearn.errors import UserError
from peft_unlearn.folder.manifest import BaseRef, Manifest

FORGET, RETAIN = tiny.rows(4, "f", 1), tiny.rows(5, "r", 2)


def save(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))


def test_folder_mapping_and_object(tmp_path):
    save(tmp_path / "forget.jsonl", FORGET)
    save(tmp_path / "retain.jsonl", RETAIN)
    folder = ForgetRetain.load(str(tmp_path))
    mapping = ForgetRetain.load({"forget": str(tmp_path / "forget.jsonl"), "retain": RETAIN})
    assert folder.forget == mapping.forget == FORGET and folder.retain == RETAIN and folder.holdout is None
    assert folder.sha256 == mapping.sha256 == ForgetRetain(FORGET, RETAIN).sha256
    assert ForgetRetain.load(folder) is folder
    about = folder.describe()
    assert about["forget"] == {"n": 4, "sha256": folder.sha256["forget"], "ref": None} and set(about) == {
        "forget",
        "retain",
    }
    assert "w1" not in json.dumps(about)  # never texts, never paths


def test_what_a_chat_template_is_given_is_recorded():
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]
    worded = ForgetRetain(rows, FORGET).describe()
    assert worded["forget"]["template_args"] == {"date": "2024-07-26"} and "template_args" not in worded["retain"]
    args = {"date": "2026-01-02", "enable_thinking": False, "system": "Be brief."}
    worded = ForgetRetain(FORGET, RETAIN, template={"chat": args}).describe()
    assert worded["forget"]["template_args"] == worded["retain"]["template_args"] == args
    about = {name: {k: v for k, v in row.items() if v is not None} for name, row in worded.items()}
    Manifest(BaseRef("local:" + "a" * 12, "a" * 64), {}, about).check()


def test_embedded_people():
    bundle = ForgetRetain.load("embedded:people")
    assert len(bundle.forget) == 100 and len(bundle.retain or []) > 1000 and "forget_other" in bundle.extra
    assert bundle.describe()["forget"]["ref"] == "embedded:people?seed=0"
    one = ForgetRetain.load({"forget": "embedded:people", "retain": "embedded:people#general"})
    assert one.sha256["forget"] == bundle.sha256["forget"] and one.refs["retain"] == "embedded:people#general"


def test_digest_ignores_order_but_not_multiplicity_or_content():
    sha = ForgetRetain(FORGET).sha256["forget"]
    assert ForgetRetain(FORGET[::-1]).sha256["forget"] == sha
    assert ForgetRetain([{**r, "note": 1} for r in FORGET]).sha256["forget"] == sha
    assert ForgetRetain([*FORGET, FORGET[0]]).sha256["forget"] != sha
    assert ForgetRetain([{**FORGET[0], "answer": "x"}, *FORGET[1:]]).sha256["forget"] != sha


@pytest.mark.parametrize("change", [lambda r: r, lambda r: {k: f" {v.upper()} " for k, v in r.items()}])
def test_the_same_example_in_both_is_refused(change):
    with pytest.raises(
        UserError, match=r"1 example\(s\) stand in the forget set and in the retain set \(retain rows 5\)"
    ):
        ForgetRetain(FORGET, [*RETAIN, change(FORGET[2])])


def test_near_duplicates_are_warned_about():
    long = "on a bright cold day in April the quick brown fox jumps over the lazy dog and then sleeps in the sun until the evening"
    forget = [{"question": "what happened?", "answer": long}]
    with pytest.warns(
        UserWarning, match=r"1 forget row\(s\) have a near-duplicate in the retain set \(forget 0 ~ retain 1\)"
    ):
        ForgetRetain(forget, [RETAIN[0], {"question": "what happened?", "answer": long + " comes"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForgetRetain(FORGET, RETAIN)
        ForgetRetain.load("embedded:people")


def test_near_duplicates_find_no_templates():
    def rows(a):
        return [
            {"question": f"When was person number {i} of group {a} born?", "answer": f"in {1900 + i}{a}"}
            for i in range(60)
        ]

    assert near_duplicates(rows("x"), rows("y")) == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"retain": RETAIN}, "the forget set is missing"),
        ({"forget": FORGET, "retian": RETAIN}, "there is no set 'retian'. Did you mean 'retain'?"),
        ({"forget": []}, "forget set: holds no rows"),
        ({"forget": [{"question": "x"}]}, "forget set: row 0 has fields 'question'"),
        (5, "a int is no bundle"),
        ("no/such/folder", "is no folder"),
        ("embedded:peple", "no embedded model or data set 'peple'. Did you mean 'people'?"),
        ("embedded:people?sed=1", "unknown option 'sed'"),
        ({"forget": "embedded:people#forgett"}, "has no set 'forgett'. Did you mean 'forget'?"),
    ],
    ids=str,
)
def test_refusals(spec, message):
    with pytest.raises(UserError) as e:
        ForgetRetain.load(spec)
    assert message in str(e.value)


def test_folder_refusals(tmp_path):
    with pytest.raises(UserError, match="holds no forget file"):
        ForgetRetain.load(tmp_path)
    save(tmp_path / "forget.jsonl", FORGET)
    (tmp_path / "forget.csv").write_text("question,answer\na,b\n")
    with pytest.raises(UserError, match=r"forget\.jsonl and forget\.csv; keep one"):
        ForgetRetain.load(tmp_path)


def test_unknown_template_is_refused():
    with pytest.raises(UserError, match="template 'chatml' is not one of qa, chat"):
        ForgetRetain(FORGET, RETAIN, template="chatml")


def test_encode_names_the_rows_that_fail():
    tok, bundle = tiny.tokenizer(), ForgetRetain(FORGET, RETAIN)
    assert len(bundle.encode("forget", tok)) == 4
    with pytest.raises(UserError, match=r"retain set: 5 problems\n  1\. row 0 has \d+ tokens, more than max_length 6"):
        bundle.encode("retain", tok, 6)
    assert len(bundle.encode("retain", tok, 40, "chunk", rows=[{"text": "w1 " * 60}])) > 1


def test_other_signs_make_another_example():
    """Only case and white space are overlooked: sums differ in their signs."""
    forget = [{"question": "What is 3+4?", "answer": "7"}]
    assert ForgetRetain(forget, [{"question": "What is 3-4?", "answer": "7"}]).retain
