"""Any number of named sets, their shares of a step, and losses that look at the value alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.collate import IGNORE, PairedRows, collate, encode
from peft_unlearn.data.load import load_data
from peft_unlearn.errors import UserError
from peft_unlearn.training.config import UnlearnConfig
from peft_unlearn.training.trainer import UnlearnTrainer

ROW = {"question": "Where is w1?", "answer": "In w2 city, w2 that is.", "value": ["w2 city", "w9"]}


def write(folder: Path, **sets: list[dict]) -> Path:
    for name, rows in sets.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_a_folder_holds_sets_of_any_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        forget=tiny.rows(3, "f", 1),
        retain=tiny.rows(3, "r", 2),
        forget_other=tiny.rows(2, "o", 3),
        near=tiny.rows(4, "n", 4),
    )
    (tmp_path / "dataset_info.json").write_text("{}")  # no set
    data = ForgetRetain.load(tmp_path)
    assert data.names() == ["forget", "retain", "forget_other", "near"] and len(data.rows("near") or []) == 4
    assert set(data.describe(["forget", "near"])) == {
        "forget",
        "retain",
        "near",
    }  # what is only judged by is no training data
    with pytest.raises(UserError, match=r"no set 'retian'\. Did you mean 'retain'"):
        ForgetRetain.load({"forget": tiny.rows(3, "f", 1), "retian": tiny.rows(3, "r", 2)})


def test_the_value_alone_is_the_target() -> None:
    tok = tiny.tokenizer()
    data = load_data({"forget": [ROW], "retain": [{**ROW, "question": "Where is w3?"}], "target": "value"})
    for name, whole in (("forget", False), ("retain", True)):
        (row,) = data.encode(name, tok)
        seen = tok.decode([y for y in row["labels"] if y != IGNORE])
        assert ("that is" in seen) is whole and "w2 city" in seen
    data.target = "answer"
    (row,) = data.encode("forget", tok)
    assert row["labels"][-1] == tok.eos_token_id
    missing = {**ROW, "answer": "In w3 city."}
    with pytest.raises(
        UserError, match=r"row 0 has the value 'w2 city', which does not stand in its answer 'In w3 city\.'"
    ):
        load_data({"forget": [missing], "target": "value"}).encode("forget", tok)
    with pytest.raises(UserError, match=r"data\.target: 'values' is not one of"):
        load_data({"forget": [ROW], "target": "values"})


def test_a_row_without_a_value_keeps_its_whole_answer() -> None:
    tok, plain = tiny.tokenizer(), tiny.rows(1, "f", 1)
    assert load_data({"forget": plain, "target": "value"}).encode("forget", tok) == load_data({"forget": plain}).encode(
        "forget", tok
    )


def test_spans_follow_truncation_and_chunks() -> None:
    tok = tiny.tokenizer()
    prompt, answer = "Q:", " " + " ".join(f"w{i}" for i in range(9))
    start = answer.index("w7")
    (whole,) = encode(prompt, answer, tok, spans=[(start, start + 2)])
    assert tok.decode([y for y in whole["labels"] if y != IGNORE]).strip() == "w7"
    size = len(whole["input_ids"]) // 2
    with pytest.raises(UserError, match="was cut off"):
        encode(prompt, answer, tok, size, "truncate", spans=[(start, start + 2)])
    pieces = encode(prompt, answer, tok, size, "chunk", spans=[(start, start + 2)])
    assert sum(y != IGNORE for p in pieces for y in p["labels"]) == sum(y != IGNORE for y in whole["labels"])


def test_shares_are_exact_and_use_every_row_equally() -> None:
    sets = {
        "forget": [{"n": i} for i in range(6)],
        "retain": [{"n": i} for i in range(4)],
        "near": [{"n": i} for i in range(5)],
    }
    rows = PairedRows(sets, "forget", {"retain": 0.5, "near": 1.5}, seed=3)
    items = [rows[i] for i in range(40)]
    assert sum(len(x["retain"]) for x in items) == 20 and sum(len(x["near"]) for x in items) == 60
    assert set(Counter(r["n"] for x in items for r in x["near"]).values()) == {12}
    assert [len(x["retain"]) for x in items[:4]] == [0, 1, 0, 1] and all(len(x["forget"]) == 1 for x in items)
    alike = PairedRows(sets, "forget", 2, seed=3)
    assert [alike[i] for i in range(9)] == [
        PairedRows(sets, "forget", {"retain": 2, "near": 2}, seed=3)[i] for i in range(9)
    ]
    ids = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert set(collate([{"forget": [ids], "retain": []}], 0)) == {"forget"}


def test_terms_read_named_sets_however_a_step_is_split(tmp_path: Path) -> None:
    totals = []
    for batch, accumulation in ((4, 1), (1, 4)):
        data = ForgetRetain(tiny.rows(8, "f", 1), tiny.rows(8, "r", 2), extra={"near": tiny.rows(4, "n", 4)})
        config = UnlearnConfig(
            output_dir=str(tmp_path / f"o{batch}"), terms={"forget": {"ga": {}}, "retain": {"nll": {}}, "near": {"nll": {"weight": 2}}},
            per_anchor={"near": 0.5}, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2,
            learning_rate=0.01, optim="sgd", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(0)  # the adapter's random start
        trainer = UnlearnTrainer(
            tiny.llama(), config, data=data, processing_class=tiny.tokenizer(), peft_config={"r": 2}
        )
        trainer.train()
        assert set(trainer.last_step.values) == {"forget", "retain", "near"}
        totals.append([float(p.double().sum()) for n, p in trainer.bare.named_parameters() if "lora_B" in n])
    assert any(totals[0]) and totals[0] == pytest.approx(totals[1], rel=1e-4, abs=1e-9)
