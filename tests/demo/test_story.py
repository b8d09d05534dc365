"""The demo's tables, page, recipes, and the whole story with few steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_unlearn.data import embedded
from peft_unlearn.demo.people_story import SCRIPT, run
from peft_unlearn.demo.story import Story
from peft_unlearn.errors import UserError
from peft_unlearn.folder.recipe import load_recipe
from peft_unlearn.reporting import pictures
from peft_unlearn.reporting import tables as table
from peft_unlearn.reporting.document import to_html

DASH = "–"
WHOLE_BUNDLE = ("people-demo", "people-simnpo", "people-npo", "people-kl", "people-ga")
RECIPES = sorted(embedded.asset("recipes").glob("people-*.yaml"))


def fake_report() -> dict:
    """A small eval.json, with a null, a missing subject's block and a tiny p."""
    sets = {"forget": (1.0, 0.01, 0.02), "retain": (0.99, 0.98, 1.0), "general": (1.0, 1.0, 1.0)}
    values = {s: {} for s in ("base", "retain_only", "adapter")}
    for name, found in sets.items():
        for subject, value in zip(("base", "adapter", "retain_only"), found, strict=True):
            values[subject][f"{name}/value_accuracy"] = value
            values[subject][f"{name}/probability"] = value / 2
    for subject, p in (("base", 1.5e-15), ("adapter", 0.21), ("retain_only", 1.0)):
        values[subject] |= {"forget/forget_quality": p, "model_utility": 0.7, "forget/rouge_l_recall": 0.5}
    values["adapter"]["general/probability"] = None
    details = {s: {k: {"n": 10, "ci95": None, "reason": None} for k in v} for s, v in values.items()}
    details["adapter"]["general/probability"]["reason"] = "not measurable: <why>"
    return {"format": 1, "suite": "people", "subjects": values, "details": details, "metrics": {}, "versions": {}}


def heads(report: dict) -> list[str]:
    return list(table.of_report(report).head[1:])


def test_columns_stand_base_adapter_retain_model() -> None:
    assert heads(fake_report()) == ["base", "with adapter", "retain model"]
    report = fake_report()
    report["subjects"]["adapter:mine"] = report["subjects"].pop("adapter")
    report["details"]["adapter:mine"] = report["details"].pop("adapter")
    assert heads(report) == ["base", "mine", "retain model"]


def test_terminal_and_markdown_hold_the_same_numbers() -> None:
    report = fake_report()
    text, md = table.report_text(report), table.report_markdown(report)
    wanted = [c for row in table.of_report(report).rows for c in row[1:]]
    assert len(wanted) == 27
    numbers = re.compile(r"\d\.\d+(?:e-\d+)?")
    assert numbers.findall(text) == numbers.findall(md) == [w for w in wanted if w != DASH]
    assert "1.5e-15" in md
    assert md.splitlines()[0] == "| set (rows) | base | with adapter | retain model |"
    assert "| forget (10) | 1.000 | 0.010 | 0.020 |" in md


def test_a_null_is_a_dash_with_its_reason_beneath() -> None:
    text, md = table.report_text(fake_report()), table.report_markdown(fake_report())
    assert f"{DASH} with adapter general probability: not measurable: <why>" in text
    assert "general probability: not measurable: &lt;why&gt;" in md  # as Markdown shows it
    assert "| general (10) | 0.500 | – | 0.500 |" in md


def test_a_missing_retain_model_leaves_no_column_and_is_named() -> None:
    report = fake_report()
    report["subjects"]["retain_only"] = None
    report["details"]["retain_only"] = {"reason": "this model was not given"}
    assert heads(report) == ["base", "with adapter"]
    assert "retain model: this model was not given" in table.report_text(report)


def test_markdown_of_chosen_metrics() -> None:
    md = table.report_markdown(fake_report(), ["value_accuracy"])
    assert "names the right value" in md and "probability of the answer" not in md and "forget quality" in md


def test_methods_are_told_whole_in_columns_that_fit() -> None:
    method = {
        "name": "npo", "kind": "objective", "summary": "[b] brackets stay", "unit": "sequence", "needs": [],
        "source": {"paper": "A paper", "url": "u", "year": 2024}, "params": {"beta": {"default": 0.1}},
    }  # fmt: skip
    text = table.methods_text([method, {**method, "name": "long", "summary": "word " * 60}])
    assert "[b] brackets stay" in text and "beta = 0.1" in text and "A paper (2024)" in text
    assert max(map(len, text.splitlines())) <= 110 and text.count("word") == 60


def test_tables_need_no_torch() -> None:
    code = "import sys, peft_unlearn.reporting.tables, peft_unlearn.demo.story; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


CURVE = [{"step": 20, "forget": 0.3, "retain": 0.9}, {"step": 40, "forget": 0.02, "retain": 0.99, "kept": True}]


