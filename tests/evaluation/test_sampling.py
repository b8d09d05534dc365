"""Sampled and greedy continuations of live models, and the metrics that are fed from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from eval_helpers import qa, tiny

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.generate import greedy
from peft_unlearn.evaluation.metrics.extraction import ngram_overlap, prefixes
from peft_unlearn.evaluation.metrics.generation import value_accuracy
from peft_unlearn.evaluation.sampling import FORMATS, answer_ids, bare_ids, continuations, sample, uniforms, worded
from peft_unlearn.evaluation.score import score

PROMPTS = ["Question: a\nAnswer:", "b", "Where was a rather longer person born, and why there?", "Question: c\nAnswer:"]


def one_by_one(model, ids, count, random=None, temperature=1.0):
    """The definition: whole forward for each token, no cache, no batch, no padding."""
    new = []
    for t in range(count):
        with torch.no_grad():
            z = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, -1].double()
        if random is None:
            token = int(z.argmax())
        else:
            mass = (z / temperature).softmax(-1).cumsum(-1)
            token = int((mass <= random[t] * mass[-1]).sum())
        if token == 2:  # EOS
            break
        new.append(token)
    return new


def test_continuations_are_the_definition(model, tokenizer):
    ids = [bare_ids(p, model, tokenizer) for p in PROMPTS]
    lengths = [7, 3, 5, 1]
    expected = [one_by_one(model, row, n) for row, n in zip(ids, lengths, strict=True)]
    assert continuations(model, tokenizer, ids, lengths) == expected
    random = [uniforms(3, row, 0, n) for row, n in zip(ids, lengths, strict=True)]
    expected = [
        one_by_one(model, row, n, u, 0.7) for row, n, u in zip(ids, lengths, random, strict=True)
    ]  # one prompt after the other
    assert continuations(model, tokenizer, ids, lengths, random=random, temperature=0.7) == expected


def test_greedy_is_the_one_of_generate(model, tokenizer):
    ids = [bare_ids(p, model, tokenizer) for p in PROMPTS]
    said = [tokenizer.decode(new, skip_special_tokens=True).strip() for new in continuations(model, tokenizer, ids, 9)]
    assert said == greedy(model, tokenizer, PROMPTS, max_new_tokens=9)


def test_samples_do_not_depend_on_the_batch(model, tokenizer):
    whole = sample(model, tokenizer, PROMPTS, 5, seed=1, max_new_tokens=8)
    assert len({text for texts in whole for text in texts}) > 10  # they do differ from each other
    assert sample(model, tokenizer, PROMPTS[::-1], 5, seed=1, max_new_tokens=8)[::-1] == whole  # order
    assert sample(model, tokenizer, PROMPTS[2:3], 5, seed=1, max_new_tokens=8) == whole[2:3]  # other rows
    assert sample(model, tokenizer, PROMPTS, 5, seed=1, max_new_tokens=8, token_budget=1) == whole  # one row a batch
    assert [t[:3] for t in whole] == sample(model, tokenizer, PROMPTS, 3, seed=1, max_new_tokens=8)  # number of samples
    assert sample(model, tokenizer, PROMPTS, 5, seed=2, max_new_tokens=8) != whole


def test_the_global_generator_is_left_alone(model, tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    sample(model, tokenizer, PROMPTS[:1], 3, max_new_tokens=4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tokens_come_as_often_as_they_should(model, tokenizer):
    ids = bare_ids(PROMPTS[0], model, tokenizer)
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
    n = 2000
    new = continuations(model, tokenizer, [ids] * n, 1, random=[uniforms(0, ids, k, 1) for k in range(n)])
    seen = np.bincount([row[0] if row else 2 for row in new], minlength=len(p)) / n
    spread = np.sqrt(p * (1 - p) / n)
    assert (np.abs(seen - p) < 5 * spread + 1e-3).all()


def test_a_model_without_an_end_takes_every_token(tokenizer):
    model = tiny()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        got = continuations(model, tokenizer, [[1, 5, 6]], 12)
        assert [len(row) for row in got] == [12]
    finally:
        tokenizer.eos_token = eos


def test_what_cannot_be_sampled_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        continuations(model, tokenizer, [[], [1]], 3)
    with pytest.raises(UserError, match="temperature above 0"):
        continuations(model, tokenizer, [[1]], 3, random=[np.zeros(3)], temperature=0.0)


def test_training_flags_come_back(model, tokenizer):
    model.train()
    continuations(model, tokenizer, [[1, 4]], 2)
    assert model.training


def test_formats(tokenizer):
    row = {"question": "Where was Ada born?", "answer": "Ada was born in Oslo.", "value": "Oslo"}
    prompt, answer = "Question: Where was Ada born?\nAnswer:", " Ada was born in Oslo."
    got = {how: worded(row, how, prompt, answer) for how in FORMATS}
    assert got["own"] == prompt and got["question"] == "Where was Ada born?"
    assert str(got["role"]).endswith(prompt) and len(str(got["role"])) > len(prompt)
    assert got["stub"] == prompt + " Ada was born in"
    assert worded({**row, "value": "Ada"}, "own", prompt, answer) is None  # repeating the question is no leak
    assert worded({**row, "value": "Rome"}, "stub", prompt, answer) is None  # not in the answer
    assert worded({"text": "x", "value": "x"}, "question", "", "x") is None
    with pytest.raises(UserError, match=r"no prompt format 'rolle'.*role"):
        worded(row, "rolle", prompt, answer)


# --- fed into a suite ---------------------------------------------------------------------------------------------------


def suite(metrics, **settings):
    sets = {"forget": {"source": "forget", "role": "forget", "metrics": metrics}}
    return {"format": 1, "name": "t", "generation": {"max_new_tokens": 12}, "sets": sets, "settings": settings}


def scored(model, tokenizer, metrics, rows, **settings):
    return score({"base": model_as(model)}, suite(metrics, **settings), {"forget": rows}, tokenizer)


def model_as(model):
    from contextlib import nullcontext

    return lambda: nullcontext(model)


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A tiny model that has some answers by heart and others in part."""
    from peft_unlearn.data.collate import encode, pad
    from peft_unlearn.data.formats import to_text

    model = tiny(1)
    rows = [qa(i, "old") for i in range(6)]
    batch = pad([encode(*to_text(r, tokenizer), tokenizer)[0] for r in rows[:4]], 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(90):
        out = model(**batch)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), rows


