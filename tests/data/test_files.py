"""Rows as people have them: other kinds of files, several files, tables, other field names, and what is refused by name."""

from __future__ import annotations

import csv
import json

import pytest
import tiny

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import IGNORE, encode
from peft_unlearn.data.formats import load_rows
from peft_unlearn.errors import UserError

QA = [{"question": f"q{i}?", "answer": f"a{i}"} for i in range(3)]


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_json_lines_under_the_name_json(tmp_path):
    assert load_rows(lines(tmp_path / "forget10.json", QA)) == QA
    assert load_rows(lines(tmp_path / "one.json", QA[:1])) == QA[:1]
    (tmp_path / "list.json").write_text(json.dumps(QA, indent=2))
    assert load_rows(tmp_path / "list.json") == QA


def test_several_files_are_one_set(tmp_path):
    files = [lines(tmp_path / "a.jsonl", QA[:2]), lines(tmp_path / "b.json", QA[2:])]
    assert load_rows(files) == QA
    assert ForgetRetain.load({"forget": files, "retain": [{"question": "r?", "answer": "r"}]}).forget == QA
    (tmp_path / "c.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(UserError, match=r"c\.jsonl: line 1 has fields 'question'"):
        load_rows([*files, str(tmp_path / "c.jsonl")])
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        load_rows([*files, "nowhere.jsonl"])


def test_a_data_frame_is_rows_not_its_column_names():
    pandas = pytest.importorskip("pandas")
    assert load_rows(pandas.DataFrame(QA)) == QA


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_rows(tmp_path / "a.txt") == [{"text": "one\n\ntwo\n"}]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(tmp_path / "b.txt")


def test_long_csv_cells_are_read_and_the_limit_is_put_back(tmp_path):
    before, long = csv.field_size_limit(), "x" * 200_000
    (tmp_path / "a.csv").write_text(f"question,answer\nq,{long}\n")
    assert load_rows(tmp_path / "a.csv")[0]["answer"] == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("a.jsonl", '{"question": "q", "answer": "a", "answer": "b"}\n', "line 1 names the key 'answer' twice"),
        ("a.csv", "question,answer,answer\nq,a,b\n", "names 'answer' twice"),
        ("a.jsonl", '{"question": "q", "answer": "x \\ud83d"}\n', "line 1 field 'answer' holds half a character"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}\n', "message 0 holds half a character"),
        (
            "a.jsonl",
            '{"instruction": "q", "output": "a"}\n',
            r"data\.fields: \{question: instruction, answer: output\}",
        ),
        ("a.jsonl", '{"conversations": []}\n', r"data\.fields: \{messages: conversations\}"),
    ],
)
def test_what_is_refused_is_named(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=wanted):
        load_rows(tmp_path / name)


def test_other_peoples_names_by_a_mapping():
    alpaca = [{"instruction": "q0?", "input": "", "output": "a0"}]
    (row,) = load_rows(alpaca, fields={"question": "instruction", "answer": "output"})
    assert (row["question"], row["answer"]) == ("q0?", "a0")
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (row,) = load_rows([{"conversations": turns}], fields={"messages": "conversations"})
    assert row["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_a_mapping_in_a_recipe_reaches_every_set():
    from peft_unlearn.data.load import load_data

    sets = {k: [{"instruction": f"{k}?", "output": "a"}] for k in ("forget", "retain")}
    bundle = load_data({**sets, "fields": {"question": "instruction", "answer": "output"}})
    assert bundle.forget[0]["question"] == "forget?" and bundle.retain[0]["question"] == "retain?"
    with pytest.raises(UserError, match=r"data\.fields: there is no field 'questoin'. Did you mean 'question'\?"):
        load_data({**sets, "fields": {"questoin": "instruction"}})


def test_a_tool_call_without_text_is_a_turn_but_no_answer():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    (row,) = load_rows([{"messages": [ask, call, {"role": "tool", "content": "3"}, answer]}])
    assert row["messages"][1]["content"] == ""
    with pytest.raises(UserError, match="must end with a non-empty assistant message"):
        load_rows([{"messages": [ask, call]}])


def test_nulls_of_other_rows_columns_change_no_hash():
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    filled = {"messages": [{**m, "name": None} for m in plain["messages"]], "text": None}
    retain = [{"question": "r?", "answer": "r"}]
    assert ForgetRetain([plain], retain).sha256 == ForgetRetain([filled], retain).sha256


def test_no_chunk_is_an_end_token_alone():
    tok = tiny.tokenizer()
    for n in range(4, 12):
        for length in (5, 6, 7):
            for part in encode("xy", "abcdefghijkl"[:n], tok, length, "chunk"):
                wanted = [t for t in part["labels"] if t != IGNORE]
                assert wanted != [tok.eos_token_id]


def test_sets_of_ones_own_load_beside_the_known_ones():
    rows = {
        name: [{"question": f"{name}?", "answer": "a"}] for name in ("forget", "retain", "paraphrase", "neighbours")
    }
    bundle = ForgetRetain.load(rows)
    assert bundle.extra["paraphrase"][0]["question"] == "paraphrase?" and set(bundle.extra) == {
        "paraphrase",
        "neighbours",
    }
    with pytest.raises(UserError, match=r"there is no set 'retian'\. Did you mean 'retain'"):
        ForgetRetain.load({"forget": rows["forget"], "retian": rows["retain"]})
