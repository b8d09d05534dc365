"""Tokens and labels: the prompt's mask is exact, lengths are kept, nothing is lost."""

from __future__ import annotations

import random

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from peft_unlearn.data.collate import IGNORE, collate, encode, pad
from peft_unlearn.errors import UserError


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and a merge that reaches over a boundary: ": " + "x" may become one token."""
    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", *"abcdxyz: ", ":x", "ab"])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "x"), ("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>")


def targets(row: dict[str, list[int]]) -> list[int]:
    return [y for y in row["labels"] if y != IGNORE]


def test_prompt_is_masked_and_eos_is_a_target():
    tok = tiny.tokenizer()
    (row,) = encode("Question: w1?\nAnswer:", " w2 w3", tok)
    assert row["input_ids"][0] == tok.bos_token_id and row["input_ids"][-1] == tok.eos_token_id
    assert tok.decode(targets(row)[:-1]) == " w2 w3" and targets(row)[-1] == tok.eos_token_id
    n = len(targets(row))
    assert row["labels"][:-n] == [IGNORE] * (len(row["labels"]) - n) and row["input_ids"][-n:] == targets(row)


def test_a_token_across_the_boundary_counts_as_answer():
    tok = merging_tokenizer()
    (row,) = encode("ab:", "xy", tok)
    assert tok.convert_ids_to_tokens(row["input_ids"]) == ["ab", ":x", "y", "<eos>"]
    assert tok.convert_ids_to_tokens(targets(row)) == [":x", "y", "<eos>"]
    (row,) = encode("ab:", "yx", tok)  # the same prompt, no merge
    assert tok.convert_ids_to_tokens(targets(row)) == ["y", "x", "<eos>"]


def test_boundary_is_exact_for_many_texts():
    tok, rng = tiny.tokenizer(), random.Random(0)
    letters = "ab w1 w23 ?\n:é漢🙂 "
    for _ in range(200):
        prompt = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
        answer = "".join(rng.choice(letters) for _ in range(rng.randint(1, 9)))
        (row,) = encode(prompt, answer, tok)
        first = next(i for i, y in enumerate(row["labels"]) if y != IGNORE)
        offsets = tok(prompt + answer, return_offsets_mapping=True)["offset_mapping"]
        assert all(end <= len(prompt) for _, end in offsets[:first])
        assert offsets[first][1] > len(prompt)


def test_plain_text_has_every_token_but_the_first_as_target():
    tok = tiny.tokenizer()
    (row,) = encode("", "w1 w2", tok)
    assert row["labels"][0] == IGNORE and row["labels"][1:] == row["input_ids"][1:]
    (row,) = encode("", "xy", merging_tokenizer())  # no bos: the first token has nothing before it
    assert row["labels"] == [IGNORE, *row["input_ids"][1:]]


def test_no_second_bos_after_a_chat_template():
    tok = tiny.tokenizer()
    (row,) = encode("<bos>w1", " w2", tok)
    assert row["input_ids"].count(tok.bos_token_id) == 1
    assert row == encode("w1", " w2", tok)[0]


def test_a_tokenizer_that_closes_texts_itself_gets_no_second_eos():
    tok = tiny.tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    (row,) = encode("w1", " w2", tok)
    assert row["input_ids"].count(tok.eos_token_id) == 1 and targets(row)[-1] == tok.eos_token_id


def test_overflow():
    tok = tiny.tokenizer()
    prompt, answer = "Question: w1?\nAnswer:", " w2 w3 w4 w5 w6 w7 w8"
    (whole,) = encode(prompt, answer, tok)
    n, first = len(whole["input_ids"]), len(whole["input_ids"]) - len(targets(whole))
    assert encode(prompt, answer, tok, n) == [whole]
    with pytest.raises(UserError, match=f"has {n} tokens, more than max_length {n - 1}"):
        encode(prompt, answer, tok, n - 1)
    (cut,) = encode(prompt, answer, tok, n - 2, "truncate")
    assert cut["input_ids"] == whole["input_ids"][: n - 2] and cut["labels"] == whole["labels"][: n - 2]
    parts = encode(prompt, answer, tok, first + 3, "chunk")
    assert len(parts) > 2 and all(len(p["input_ids"]) <= first + 3 for p in parts)
    assert all(p["input_ids"][:first] == whole["input_ids"][:first] for p in parts)
    assert [y for p in parts for y in targets(p)] == targets(whole)
    for how in ("truncate", "chunk"):
        with pytest.raises(UserError, match="leaves no target"):
            encode(prompt, answer, tok, first, how)


@pytest.mark.parametrize("n", range(2, 14))
@pytest.mark.parametrize("bos", [True, False])
def test_chunks_of_plain_text_lose_no_target(n, bos):
    tok = tiny.tokenizer() if bos else merging_tokenizer()
    text = "xyz abcd xyz a"[:n]
    (whole,) = encode("", text, tok)
    for length in (2, 3, 5):
        parts = encode("", text, tok, length, "chunk")
        assert all(2 <= len(p["input_ids"]) <= length for p in parts)
        assert [y for p in parts for y in targets(p)] == targets(whole)
    with pytest.raises(UserError, match="leaves no target"):
        encode("", text, tok, 1, "chunk")


def test_empty_answer_is_refused():
    tok = tiny.tokenizer()
    tok.eos_token = None
    with pytest.raises(UserError, match="no target token"):
        encode("w1", "", tok)


def test_pad_and_collate():
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    out = pad(rows, 0)
    assert out["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert out["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert out["labels"].tolist() == [[-100, 6, 7], [-100, 9, -100]]
    with_ref = pad([{**rows[0], "ref_logp": [-1.0, -2.0]}, {**rows[1], "ref_logp": torch.tensor([-3.0])}], 0)
    assert with_ref["ref_logp"].tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    assert "ref_logp" not in pad([{**rows[0], "ref_logp": [-1.0, -2.0]}, rows[1]], 0)
    items = [{"forget": [rows[0]], "retain": [rows[1], rows[0]]}, {"forget": [rows[1]], "retain": [rows[0], rows[0]]}]
    got = collate(items, 0)
    assert got["forget"]["input_ids"].shape == (2, 3) and got["retain"]["input_ids"].shape == (4, 3)
    winners = collate([{"forget": [{**rows[0], "alternate": rows[1]}]}], 0)
    assert winners["forget"]["alternate"]["input_ids"].tolist() == [[8, 9]]
