"""What a chat template makes of a row: one end of turn, nothing behind it, the same text every day."""

from __future__ import annotations

import pytest
import tiny

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.chat import chat_text, end_tokens, template_args
from peft_unlearn.data.collate import IGNORE, encode, prompt_ids
from peft_unlearn.data.formats import target_of, to_text
from peft_unlearn.data.load import load_data
from peft_unlearn.errors import UserError

BEGIN, END = "<|turn|>", "<|over|>"
TURN = "<|turn|>{{ m['role'] }}\n{{ m['content']|trim }}"
GENERATE = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
# name: (template, what the answer "w1 w2" becomes)
TEMPLATES = {
    "newline behind the end": ("{% for m in messages %}" + TURN + "<|over|>{{ '\n' }}{% endfor %}" + GENERATE, f"w1 w2{END}"),
    "nothing behind it": ("{% for m in messages %}" + TURN + "<|over|>{% endfor %}" + GENERATE, f"w1 w2{END}"),
    "two end tokens": (
        "{% for m in messages %}" + TURN + "<|over|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% else %}<eos>{% endif %}", f"w1 w2{END}",
    ),
    "an empty thought": (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|over|>{% endfor %}"
        + GENERATE, f"w1 w2{END}",
    ),
    "a space before the answer": (
        "{% for m in messages %}{% if m['role'] == 'user' %}[I] {{ m['content'] }} [/I]"
        "{% else %} {{ m['content'] }}<eos>{% endif %}{% endfor %}", " w1 w2<eos>",
    ),
    "no generation prompt": ("{% for m in messages %}" + TURN + "<|over|>{% endfor %}", f"w1 w2{END}"),
}  # fmt: skip
TURNS = [{"role": "user", "content": "w3?"}, {"role": "assistant", "content": "w1 w2"}]


@pytest.fixture
def tokenizer():
    tok = tiny.tokenizer()
    tok.add_special_tokens({"additional_special_tokens": [BEGIN, END]})
    return tok


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [TURNS, [*TURNS, *TURNS]], ids=["one turn", "two turns"])
def test_targets_end_with_the_first_end_token_of_the_last_turn(tokenizer, name, turns):
    tokenizer.chat_template, wanted = TEMPLATES[name]
    prompt, answer = to_text({"messages": turns}, tokenizer)
    assert answer == wanted and "<think>" not in answer
    (row,) = encode(prompt, answer, tokenizer)
    targets = [t for t in row["labels"] if t != IGNORE]
    assert [t in end_tokens(tokenizer) for t in targets] == [False] * (len(targets) - 1) + [True]
    assert target_of({"messages": turns}) == "w1 w2"


def test_a_plain_text_still_gets_its_end_token(tokenizer):
    (row,) = encode("w1", " w2", tokenizer)
    assert row["input_ids"][-1] == tokenizer.eos_token_id and row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_ends_every_text_keeps_the_answers_first_token(tokenizer):
    class Ends:  # as ByT5's: slow, and an end token behind whatever it reads
        is_fast, bos_token, eos_token, eos_token_id, bos_token_id, pad_token_id, unk_token_id = (
            False,
            None,
            "</s>",
            1,
            None,
            0,
            2,
        )
        all_special_ids, added_tokens_decoder = (0, 1, 2), {}

        def __len__(self):
            return 300

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [b + 3 for b in text.encode()] + [1] * add_special_tokens}

    (row,) = encode("ab", "cd", Ends())
    assert row["labels"] == [IGNORE, IGNORE, ord("c") + 3, ord("d") + 3, 1]
    assert prompt_ids("ab", Ends()) == [ord("a") + 3, ord("b") + 3]


def test_a_template_that_prints_today_prints_one_day(tokenizer, monkeypatch):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}|" + TEMPLATES["nothing behind it"][0]
    assert chat_text(TURNS, tokenizer)[0].startswith("26 Jul 2024|")
    assert chat_text(TURNS, tokenizer, {"date": "2031-01-02"})[0].startswith("02 Jan 2031|")
    with pytest.raises(UserError, match="date must be a day"):
        template_args({"date": "tomorrow"})


def test_arguments_reach_the_template_and_a_system_prompt_stands_first(tokenizer):
    tokenizer.chat_template = "{{ mood }}|" + TEMPLATES["nothing behind it"][0]
    prompt, _ = chat_text(TURNS, tokenizer, {"mood": "calm", "system": "w5"})
    assert prompt.startswith(f"calm|{BEGIN}system\nw5{END}{BEGIN}user\n")


def test_template_args_of_a_recipe_are_in_every_row(tmp_path, tokenizer):
    rows = [{"question": "w1?", "answer": "w2"}]
    spec = {
        "forget": rows,
        "retain": [{"question": "w3?", "answer": "w4"}],
        "template": "chat",
        "template_args": {"system": "w9"},
    }
    bundle = load_data(spec)
    assert bundle.template == {"chat": {"system": "w9"}}
    tokenizer.chat_template = TEMPLATES["nothing behind it"][0]
    assert "system\nw9" in tokenizer.decode(bundle.encode("forget", tokenizer)[0]["input_ids"])
    with pytest.raises(UserError, match="is not one of qa, chat"):
        ForgetRetain(rows, template={"chatml": {}})


def test_keys_filled_with_null_are_no_keys(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% if 'name' in m %} {{ m['name'] }}{% endif %}"
        ": {{ m['content'] }}<|over|>{% endfor %}"
    )
    filled = [{**m, "name": None, "tool_calls": None} for m in TURNS]
    assert chat_text(filled, tokenizer) == chat_text(TURNS, tokenizer)


def test_a_template_that_refuses_is_a_sentence(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refuses this conversation: roles must alternate"):
        chat_text(TURNS, tokenizer)
