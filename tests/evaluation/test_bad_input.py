"""What can be wrong with rows, tokenizers and models: null with its reason or a message, the other numbers still there."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from eval_helpers import qa, tiny

from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import plan as plan_module
from peft_unlearn.evaluation import suites
from peft_unlearn.evaluation.measured import Ragged
from peft_unlearn.evaluation.metrics.extraction import exact_memorization, extraction_strength
from peft_unlearn.evaluation.numbers import numbers_of
from peft_unlearn.evaluation.plan import make_plan, measure
from peft_unlearn.evaluation.score import score


@pytest.fixture
def tofu() -> dict[str, list[dict[str, Any]]]:
    names = {
        "forget": "old",
        "retain_perturbed": "kept",
        "real_authors": "real",
        "world_facts": "world",
        "holdout": "no",
    }
    return {name: [qa(i, kind) for i in range(4)] for name, kind in names.items()}


def run(tofu: Any, tokenizer: Any, **models: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    subjects = {name: (lambda m=m: nullcontext(m)) for name, m in (models or {"base": tiny()}).items()}
    spec = {**_tofu(), "generation": {"max_new_tokens": 8}}
    report = json.loads(json.dumps(score(subjects, spec, tofu, tokenizer).to_dict(), allow_nan=False))
    name = list(models or {"base": 0})[-1]
    for subject, values in report["subjects"].items():
        for key, value in (values or {}).items():
            assert (value is None) == bool(report["details"][subject][key]["reason"]), key
    return report["subjects"][name], report["details"][name]


def _tofu() -> dict[str, Any]:
    from importlib.resources import files

    import yaml

    return yaml.safe_load((files(suites.__name__) / "tofu.yaml").read_text(encoding="utf-8"))


def test_everything_there_is_a_number(tofu: Any, tokenizer: Any) -> None:
    values, details = run(tofu, tokenizer, base=tiny(), retain_only=tiny(1), adapter=tiny(2))
    lost = {k: details[k]["reason"] for k, v in values.items() if v is None}
    assert set(lost) <= {"utility_score", "overall_score"}, lost  # a random base has no utility to compare with
    assert details["forget/privleak"]["n"] == 8 and details["forget/mia_loss"]["ci95"] is not None


def test_without_a_reference_what_needs_one_is_null_and_the_rest_is_there(tofu: Any, tokenizer: Any) -> None:
    values, details = run(tofu, tokenizer)
    lost = {k for k, v in values.items() if v is None}
    wants = {"forget_quality", "forget_quality_log10_p", "ks_distance", "mia_reference", "privleak", "mia_rel_diff"}
    assert {f"forget/{m}" for m in wants} | {"priv_score", "overall_score"} <= lost
    assert all("retain model" in details[k]["reason"] for k in lost if k != "utility_score")
    assert values["forget/mia_min_k"] is not None and values["model_utility"] is not None


def test_rows_without_a_needed_field(tofu: Any, tokenizer: Any) -> None:
    tofu["forget"][2].pop("perturbed_answer")
    values, details = run(tofu, tokenizer)
    assert details["forget/truth_ratio"]["reason"] == "1 of 4 rows have no 'perturbed_answer'"
    assert "forget/paraphrase_probability" in details["mem_score"]["reason"]
    assert values["forget/extraction_strength"] is not None and values["retain/truth_ratio"] is not None


def test_a_row_that_is_no_layout_is_named() -> None:
    with pytest.raises(UserError, match=r"row 1 has fields 'question'; wanted one of"):
        ForgetRetain([{"question": "a", "answer": "b"}, {"question": "c"}])


def test_a_missing_set_is_a_reason(tofu: Any, tokenizer: Any) -> None:
    values, details = run({k: v for k, v in tofu.items() if k not in ("holdout", "world_facts")}, tokenizer)
    assert (
        details["forget/mia_loss"]["reason"]
        == "there are no holdout rows to compare with: the data has no set 'holdout'"
    )
    assert details["world_facts/truth_ratio"]["reason"] == "the data has no set 'world_facts'"
    assert "world_facts/probability_among_choices" in details["model_utility"]["reason"]
    assert values["forget/extraction_strength"] is not None and values["real_authors/truth_ratio"] is not None


def test_empty_generations_are_zero_overlap_not_an_error(tofu: Any, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan_module, "greedy", lambda m, t, prompts, **kw: ["" for _ in prompts])
    values, _ = run(tofu, tokenizer)
    assert values["forget/rouge_l_recall"] == 0.0 and values["model_utility"] == 0.0


def test_a_tokenizer_without_end_of_sequence(tofu: Any, tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>")
    assert bare.eos_token_id is None and bare.pad_token_id is None
    model = tiny()
    model.generation_config.eos_token_id = None
    values, _ = run(tofu, bare, base=model)
    assert values["forget/probability"] is not None and values["forget/rouge_l_recall"] is not None
    plan = make_plan(suites.load(_tofu()), tofu, bare)
    last = plan.encoded[0]["labels"][-1]
    assert last == bare(tofu["forget"][0]["answer"])["input_ids"][-1]  # nothing is left out at the end
    assert len(plan.encoded[0]["labels"]) == len(bare("".join(plan.pairs[0]))["input_ids"])


def merging() -> Any:
    """A tokenizer that merges the colon before the boundary with the space after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{c: i + 3 for i, c in enumerate(alphabet)}}
    space = next(c for c in alphabet if c == "\u0120")
    vocab[f":{space}"] = 258  # the last id of the tiny model's 259
    vocab.pop(alphabet[-1])
    vocab = {t: i for t, i in vocab.items() if i != 258 or t == f":{space}"}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[(":", space)]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def test_a_token_across_the_boundary_belongs_to_the_answer(tofu: Any) -> None:
    tok = merging()
    plan = make_plan(suites.load(_tofu()), tofu, tok)
    row = plan.encoded[0]
    first = next(i for i, label in enumerate(row["labels"]) if label != -100)
    assert row["input_ids"][first] == 258 and tok.decode([258]) == ": "
    values, _ = run(tofu, tok)
    assert values["forget/extraction_strength"] is not None and values["forget/rouge_l_recall"] is not None