def test_page_stands_alone_and_escapes() -> None:
    ends = {"base": {"forget": 1.0, "retain": 1.0}, "retain_only": {"forget": 0.01, "retain": 1.0}}
    png = pictures.story(CURVE, ends)
    assert png.startswith(b"\x89PNG")
    evil = "<script>alert(1)</script> & <img src=x>"
    sample = {"kind": "forgotten", "question": evil, "prompt": evil, "before": evil, "after": evil}
    story = Story(
        title="t", lead="l", seed=0, seconds={}, met={}, checks=[(True, evil), (False, "no")], samples=[sample], curve=[], elsewhere={},
        removal=evil, report=fake_report(), files={}, recipe="base: x # <b>", conditions=["<i>one</i>"], png=png,
    )  # fmt: skip
    assert story.exit_code == 1 and "NO  no" in str(story)
    html = to_html(story.title, story.parts())
    assert "<script" not in html and "<img src=x" not in html and "<b>" not in html and "<i>" not in html
    assert html.count("&lt;script&gt;") == 5
    # Nothing is loaded from anywhere: the only source is the picture inside.
    inside = [v for tag in re.findall(r"<[^>]*>", html) for v in re.findall(r'(?:src|href)="(.{0,22})', tag)]
    assert inside == ["data:image/png;base64,"] and "url(" not in html
    assert "http" not in html.split("base64,")[0] and "<link" not in html and "@import" not in html


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_understood(path: Path, tmp_path: Path) -> None:
    from peft_unlearn.training.recipe import prepare

    recipe = load_recipe(path)
    assert recipe["name"] == path.stem
    assert f"peft-unlearn train adapters/recipes/{path.name} --out" in path.read_text(encoding="utf-8")
    run = prepare(recipe, tmp_path / "out")
    assert len(run.data.forget) == 100
    if path.stem in WHOLE_BUNDLE:
        assert run.config.per_anchor == 2 and len(run.data.retain or []) == 1100
        assert run.data.refs["forget"] == "embedded:people?seed=0"


def test_bundle_beside_other_sets_is_refused() -> None:
    from peft_unlearn.data.load import load_data

    with pytest.raises(UserError, match="bundle names all sets at once"):
        load_data({"bundle": "embedded:people", "forget": "x.jsonl"})


def test_a_published_bundle_of_files_becomes_hashes(tmp_path: Path) -> None:
    from peft_unlearn.folder.recipe import portable_recipe

    recipe = {"data": {"bundle": str(tmp_path), "per_anchor": 2}}
    assert portable_recipe(recipe, "x", {"forget": "1" * 64})["data"] == {
        "per_anchor": 2,
        "forget": "sha256:" + "1" * 64,
    }
    embedded_one = {"data": {"bundle": "embedded:people", "per_anchor": 2}}
    assert portable_recipe(embedded_one, "x", {"forget": "1" * 64}) == embedded_one


def test_child_hides_this_package(tmp_path: Path) -> None:
    from peft_unlearn.demo import child

    site = tmp_path / "site"
    child.link_site(site)
    names = {p.name for p in site.iterdir()}
    assert {"peft", "torch", "transformers"} <= names
    assert not [n for n in names if "peft_unlearn" in n.replace("-", "_") or n.endswith(".pth")]
    code = "import sys; sys.path.append(sys.argv[1])\nimport importlib.util as u\nprint(u.find_spec('peft_unlearn'))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(site)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "None"


def test_control_characters_are_written_out() -> None:
    from peft_unlearn.demo.story import printable

    assert printable("born in\x12\x1b[2J. Zürich") == "born in\\x12\\x1b[2J. Zürich"


def test_demo_refuses_a_stranger_in_the_place_of_its_results(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        run(tmp_path / "file")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").touch()
    with pytest.raises(UserError, match="not an earlier demo's"):
        run(tmp_path)
    assert (tmp_path / "merged" / "mine.txt").exists()


@pytest.mark.slow
def test_the_whole_story_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe(embedded.asset("recipes", SCRIPT.recipe))
    recipe["train"]["max_steps"] = 6
    recipe["eval"] |= {"every": 3, "n": 10}
    out = tmp_path / "demo"
    told = run(out, seed=1, recipe=recipe, n=10)
    shown = capfd.readouterr()
    assert shown.out == "" and "Warning" not in shown.err
    result = told.to_dict()
    json.dumps(result, allow_nan=False)
    assert [c["held"] for c in result["checks"]] == [True, True, True]
    assert result["elsewhere"]["max_logit_difference"] <= 1e-4
    assert result["removal"]["digest"] == result["removal"]["base_digest"]
    assert result["ok"] and told.exit_code == 0 and not (out / "adapter.work").exists()
    assert [s["kind"] for s in result["samples"]] == ["forgotten", "retained", "general knowledge"]
    assert [c["step"] for c in result["curve"]] == [3, 6]
    assert (out / "merged" / "model.safetensors").is_file() and (out / "picture.png").is_file()
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Removed default" in html and str(tmp_path) not in html
    again = run(out, seed=2, recipe=recipe, n=10)
    assert "retain model" in str(again) and str(out / "report.html") in str(again)
    assert (out / "report.html").read_text(encoding="utf-8") != html
    committed = json.loads((Path(__file__).parents[2] / "docs" / "demo.json").read_text(encoding="utf-8"))
    assert set(result) == set(committed)