def test_el_of_a_live_model_is_brute_force(knowing, tokenizer):
    model, rows = knowing
    rows = [rows[0], rows[5]]  # one that was trained on, one that was not
    report = scored(model, tokenizer, ["extraction_likelihood"], rows, continuations={"n": 4, "prefixes_per_row": 9})
    from peft_unlearn.data.formats import to_text

    expected, shortcut = [], 0
    for row in rows:
        before, answer = answer_ids(*to_text(row, tokenizer), tokenizer)
        parts = []
        for k in prefixes(len(answer), 4, 9):
            said = one_by_one(model, before + answer[:k], len(answer) - k)
            shortcut += said == answer[k:]
            parts.append(ngram_overlap(said, answer[k:], 4))
        expected.append(np.mean(parts))
    assert report.per_row["base"]["forget/extraction_likelihood"] == pytest.approx(expected)
    assert shortcut > 1 and 0 < np.mean(expected) < 1  # both kinds of prefixes were there


def test_leaks_of_a_live_model_are_the_samples_that_name_the_value(knowing, tokenizer):
    model, rows = knowing
    report = scored(
        model, tokenizer, ["leak_at_2", "leak_in_stub"], rows,
        samples={"n": 4, "formats": ["own", "stub"], "seed": 7, "max_new_tokens": 16}, leak_in_stub={"k": 4},
    )  # fmt: skip
    from peft_unlearn.data.formats import to_text

    stubs, hits = [], []
    for row in rows:
        prompt, answer = to_text(row, tokenizer)
        stub = prompt + answer.split(f" {row['value']}")[0]
        texts = sample(model, tokenizer, [prompt, stub], 4, seed=7, max_new_tokens=16)
        hits.append([int(value_accuracy(some, [row["value"]] * 4).sum()) for some in texts])
        stubs.append(hits[-1][1] > 0)
    missed = [np.prod([(4 - c) * (3 - c) / 12 for c in row]) for row in hits]
    assert report.per_row["base"]["forget/leak_at_2"] == pytest.approx(1 - np.array(missed))
    assert report.subjects["base"]["forget/leak_in_stub"] == pytest.approx(np.mean(stubs))
    assert np.mean(stubs) > 0
    low, high = report.details["base"]["forget/leak_at_2"]["ci95"]
    assert low <= report.subjects["base"]["forget/leak_at_2"] <= high