def test_infinite_and_nan_logits(tofu: Any, tokenizer: Any) -> None:
    import torch

    broken = tiny(4)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    values, details = run(tofu, tokenizer, base=tiny(), retain_only=tiny(1), adapter=broken)
    assert all(v is None for v in values.values())
    assert "not finite" in details["forget/mia_min_k"]["reason"] or "logits" in details["forget/mia_min_k"]["reason"]
    # the retain model is the one that is broken: only what is relative to it is lost
    values, details = run(tofu, tokenizer, base=tiny(), retain_only=broken, adapter=tiny(2))
    assert values["forget/mia_min_k"] is not None and values["forget/truth_ratio"] is not None
    assert (
        values["forget/privleak"] is None and values["forget/forget_quality"] is None and values["priv_score"] is None
    )
    assert "of the retain model" in details["priv_score"]["reason"]


def test_a_reference_that_was_read_on_other_rows_is_not_compared_with(tofu: Any, tokenizer: Any) -> None:
    suite = suites.load({**_tofu(), "generation": {"max_new_tokens": 4}})
    plan = make_plan(suite, tofu, tokenizer)
    fewer = measure(tiny(1), make_plan(suite, tofu, tokenizer, n=3))
    found = numbers_of(plan, measure(tiny(), plan), fewer)
    for key in ("forget/forget_quality", "forget/privleak", "forget/mia_reference"):
        assert found[key].value is None and "other rows" in (found[key].reason or ""), key
    assert found["forget/mia_loss"].value is not None


def test_extraction_strength_at_its_ends_and_never_above_memorization() -> None:
    """methods.md 4.7: by heart is 1, a last token that never comes is 0, and a right suffix is part of all that is right."""
    assert extraction_strength(Ragged.of([[1, 1, 1]])).tolist() == [1.0]
    assert extraction_strength(Ragged.of([[1, 1, 0]])).tolist() == [0.0]
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 2, rng.integers(1, 12)).astype(float) for _ in range(300)]
    es, em = extraction_strength(Ragged.of(rows)), exact_memorization(Ragged.of(rows))
    assert np.all(es <= em + 1e-12) and np.all(es <= 1)
    for row, strength, share in zip(rows, es, em, strict=True):
        longest = next(k for k in range(len(row) + 1) if all(row[k:] == 1))
        assert strength == pytest.approx(1 - longest / len(row)) and share == pytest.approx(sum(row) / len(row))
