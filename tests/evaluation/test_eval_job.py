"""`peft-unlearn eval`: other data, a retain model of one's own, files that are written, open-unlearning's layout."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "folder"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
import yaml

import peft_unlearn
from peft_unlearn import cli
from peft_unlearn.analysis import evidence as report_job
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.data.embedded import rows
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation import open_unlearning
from peft_unlearn.evaluation.score import score
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.stack.model import ForgetModel


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")


def qa(kind: str, n: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"{kind} {i}?", "answer": f"{kind} wrote {i}", "paraphrased_answer": f"it is {i}",
            "perturbed_answer": [f"it is {i + 1}", f"it is {i + 2}"],
        }
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another model beside it, a bundle, an adapter trained on it, and a small TOFU."""
    where = tmp_path_factory.mktemp("judged")
    for name in ("base", "twin"):
        import torch

        torch.manual_seed(len(name))
        tiny.llama().save_pretrained(where / name)
        tiny.tokenizer().save_pretrained(where / name)
    for name in ("data", "tofu"):
        (where / name).mkdir()
    write_rows(where / "data" / "forget.jsonl", tiny.rows(6, "f", 1))
    write_rows(where / "data" / "retain.jsonl", tiny.rows(5, "r", 2))
    for name, kind in (
        ("forget10", "a"), ("forget10_perturbed", "a"), ("retain90", "b"), ("retain_perturbed", "b"), ("holdout10", "c"),
        ("real_authors_perturbed", "d"), ("world_facts_perturbed", "e"),
    ):  # fmt: skip
        write_rows(where / "tofu" / f"{name}.jsonl", qa(kind, 4))
    recipe = {
        "name": "test", "base": str(where / "base"), "data": {"bundle": str(where / "data")},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]},
        "terms": {"forget": {"npo": {}}, "retain": {"nll": {}}},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True, "save_strategy": "no"},
    }  # fmt: skip
    (where / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(where)
        m.setattr(sys, "argv", ["peft-unlearn", "train", "recipe.yaml", "--out", "adapter"])
        try:
            cli.main()
        except SystemExit as e:
            assert not e.code
    return where


@pytest.fixture
def here(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "all")
    return tmp_path / "all"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peft-unlearn", *argv])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        got = capsys.readouterr()
        return code, got.out, got.err

    return call


def test_another_forget_set_is_judged_only_where_suite_and_data_are_named(here: Path, run: Any) -> None:
    common = ("eval", str(here / "adapter"), "--base", str(here / "base"), "--data", str(here / "tofu"), "--json")
    code, out, err = run(*common)
    assert code == 2 and not out and "sha256" in err
    with pytest.warns(UserWarning, match="not the forget set of adapter"):
        code, out, err = run(*common, "--suite", "tofu")
    report = json.loads(out)
    assert code == 0 and report["data_matches_manifest"] is False and report["suite"] == "tofu"
    assert report["subjects"]["retain_only"] is None and report["subjects"]["adapter"]["forget/forget_quality"] is None
    assert "no retain model" in report["details"]["adapter"]["forget/forget_quality"]["reason"]
    assert report["subjects"]["adapter"]["forget/mia_loss"] is not None
    assert not (here / "adapter" / "eval.json").exists()  # the adapter's own numbers are not these


def test_on_its_own_set_nothing_is_foreign_and_the_numbers_are_stored(here: Path, run: Any) -> None:
    code, out, err = run(
        "eval", str(here / "adapter"), "--base", str(here / "base"), "--data", str(here / "data"), "--suite", "people",
        "--retain-only", str(here / "twin"), "--out", str(here / "copy" / "numbers.json"), "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and report["data_matches_manifest"] is True, err
    assert report["subjects"]["retain_only"]["forget/probability"] is not None
    stored = json.loads((here / "adapter" / "eval.json").read_text())
    assert (
        stored["subjects"] == report["subjects"] and json.loads((here / "copy" / "numbers.json").read_text()) == report
    )


def test_the_retain_model_may_be_an_adapter(here: Path) -> None:
    with pytest.warns(UserWarning, match="not the forget set"):
        report = peft_unlearn.evaluate(
            [here / "adapter"],
            base=str(here / "base"),
            data=str(here / "tofu"),
            suite="tofu",
            retain_model=str(here / "adapter"),
        )
    own = report.subjects
    assert (
        own["retain_only"]["forget/probability"]
        == own["adapter"]["forget/probability"]
        != own["base"]["forget/probability"]
    )
    assert own["adapter"]["forget/ks_distance"] == 0 and own["adapter"]["forget/privleak"] == 0
    assert "one and the same" in report.details["adapter"]["forget/mia_reference"]["reason"]


def test_tasks_of_lm_eval_are_run_first_and_stand_beside_the_suite(here: Path, monkeypatch: Any) -> None:
    from peft_unlearn.evaluation import lm_eval

    args: dict[str, Any] = {"base": str(here / "base"), "data": str(here / "data"), "suite": "people"}
    seen: dict[str, Any] = {}

    def run_tasks(subjects: Any, tokenizer: Any, tasks: Any, **more: Any) -> dict[str, Any]:
        seen.update(subjects=list(subjects), tasks=tasks, **more)
        return {"tasks": tasks, "subjects": {"base": {"t": {"acc": 0.5}}}}

    monkeypatch.setattr(lm_eval, "run_tasks", run_tasks)
    report = peft_unlearn.evaluate([here / "adapter"], tasks=["t"], n=2, **args)
    assert report.lm_eval["tasks"] == ["t"] and report.subjects["base"]["forget/probability"] is not None
    assert seen["subjects"] == ["base", "adapter", "retain_only"] and seen["limit"] == 2

    def unknown(*_: Any, **__: Any) -> dict[str, Any]:
        raise UserError("lm-eval has no task 't'")

    monkeypatch.setattr(lm_eval, "run_tasks", unknown)
    # an attribute of the module, which the function of the same name hides in the package
    monkeypatch.setitem(
        peft_unlearn.evaluate.__globals__, "score", lambda *_, **__: pytest.fail("scored before the tasks")
    )
    with pytest.raises(UserError, match="no task"):
        peft_unlearn.evaluate([here / "adapter"], tasks=["t"], n=2, **args)


def test_a_suite_that_measures_nothing_is_refused_and_replaces_no_numbers(here: Path) -> None:
    (here / "adapter" / "eval.json").write_text('{"format": 1, "subjects": {}, "kept": 1}', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"suite muse: nothing can be measured on these data: the data has no set .*--suite"
    ):
        peft_unlearn.evaluate([here / "adapter"], base=str(here / "base"), data=str(here / "data"), suite="muse")
    assert json.loads((here / "adapter" / "eval.json").read_text())["kept"] == 1


def test_what_is_no_retain_model(here: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    args: dict[str, Any] = {"base": str(here / "base"), "data": str(here / "data"), "suite": "people"}
    with pytest.raises(UserError, match=r"--retain-model: .*nowhere"):
        peft_unlearn.evaluate([here / "adapter"], retain_model=str(tmp_path / "nowhere"), **args)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    other.save_pretrained(here / "twin")
    with pytest.raises(UserError, match="its tokenizer is not the base's"):
        peft_unlearn.evaluate([here / "adapter"], retain_model=str(here / "twin"), **args)


def test_the_layout_of_open_unlearning(here: Path, run: Any) -> None:
    common = (
        "eval",
        str(here / "adapter"),
        "--base",
        str(here / "base"),
        "--data",
        str(here / "tofu"),
        "--suite",
        "tofu",
    )
    code, _, err = run(*common, "--layout", "open-unlearning", "--out", "x.json")
    assert code == 2 and "name a folder" in err
    code, _, err = run(*common, "--layout", "openunlearning", "--out", "x")
    assert code == 2 and "Did you mean 'open-unlearning'" in err
    with pytest.warns(UserWarning):
        code, out, _ = run(
            *common,
            "--layout",
            "open-unlearning",
            "--out",
            str(here / "ou"),
            "--retain-only",
            str(here / "twin"),
            "--json",
        )
    report = json.loads(out)
    assert sorted(p.name for p in (here / "ou").iterdir()) == ["adapter", "base", "retain_only"]
    found = json.loads((here / "ou" / "adapter" / "TOFU_EVAL.json").read_text())
    summary = json.loads((here / "ou" / "adapter" / "TOFU_SUMMARY.json").read_text())
    values = report["subjects"]["adapter"]
    for theirs, ours in {
        "forget_Q_A_Prob": "forget/probability", "forget_Q_A_PARA_Prob": "forget/paraphrase_probability",
        "forget_Q_A_ROUGE": "forget/rouge_l_recall", "forget_truth_ratio": "forget/truth_ratio",
        "forget_quality": "forget/forget_quality", "extraction_strength": "forget/extraction_strength",
        "exact_memorization": "forget/exact_memorization", "privleak": "forget/privleak", "mia_min_k": "forget/mia_min_k",
        "retain_Q_A_Prob": "retain/probability", "retain_Truth_Ratio": "retain/truth_ratio",
        "ra_Q_A_Prob_normalised": "real_authors/probability_among_choices", "wf_Q_A_ROUGE": "world_facts/rouge_l_recall",
        "model_utility": "model_utility",
    }.items():  # fmt: skip
        assert found[theirs]["agg_value"] == values[ours], theirs
        assert summary.get(theirs) == values[ours]
    assert None not in summary.values() and "wrote" not in json.dumps(found)
    rows = found["forget_Q_A_Prob"]["value_by_index"]
    assert list(rows) == ["0", "1", "2", "3"]
    assert np.mean([r["prob"] for r in rows.values()]) == pytest.approx(found["forget_Q_A_Prob"]["agg_value"])
    assert all(math.exp(-r["avg_loss"]) == pytest.approx(r["prob"]) for r in rows.values())
    # their truth ratio of a row is wrong / right; what it is worth on the forget set is the value nearer to 1
    ratio = [r["score"] for r in found["forget_truth_ratio"]["value_by_index"].values()]
    assert np.mean([min(x, 1 / x) for x in ratio]) == pytest.approx(found["forget_truth_ratio"]["agg_value"])
    kept = [r["score"] for r in found["retain_Truth_Ratio"]["value_by_index"].values()]
    assert np.mean([max(0, 1 - x) for x in kept]) == pytest.approx(found["retain_Truth_Ratio"]["agg_value"])


def test_one_model_alone_is_written_without_a_folder_and_nulls_have_reasons(
    tmp_path: Path, tokenizer: Any, data: Any
) -> None:
    from contextlib import nullcontext

    from eval_helpers import tiny as tiny_model

    report = score({"base": lambda: nullcontext(tiny_model())}, "people", data, tokenizer)
    files = open_unlearning.save(report, tmp_path / "out")
    assert [f.name for f in files] == ["PEOPLE_EVAL.json", "PEOPLE_SUMMARY.json"] and files[
        0
    ].parent == tmp_path / "out"
    found, summary = (json.loads(f.read_text()) for f in files)
    assert found["forget_quality"]["agg_value"] is None and "no retain model" in found["forget_quality"]["reason"]
    assert "forget_quality" not in summary and "forget/value_accuracy" in summary
    assert open_unlearning.name_of("retain/extraction_strength") == "retain_extraction_strength"


def test_the_data_trained_on_stand_in_the_recipe_and_a_dependent_adapter_is_judged_with_what_lies_below(
    tmp_path, monkeypatch
):
    """--data replaces the recipe's data in what is saved too; an adapter on top of another is scored with both on."""
    people = rows("embedded:people")
    files = tmp_path / "files"
    files.mkdir()
    for name, part in (("forget", people["forget"][:6]), ("retain", people["retain"][:12])):
        (files / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "adapters/recipes/people-npo.yaml")
    recipe["train"] |= {"max_steps": 2, "per_device_train_batch_size": 2}
    recipe.pop("eval")
    first = peft_unlearn.train(recipe, tmp_path / "first", data=str(files))
    saved = yaml.safe_load((tmp_path / "first/recipe.yaml").read_text())["data"]
    assert saved["forget"] == f"sha256:{first.manifest.data['forget']['sha256']}" and "bundle" not in saved
    assert saved["per_anchor"] == recipe["data"]["per_anchor"]
    second = peft_unlearn.train(
        {**recipe, "stack": [str(tmp_path / "first")], "seed": 1}, tmp_path / "second", data=str(files)
    )
    assert second.manifest.depends_on == [first.adapter_id]
    with pytest.raises(UserError, match="trained on top of"):
        peft_unlearn.evaluate([tmp_path / "second"], data=str(files), n=2)
    report = peft_unlearn.evaluate([tmp_path / "second"], data=str(files), n=4, below=[tmp_path / "first"])
    both = ForgetModel.from_pretrained(None, [tmp_path / "first", tmp_path / "second"])
    wanted = score(
        {"both": lambda: nullcontext(both.model)}, "people", ForgetRetain.load(str(files)), both.tokenizer, n=4
    )
    assert report.subjects["adapter"]["forget/probability"] == pytest.approx(
        wanted.subjects["both"]["forget/probability"], rel=1e-6
    )
    with pytest.raises(UserError, match="leave it out of --below"):
        peft_unlearn.evaluate([tmp_path / "first"], data=str(files), n=2, below=[tmp_path / "second"])
    asked: dict[str, Any] = {}
    real = report_job.on_one_model
    monkeypatch.setattr(report_job, "on_one_model", lambda model, names: asked.update(names) or real(model, names))
    folders = {name: read_adapter(tmp_path / name) for name in ("first", "second")}
    report_job.sample_table(folders, None, str(files), None)
    assert asked == {"first": ["first"], "second": ["first", "second"]}
