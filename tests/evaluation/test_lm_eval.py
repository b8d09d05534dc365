"""lm-eval's own loop on our models: one loaded model, adapters switched, local tasks only."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from eval_helpers import tiny
from peft import LoraConfig, get_peft_model

from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import lm_eval as ours
from peft_unlearn.evaluation.score import on_one_model

QUESTIONS = [
    {"q": "What color is the sky on a clear day?", "choices": ["green", "blue", "red"], "gold": 1},
    {"q": "How many legs has a spider?", "choices": ["six", "four", "eight"], "gold": 2},
    {"q": "Which animal barks?", "choices": ["dog", "cat", "hen"], "gold": 0},
    {"q": "Which one flies?", "choices": ["stone", "wren", "sofa"], "gold": 1},
]
TASK = """
task: our_local_task
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra: pip install 'peft-unlearn[eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(q) for q in QUESTIONS), encoding="utf-8")
    path = tmp_path / "our_task.yaml"
    path.write_text(TASK.format(file=questions), encoding="utf-8")
    return path


def adapted():
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p))
    return model


def right(model, tokenizer) -> list[bool]:
    """Summed log-probability of blank + option after the question, the definition of lm-eval's acc."""
    out = []
    for q in QUESTIONS:
        scores = []
        before = tokenizer(q["q"])["input_ids"]
        for choice in q["choices"]:
            ids = before + tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[t - 1, ids[t]]) for t in range(len(before), len(ids))))
        out.append(max(range(3), key=scores.__getitem__) == q["gold"])
    return out


@pytest.mark.slow  # lm-eval takes some seconds to import
def test_a_local_task_on_base_and_adapter(task, tokenizer, capsys):
    model = adapted().train()
    subjects = {**on_one_model(model, {"base": None, "adapter": "default"}), "retain_only": None}
    block = ours.run_tasks(subjects, tokenizer, [str(task)])
    assert capsys.readouterr().out == ""  # stdout is for our JSON
    json.dumps(block, allow_nan=False)
    model.eval()
    for subject in ("base", "adapter"):
        with subjects[subject]() as live:
            expected = right(live, tokenizer)
        assert block["subjects"][subject]["our_local_task"]["acc"] == pytest.approx(sum(expected) / 4), subject
        assert block["details"][subject]["our_local_task"]["n"] == 4
    assert block["subjects"]["retain_only"] is None
    assert block["better"] == {"our_local_task": {"acc": "higher"}}
    some = ours.run_tasks({"base": subjects["base"]}, tokenizer, [str(task)], limit=3)
    details = some["details"]["base"]["our_local_task"]
    assert (details["n"], details["n_total"]) == (3, 4)


@pytest.mark.slow
def test_flags_are_as_before_afterwards(task, tokenizer):
    model = adapted().train()
    trainable = [p.requires_grad for p in model.parameters()]
    ours.run_tasks(on_one_model(model, {"base": None}), tokenizer, [str(task)])
    assert model.training and model.active_adapter == "default"
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.slow
def test_a_task_that_cannot_run_says_why(task, tokenizer):
    task.write_text(task.read_text(encoding="utf-8").replace("questions.jsonl", "gone.jsonl"), encoding="utf-8")
    with pytest.raises(UserError, match=r"could not run our_local_task.*gone.jsonl"):
        ours.run_tasks({"base": lambda: nullcontext(tiny())}, tokenizer, [str(task)])


def test_bad_task_names(task, tokenizer, tmp_path):
    subjects = {"base": lambda: nullcontext(tiny())}
    with pytest.raises(UserError, match="no task file"):
        ours.run_tasks(subjects, tokenizer, [str(tmp_path / "nowhere.yaml")])
    with pytest.raises(UserError, match="no task is named"):
        ours.run_tasks(subjects, tokenizer, [])
    with pytest.raises(UserError, match="no model to evaluate"):
        ours.run_tasks({"base": None}, tokenizer, [str(task)])
    (tmp_path / "unnamed.yaml").write_text("output_type: multiple_choice\n", encoding="utf-8")
    with pytest.raises(UserError, match="names no task"):
        ours.run_tasks(subjects, tokenizer, [str(tmp_path / "unnamed.yaml")])


def test_a_task_file_is_not_run_to_learn_its_name(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("task: mine\nprocess_docs: !function utils.boom\n", encoding="utf-8")
    assert ours._named([str(path)]) == (["mine"], [str(tmp_path.resolve())])
    path.write_text("task: mine\nx: !!python/object/apply:os.abort []\n", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        ours._named([str(path)])


def test_without_the_package_the_extra_is_named(monkeypatch, tokenizer):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'peft-unlearn\[eval\]'"):
        ours.run_tasks({"base": lambda: nullcontext(tiny())}, tokenizer, ["anything"])


def test_numbers_of_lm_eval_become_numbers_or_null():
    result = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "odd,none": float("nan"), "name": "a"},
            "b": {"em,strict": 0.1, "em,loose": 0.2, "em_stderr,strict": 0.01},
            "group": {"alias": "group"},
        },
        "n-samples": {"a": {"original": 9, "effective": 3}},
        "higher_is_better": {"a": {"acc": True, "odd": None}, "b": {"em": False}},
    }
    values, details, better = ours._read(result)
    assert values == {"a": {"acc": 0.5, "odd": None}, "b": {"em,strict": 0.1, "em,loose": 0.2}}
    assert details["a"]["stderr"] == {"acc": None} and details["a"]["n"] == 3 and "odd" in details["a"]["reason"]
    assert details["b"]["stderr"] == {"em,strict": 0.01} and details["b"]["n"] is None
    assert better == {"a": {"acc": "higher"}, "b": {"em": "lower"}}