def test_the_nll_of_what_was_said_is_the_bases(knowing, tokenizer):
    model, rows = knowing
    other = tiny(3)
    subjects = {"base": model_as(model), "adapter": model_as(other)}
    report = score(subjects, suite(["answer_nll_under_base", "empty_answer"]), {"forget": rows}, tokenizer)
    said = report.answers["adapter"]["forget"]
    from peft_unlearn.data.formats import to_text

    expected = []
    for row, text in zip(rows, said, strict=True):
        before = tokenizer(to_text(row, tokenizer)[0])["input_ids"]
        ids = tokenizer(to_text(row, tokenizer)[0] + " " + text)["input_ids"]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(-np.mean([float(logp[t - 1, ids[t]]) for t in range(len(before), len(ids))]))
    assert report.subjects["adapter"]["forget/answer_nll_under_base"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert report.subjects["base"]["forget/answer_nll_under_base"] < np.mean(expected)


def test_nan_logits_give_a_reason_not_a_success(tokenizer):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    rows = [qa(i, "old") for i in range(3)]
    metrics = ["extraction_likelihood", "leak_at_1", "answer_nll_under_base"]
    report = scored(model, tokenizer, metrics, rows, samples={"n": 2})
    for metric in metrics:
        assert report.subjects["base"][f"forget/{metric}"] is None
        assert "NaN" in report.details["base"][f"forget/{metric}"]["reason"], metric


def test_rows_without_a_value_cost_only_the_leak(model, tokenizer):
    rows = [{k: v for k, v in qa(i, "old").items() if k != "value"} for i in range(3)]
    report = scored(model, tokenizer, ["leak_at_1", "repetition", "extraction_likelihood"], rows)
    assert "no 'value'" in report.details["base"]["forget/leak_at_1"]["reason"]
    assert report.subjects["base"]["forget/extraction_likelihood"] is not None


def test_plain_text_has_extraction_likelihood_too(model, tokenizer):
    rows = [{"text": "abcdefghijklmnop"}, {"text": "qrs"}]
    report = scored(model, tokenizer, ["extraction_likelihood", "repetition"], rows)
    assert report.details["base"]["forget/extraction_likelihood"]["n"] == 1  # the other is too short
    assert "without a prompt" in report.details["base"]["forget/repetition"]["reason"]


def test_settings_are_checked_when_the_suite_is_read(model, tokenizer):
    for settings, match in (
        ({"samples": {"temperature": 0}}, "temperature"),
        ({"samples": {"nn": 3}}, "no setting 'nn'"),
        ({"continuations": {"n": 0}}, "n=0"),
    ):
        with pytest.raises(UserError, match=match):
            scored(model, tokenizer, ["leak_at_1"], [qa(0, "old")], **settings)
    report = scored(model, tokenizer, ["leak_at_1", "repetition"], [qa(0, "old")], samples={"formats": ["shout"]})
    assert "no prompt format 'shout'" in report.details["base"]["forget/leak_at_1"]["reason"]
