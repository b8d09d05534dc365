"""Rows from files, lists, data sets; the text of each layout; messages that name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from peft_unlearn.data.formats import identity, layout_of, load_rows, to_text
from peft_unlearn.errors import UserError

QA = [{"question": "who, me?", "answer": "you"}, {"question": 'a "quoted"\nline', "answer": "grün \u2028 ok"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8-sig")  # a byte-order mark is no harm
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as f:
            out = csv.DictWriter(f, rows[0].keys())
            out.writeheader()
            out.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_files(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix.lower()}", QA)
    if suffix.isupper():
        path = path.rename(tmp_path / f"ROWS{suffix}")
    assert load_rows(path) == QA
    assert load_rows(str(path)) == QA


def test_objects():
    assert load_rows(QA) == QA and load_rows(iter(QA)) == QA and load_rows(tuple(QA)) == QA
    assert load_rows(["one", "two"]) == [{"text": "one"}, {"text": "two"}]
    datasets = pytest.importorskip("datasets")
    assert load_rows(datasets.Dataset.from_list(QA)) == QA
    with pytest.raises(UserError, match="name one split"):
        load_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(QA)}))
    copy = load_rows(QA)
    copy[0]["answer"] = "changed"
    assert QA[0]["answer"] == "you"


def test_unquoted_csv_fields_may_hold_odd_line_breaks(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nwhat\u2028now\x0c,yes\x85\n", encoding="utf-8")
    assert load_rows(tmp_path / "a.csv") == [{"question": "what\u2028now\x0c", "answer": "yes\x85"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "a", "answer": "b"}\n{"question": \n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"question": "a"}\n', "line 1 has fields 'question'; wanted one of: question+answer"),
        ("a.jsonl", '{"question": "a", "answer": 3}\n', "line 1 field 'answer' is int, not text"),
        ("a.jsonl", '{"question": "a", "answer": " "}\n', "line 1 field 'answer' is empty"),
        ("a.jsonl", "[1]\n", "line 1 is a list, not an object"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        ("a.jsonl", "[" * 200000, "line 1 is not valid JSON"),
        ("a.jsonl", '{"x": ' + "9" * 5000 + "}", "line 1 is not valid JSON"),
        ("a.jsonl", '{"messages": []}', "'messages' is not a non-empty list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "message 0 needs text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "must end with a non-empty assistant message"),
        ("a.json", "{}", "holds one dict, not a list of rows"),
        ("a.csv", "question,answer\na,b\nc\n", "line 3 has not as many columns as the header"),
        ("a.csv", "question,answer\na,b,c\n", "line 2 has not as many columns"),
        ("a.csv", 'question,answer\n"a,b\n', "is not valid csv"),
        ("a.csv", "question;answer\na;b\n", "has fields 'question;answer'"),
        ("a.csv", "question,answer\n", "holds no rows"),
        ("a.parquet", "no parquet", "is not a readable parquet file"),
        ("a.tsv", "x", "unknown kind of file '.tsv'"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_malformed_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        load_rows(path)
    assert message in str(e.value) and str(path) in str(e.value)


def test_all_bad_rows_are_listed_up_to_ten():
    with pytest.raises(UserError) as e:
        load_rows([{"question": "a", "answer": i} for i in range(30)], name="forget set")
    assert str(e.value).startswith("forget set: 10 problems") and "row 9 field 'answer'" in str(e.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.jsonl", "no such file"), ("a" * 5000, "no such file"), (".", "is a folder"), (5, "cannot read rows from a int"),
        ({"question": []}, "a mapping is not a list of rows"), ([], "holds no rows"), ([3], "row 0 is a int"),
    ],
    ids=lambda x: str(x)[:20],
)  # fmt: skip
def test_sources_that_are_none(source, message):
    with pytest.raises(UserError, match=message):
        load_rows(source)


def test_hub_id_offline():
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"no-one/nothing-here: could not be loaded from the Hub"):
        load_rows("no-one/nothing-here")


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def test_text_of_each_layout():
    tok = tiny.tokenizer()
    assert to_text({"question": "q?", "answer": "a"}) == ("Question: q?\nAnswer:", " a")
    assert to_text({"prompt": "p ", "completion": "c"}) == ("p ", "c")
    assert to_text({"prompt": "p ", "response": "r"}) == ("p ", "r")
    assert to_text({"text": "t"}) == ("", "t")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(UserError, match="no chat template"):
        to_text({"messages": messages}, tok)
    tok.chat_template = CHAT
    assert to_text({"messages": messages}, tok) == ("<|user|>hi\n<|assistant|>", "ho")
    assert to_text({"question": "hi", "answer": "ho"}, tok, "chat") == ("<|user|>hi\n<|assistant|>", "ho")
    tok.chat_template = "{{ messages|length }}" + CHAT
    with pytest.raises(UserError, match="words a prompt differently"):
        to_text({"messages": messages}, tok)


def test_layout_and_identity():
    row = {"question": "q", "answer": "a", "value": "v"}
    assert layout_of(row) == "question/answer" and layout_of({"x": 1}) is None
    assert identity(row) == identity({"answer": "a", "question": "q", "other": 1})
    assert identity(row) != identity({"question": "q", "answer": "b"})
