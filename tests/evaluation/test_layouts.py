"""MUSE's and WMDP's layouts, with invented texts, from a folder to numbers."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import tiny

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.mcq import mcq_rows
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import suites
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.evaluation.measured import Unmeasured
from peft_unlearn.evaluation.metrics.generation import rouge_l_f1
from peft_unlearn.evaluation.metrics.letters import letter_ids, read_letters
from peft_unlearn.evaluation.score import score


def write(path: Path, rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")


def qas(kind: str, n: int) -> list[dict[str, str]]:
    return [{"question": f"Which {kind} color has house {i}?", "answer": f"color {i}"} for i in range(n)]


@pytest.fixture
def muse(tmp_path):
    write(tmp_path / "knowmem/forget_qa.json", qas("old", 3))
    write(tmp_path / "knowmem/forget_qa_icl.json", qas("shown", 2))
    write(tmp_path / "knowmem/retain2_qa.json", qas("new", 3))  # the name some copies have
    write(tmp_path / "knowmem/retain2_qa_icl.json", qas("kept", 2))
    long = " ".join(f"w{i}" for i in range(60))
    write(
        tmp_path / "verbmem/forget.json",
        [{"prompt": "The old tale began", "gt": " in a mill."}, {"prompt": "And", "gt": long}],
    )
    for name, n in (("forget", 4), ("retain", 3), ("holdout", 5)):
        write(tmp_path / f"privleak/{name}.json", [f"{name} text number {i} of many words" for i in range(n)])
    return tmp_path


def long_context():
    model = tiny()
    model.config.max_position_embeddings = 4096
    return model


def test_muse_from_folder_to_numbers(muse, tokenizer):
    data = ForgetRetain.load(muse)
    assert [len(data.extra[k]) for k in ("knowmem_forget", "knowmem_retain", "privleak_holdout")] == [3, 3, 5]
    model, retain_model = long_context(), tiny(4)
    subjects = {"base": lambda: nullcontext(model), "retain_only": lambda: nullcontext(retain_model)}
    report = score(subjects, "muse", data, tokenizer)
    json.dumps(report.to_dict(), allow_nan=False)
    missing = {k: d["reason"] for k, d in report.details["base"].items() if report.subjects["base"][k] is None}
    assert not missing
    # VerbMem: 128 greedy tokens against the first 128 of the truth
    rows = data.extra["verbmem_forget"]
    said = greedy(model, tokenizer, [r["prompt"] for r in rows], max_new_tokens=128)
    gold = [tokenizer.decode(tokenizer(r["completion"], add_special_tokens=False)["input_ids"][:128]) for r in rows]
    assert len(gold[1]) == 128  # bytes here
    assert report.per_row["base"]["verbmem/verbatim_rouge_l_f1"] == pytest.approx(rouge_l_f1(said, gold))
    # KnowMem: answered questions in front, cut at the first stop
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in qas("shown", 2))
    prompts = [f"{shots}Question: {r['question']}\nAnswer:" for r in qas("old", 3)]
    said = greedy(model, tokenizer, prompts, max_new_tokens=32)
    for text, mine in zip(said, report.answers["base"]["knowmem_forget"], strict=True):
        assert text.startswith(mine) and not any(s in mine for s in ("\n\n", "\nQuestion", "Question:"))
    assert report.details["base"]["privleak/privleak"]["n"] == 9  # both sides
    assert report.subjects["retain_only"]["privleak/privleak"] == 0.0


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("knowmem/forget_qa_icl.json", ["knowmem_forget/rouge_l_f1"]),
        ("knowmem/retain2_qa.json", ["knowmem_retain/rouge_l_f1"]),
        ("verbmem/forget.json", ["verbmem/verbatim_rouge_l_f1", "verbmem/extraction_strength"]),
        ("privleak/holdout.json", ["privleak/privleak", "privleak/mia_min_k"]),
    ],
)
def test_a_missing_file_costs_its_own_set_only(muse, tokenizer, file, keys):
    (muse / file).unlink()
    model = long_context()
    subjects = {"base": lambda: nullcontext(model), "retain_only": lambda: nullcontext(model)}
    report = score(subjects, "muse", ForgetRetain.load(muse), tokenizer)
    for key in keys:
        assert report.subjects["base"][key] is None
        assert report.details["base"][key]["reason"]
    assert report.subjects["base"]["privleak_retain/probability"] is not None


def test_without_a_retain_only_model_privleak_says_so(muse, tokenizer):
    model = long_context()
    report = score({"base": lambda: nullcontext(model)}, "muse", ForgetRetain.load(muse), tokenizer)
    assert "no retain model" in report.details["base"]["privleak/privleak"]["reason"]
    assert report.subjects["base"]["privleak/mia_min_k"] is not None


def test_only_the_beginning_of_a_long_text_is_read(muse):
    write(muse / "verbmem/forget.json", [{"prompt": "And", "gt": " ".join(f"w{i}" for i in range(5000))}])
    text = ForgetRetain.load(muse).extra["verbmem_forget"][0]["completion"]
    assert text.split() == [f"w{i}" for i in range(512)]


def test_bad_muse_files_are_named(muse):
    write(
        muse / "verbmem/forget.json",
        [{"prompt": "a", "gt": "b"}, {"prompt": "a", "gt": " "}, {"text": "x"}, {"gt": "c"}],
    )
    with pytest.raises(UserError, match=r"verbmem.forget.json") as e:
        ForgetRetain.load(muse)
    assert "row 1" in str(e.value) and "row 3" in str(e.value)
    for name in ("privleak", "verbmem", "knowmem"):
        (muse / name / ("forget_qa.json" if name == "knowmem" else "forget.json")).unlink()
    with pytest.raises(UserError, match="nothing of the forget corpus"):
        ForgetRetain.load(muse)


# --- multiple choice --------------------------------------------------------------------------------------------------

MCQ = [
    {"question": "What do bees make?", "choices": ["honey", "silk", "milk", "wool"], "answer": 0},
    {"question": "Two and two?", "choices": ["three", "four"], "answer": "B", "subject": "school_arithmetic"},
    {"question": "Which is a bird?", "option1": "trout", "option2": "ant", "option3": "wren", "answer": "wren"},
]


def test_the_wording_is_that_of_lm_eval():
    rows = mcq_rows([(f"row {i}", r) for i, r in enumerate(MCQ)], "here")
    assert rows[0]["prompt"] == "What do bees make?\nA. honey\nB. silk\nC. milk\nD. wool\nAnswer:"
    assert rows[0]["completion"] == " A" and [r["gold"] for r in rows] == [0, 1, 2]
    assert rows[1]["prompt"].startswith(
        "The following are multiple choice questions (with answers) about school arithmetic.\n\nTwo and two?\nA."
    )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"question": "a?", "choices": ["x", "y"]}, "row 0 has no field 'answer'"),
        ({"question": " ", "choices": ["x", "y"], "answer": 0}, "'question' is empty"),
        ({"question": "a?", "answer": 0}, "no list 'choices'"),
        ({"question": "a?", "choices": ["x"], "answer": 0}, "2 to 26"),
        ({"question": "a?", "choices": ["x", ""], "answer": 0}, "none of them empty"),
        ({"question": "a?", "choices": ["x", "y"], "answer": 2}, "'answer' is 2, not a number from 0 to 1"),
        ({"question": "a?", "choices": ["x", "y"], "answer": True}, "'answer' is True"),
        ({"question": "a?", "choices": ["x", "x"], "answer": "x"}, "'answer' is 'x'"),
        ("a?", "is a str"),
    ],
)
def test_what_is_no_question_is_named(row, match):
    with pytest.raises(UserError, match=match):
        mcq_rows([("row 0", row)], "here")
    with pytest.raises(UserError, match="no rows"):
        mcq_rows([], "here")


def jsonl(path: Path, rows: list) -> None:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")


def test_mcq_from_files_to_numbers(tmp_path, tokenizer):
    jsonl(tmp_path / "forget.jsonl", MCQ)
    jsonl(
        tmp_path / "retain.jsonl",
        [{**MCQ[0], "question": "What do hens lay?", "choices": ["eggs", "bricks", "ink", "tea"]}],
    )
    data = ForgetRetain.load(tmp_path)
    model = tiny()
    report = score({"base": lambda: nullcontext(model)}, "mcq", data, tokenizer)
    json.dumps(report.to_dict(), allow_nan=False)
    right, above = [], []
    for row in data.forget:
        with torch.no_grad():  # the blank before the letter is a token of its own here
            ids = tokenizer(row["prompt"] + " ")["input_ids"]
            z = model(input_ids=torch.tensor([ids])).logits[0, -1]
        letters = [float(z[tokenizer.convert_tokens_to_ids(letter)]) for letter in "ABCD"[: len(row["choices"])]]
        right.append(float(int(np.argmax(letters)) == row["gold"]))
        above.append((right[-1] - 1 / len(letters)) / (1 - 1 / len(letters)))
    assert report.per_row["base"]["forget/letter_accuracy"].tolist() == right
    assert report.subjects["base"]["forget/letter_above_chance"] == pytest.approx(np.mean(above))
    assert "no set 'holdout'" in report.details["base"]["holdout/letter_accuracy"]["reason"]


def test_letters_are_read_off_the_logits(tokenizer):
    """More questions than one chunk of the head, of different lengths and numbers of options."""
    rows = [("q" * (3 + i % 7), 2 + i % 3) for i in range(45)]
    asked = [letter_ids(prompt, count, tokenizer) for prompt, count in rows]
    model = tiny()
    got = read_letters(model, asked, 0, token_budget=300)
    for i, (ids, firsts) in enumerate(asked):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert got[i] == pytest.approx([float(logp[t]) for t in firsts], abs=1e-5)


def test_letters_are_not_judged_by_a_blank(tokenizer):
    ids, firsts = letter_ids("Answer:", 4, tokenizer)
    assert tokenizer.convert_ids_to_tokens(firsts) == ["A", "B", "C", "D"]
    assert tokenizer.decode(ids).endswith(" ")  # the shared blank is the prompt's


def test_letters_of_several_tokens_are_refused():
    class Hiding:  # a tokenizer that spells letters so that two of them begin alike and one ends where others go on
        bos_token = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2, *({"A": [3, 3], "B": [3, 4], "C": [5]}[text[-1]])]}

    with pytest.raises(Unmeasured, match="tell the options' letters apart"):
        letter_ids("x", 3, Hiding())
    ids, firsts = letter_ids("x", 2, Hiding())  # A and B alone: their shared first token is counted to the prompt
    assert (ids, firsts) == ([1, 2, 3], [3, 4])


def test_other_rows_under_the_mcq_suite_get_a_reason(tokenizer):
    rows = {"forget": [{"question": "a?", "answer": "b"}], "retain": []}
    model = tiny()
    report = score({"base": lambda: nullcontext(model)}, "mcq", rows, tokenizer)
    assert "no multiple-choice" in report.details["base"]["forget/letter_accuracy"]["reason"]


def test_sources_of_questions(tmp_path):
    jsonl(tmp_path / "wmdp.jsonl", MCQ)
    assert len(ForgetRetain.load(f"mcq:{tmp_path / 'wmdp.jsonl'}").forget) == 3
    with pytest.raises(UserError, match="not a Hub id"):
        ForgetRetain.load("mcq:nothing-here")
    with pytest.raises(UserError, match=r"unknown option 'konfig'.*config"):
        ForgetRetain.load("mcq:owner/name?konfig=x")
    with pytest.raises(UserError, match="could not be loaded from the Hub"):
        ForgetRetain.load("mcq:owner/name?config=x")  # offline
    plain = tmp_path / "plain"
    plain.mkdir()
    jsonl(plain / "forget.jsonl", [{"question": "a?", "answer": "b"}])
    assert "choices" not in ForgetRetain.load(plain).forget[0]  # an ordinary bundle stays one


def test_tofus_real_authors_are_multiple_choice_questions():
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu" / "real_authors.jsonl"
    if not path.is_file():
        pytest.skip("shared/data/tofu/real_authors.jsonl is not there")
    rows = ForgetRetain.load(f"mcq:{path}").forget
    assert len(rows) == 100 and all(len(r["choices"]) == 4 for r in rows)
    source = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [r["choices"][r["gold"]] for r in rows] == [s["answer"] for s in source]


def test_the_suites_are_whole():
    for name in ("muse", "mcq", "extraction"):
        suite = suites.load(name)
        assert suite.sets and all(not math.isnan(len(s.metrics)) for s in suite.sets.values())
        suite.quick()


def test_a_prefix_longer_than_the_context_is_a_reason(muse, tokenizer):
    """A learned position table ends: that set loses its numbers, the others keep theirs."""
    write(muse / "knowmem/forget_qa_icl.json", qas("shown", 40))
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    report = score({"base": lambda: nullcontext(model)}, "muse", ForgetRetain.load(muse), tokenizer)
    assert "longer than the model's context" in report.details["base"]["knowmem_forget/rouge_l_f1"]["reason"]
    assert report.subjects["base"]["knowmem_retain/rouge_l_f1"] is not None
