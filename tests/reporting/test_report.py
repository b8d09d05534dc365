"""The report: true to its numbers, whole where things are missing, harmless whatever the rows hold, and drawn by a real browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import make

from peft_unlearn.analysis.evidence import evidence_of, report
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.reporting import document as doc
from peft_unlearn.reporting.page import parts
from peft_unlearn.reporting.text import plain
from peft_unlearn.reporting.verdict import Evidence, attack_bars, missing, verdict

EVIL = "<script>alert(1)</script><img src=http://evil.example/x.png> | *bold* `code` [a](http://evil.example)"


def subject(forget: float, retain: float, utility: float | None, p: float | None) -> dict[str, Any]:
    return {
        "forget/extraction_strength": forget, "forget/value_accuracy": forget, "retain/extraction_strength": retain,
        "forget/forget_quality": p, "forget/ks_distance": None if p is None else 0.2, "model_utility": utility,
    }  # fmt: skip


def measured(value: float | None) -> dict[str, Any]:
    ci = None if value is None else [value - 0.02, value + 0.02]
    return {"n": 100, "ci95": ci, "reason": None if value is not None else "why"}


def evaluation() -> dict[str, Any]:
    subjects = {
        "base": subject(1.0, 1.0, 0.69, 1e-20),
        "adapter": subject(0.31, 0.97, 0.66, 0.2),
        "retain_only": subject(0.3, 1.0, 0.69, 1.0),
    }
    details = {s: {k: measured(v) for k, v in found.items()} for s, found in subjects.items()}
    recovered = {"value": 0.62, "ci95": [0.5, 0.7], "reason": None}
    control = {"value": 0.11, "ci95": [0.02, 0.2], "reason": None}
    nothing = {"value": None, "ci95": None, "reason": "too small a gap"}

    def one(name, adapter, retain_model):
        return {
            "attack": name, "settings": {}, "n": 80,
            "subjects": {s: {"before": {"value_accuracy": 0.0}, "after": {"value_accuracy": 0.5}} for s in subjects},
            "recovery": {"adapter": {"value_accuracy": adapter}, "retain_only": {"value_accuracy": retain_model}},
        }  # fmt: skip

    def point(scale, forget, retain):
        levels = {"forget": forget, "retain": retain}
        return {"scale": scale, **{s: {"value": v, **measured(v)} for s, v in levels.items()}}

    curve = [point(0.0, 1.0, 1.0), point(0.5, 0.6, 0.99), point(0.9, 0.35, 0.955), point(1.0, 0.31, 0.94)]
    return {
        "format": 1, "suite": "people", "subjects": subjects, "details": details, "versions": {"torch": "2.13"}, "adapter_id": "sha256:x",
        "attacks": {"scale": {"adapter": 1.0}, "attacks": {
            "relearn": one("relearn", recovered, control), "quantize:int4": one("quantize", {"value": 0.02, "ci95": None}, nothing),
            "strip": one("strip", {"value": 1.0, "ci95": None}, nothing)}},
        "calibration": {"metric": "extraction_strength", "floor": 0.95, "wanted": 0.95, "scale": 0.9, "chosen": curve[2], "curve": curve,
            "n": {"forget": 100, "retain": 900}, "monotone": True, "how": "bisection", "reason": None, "retain_only": None},
    }  # fmt: skip


def evidence(**more: Any) -> Evidence:
    settings: dict[str, Any] = {
        "name": "mine", "folder": "mine", "base": "embedded:people", "evaluation": evaluation(), "seed": 0,
        "about": [("method", EVIL)], "recipe": "terms: {}\n",
    }  # fmt: skip
    return Evidence(**{**settings, **more})


# -- the verdict ------------------------------------------------------------------------------------------------------


def test_the_verdict_says_conditions_first_and_then_what_the_numbers_say():
    text = verdict(evidence(), {"p": [0.5, 0.7]})
    order = [
        "suite people: 100 forget and 100 retain rows", "scale 1", "it forgets.", "1.000 to 0.310 [0.290, 0.330]",
        "never saw that set has 0.300", "keeps the retain set", "97 % of the base's", "0.690 to 0.660",
        "cannot be told from", "0.500 to 0.700", "relearn brings back most: 62 % [50 %, 70 %]", "11 %", "take the adapter off",
    ]  # fmt: skip
    places = [text.index(x) for x in order]
    assert places == sorted(places)
    assert "strip" not in text  # taking the adapter off brings everything back by design


@pytest.mark.parametrize(
    ("forget", "retain", "words"),
    [(0.35, 0.96, ("it forgets.", "It keeps the retain set")), (0.6, 0.9, ("in part", "keeps most of")), (0.9, 0.5, ("hardly", "damages")),
     (0.0, 1.0, ("less than such a model has",))],
)  # fmt: skip
def test_the_words_follow_the_numbers(forget, retain, words):
    e = evidence()
    e.evaluation["subjects"]["adapter"] = subject(forget, retain, None, 0.001)
    text = verdict(e)
    assert all(w in text for w in words) and "can be told from" in text and "model utility" not in text


def test_nothing_is_claimed_of_what_was_not_measured():
    bare = Evidence("mine", "mine")
    assert "nothing can be said" in verdict(bare)
    commands = " ".join(missing(bare))
    assert all(f"peft-unlearn {c} mine" in commands for c in ("eval", "attack", "calibrate"))
    e = evidence()
    for block in ("attacks", "calibration"):
        del e.evaluation[block]
    e.evaluation["subjects"]["retain_only"] = None
    text = verdict(e)
    assert (
        "never saw" not in text and "brings back" not in text and "it forgets in part" in text
    )  # 0.31 of 1, and no end to the scale
    assert "No retain model was measured" in " ".join(missing(e))


def test_zero_of_n_is_no_proof_of_never():
    e = evidence()
    e.evaluation["subjects"]["adapter"]["forget/value_accuracy"] = 0.0
    assert "0 % (0 of 100, so at most 3 %)" in verdict(e)


def test_numbers_of_another_scale_are_no_numbers_of_this_one():
    e = evidence(scale=0.9)
    e.evaluation["scale"] = 1.0
    assert verdict(e).startswith("These numbers were taken at scale 1; the adapter now has scale 0.9.")
    assert "attacks were run at scale 1" in " ".join(missing(e))


def test_bars_are_of_the_measure_that_could_be_recovered():
    bars, measure = attack_bars(evidence())
    assert measure == "value_accuracy" and bars[0]["adapter"] == (0.62, 0.5, 0.7) and bars[1]["retain_only"] is None
    assert attack_bars(Evidence("x", "x")) == ([], "")


# -- the document -----------------------------------------------------------------------------------------------------


def answers() -> doc.Table:
    return doc.Table(
        ["", "question", "right answer", "base", "with adapter"],
        [["to be kept", EVIL, EVIL, EVIL, EVIL]],
        words=True,
    )


def outside(html: str) -> list[str]:
    """What a browser would fetch: any address in an attribute or a style sheet that is not inside the page."""
    tags = re.findall(r"<[a-zA-Z!/][^>]*>", html)
    found = [
        v
        for tag in tags
        for v in re.findall(r"(?:src|href|srcset|action|data|poster|background)\s*=\s*[\"']?([^\"'\s>]*)", tag)
    ]
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    return [v for v in found if not v.startswith("data:")] + re.findall(r"@import|url\(", style)


def test_the_page_loads_nothing_and_shows_markup_as_text():
    html = doc.to_html(EVIL, parts([evidence(name=EVIL)], answers()))
    assert outside(html) == []
    assert "<script" not in html and "&lt;script&gt;" in html and "<img src=http" not in html
    assert set(re.findall(r"<(\w+)", html)) <= {
        "doctype", "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ul", "li", "img", "div",
        "table", "thead", "tbody", "tr", "th", "td", "pre", "small",
    }  # fmt: skip


def test_markdown_shows_markup_as_text_and_keeps_its_columns():
    text, pictures = doc.to_markdown("T", parts([evidence()], answers()), "report")
    assert "<script" not in re.sub(r"^(`{3,})$.*?^\1$", "", text, flags=re.S | re.M)  # code fences show what they hold
    assert set(pictures) == {
        "report-plane.png",
        "report-attacks-mine.png",
        "report-calibration-mine.png",
    }
    rows = [line for line in text.splitlines() if line.startswith("| to be kept")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 6 and "[a](" not in rows[0]
    assert doc.to_markdown("T", [doc.Lines("a\n```\nb")], "x")[0].count("````") == 2  # its own fence is longer


@pytest.mark.parametrize("drop", [("subjects",), ("details", "calibration"), ("attacks", "versions", "suite")])
def test_any_part_may_be_missing(drop):
    found = {k: v for k, v in evaluation().items() if k not in drop}
    html = doc.to_html("t", parts([evidence(evaluation=found), Evidence("bare", "bare")]))
    assert "no evaluation is stored" in html and ("What brings it back" in html) == ("attacks" not in drop)


def test_nulls_are_dashes_with_their_reason():
    found = evaluation()
    found["subjects"]["adapter"]["forget/forget_quality"] = None
    found["details"]["adapter"]["forget/forget_quality"] = {
        "n": 100,
        "ci95": None,
        "reason": "there is no retain model",
    }
    html = doc.to_html("t", parts([evidence(evaluation=found)]))
    assert "mine forget forget quality: there is no retain model" in html


def test_adapters_judged_on_other_rows_do_not_share_a_table():
    other = copy.deepcopy(evaluation())
    other["suite"] = "tofu"
    rounded = evaluation()
    rounded["subjects"]["base"] = {**rounded["subjects"]["base"], "model_utility": 0.690001, "retain/new_metric": 0.5}
    found = parts([evidence(), evidence(name="other", evaluation=rounded), evidence(name="third", evaluation=other)])
    tables = [p for p in found if isinstance(p, doc.Table) and p.head[0] == "set (rows)"]
    assert [list(t.head) for t in tables] == [
        ["set (rows)", "base", "mine", "other", "retain model"],
        ["set (rows)", "base", "with adapter", "retain model"],
    ]


# -- from folders to files --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    data = ForgetRetain.load("embedded:people")
    made = make(tmp_path_factory.mktemp("report") / "mine", data, data.forget[:3], steps=2)
    (made.path / "eval.json").write_text(json.dumps({**evaluation(), "adapter_id": made.adapter_id}))
    return made.path


@pytest.fixture(scope="module")
def page(folder) -> Path:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    found = report([folder])
    (path,) = found.write(folder.parent / "report.html")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before  # a report changes nothing
    assert found.notes == [] and found.title == "Forget adapter mine"
    return path


def test_a_report_of_a_folder_has_everything(page, folder):
    html = page.read_text()
    for word in (
        "it forgets",
        "relearn",
        "Calibration",
        "What the models answer",
        "retain model",
        "to be forgotten",
        "torch",
        "lora_alpha",
    ):
        assert word in html, word
    assert outside(html) == [] and str(folder) not in html and str(Path.home()) not in html
    assert (
        html.count("data:image/png") == 3
        and "of other seeds, have p = 0.470 to 0.702" in html
        and "0.666 to 0.682" in html
    )  # the spread of other retain models


def test_without_models_it_holds_the_rest(folder, tmp_path):
    found = report([folder], samples=False)
    paths = found.write(tmp_path / "r.md")
    assert sorted(p.name for p in paths) == ["r-attacks-mine.png", "r-calibration-mine.png", "r-plane.png", "r.md"]
    found = report([folder], data=str(tmp_path / "nowhere"))
    assert any("No sample answers" in n and "nowhere" in n for n in found.notes)
    with pytest.raises(UserError, match=r"\.html, \.md or \.json"):
        found.write(tmp_path / "r.pdf")


def test_numbers_of_other_weights_are_left_out(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "mine")
    (copied / "eval.json").write_text(json.dumps({**evaluation(), "adapter_id": "sha256:another"}))
    assert evidence_of("mine", read_adapter(copied)).evaluation == {}


@pytest.mark.parametrize(
    ("change", "left", "said"),
    [
        ({"adapter_id": "sha256:another"}, [], "other weights; run peft-unlearn eval mine again"),
        ({"format": 0}, ["attacks", "calibration"], "suite numbers of eval.json are of format 0, this version reads 1"),
        ({"subjects": [1]}, ["attacks", "calibration"], "suite numbers of eval.json are not in a shape"),
        ({"attacks": "none"}, ["calibration", "subjects"], "run peft-unlearn attack mine again"),
        ({"calibration": {"format": 2}}, ["attacks", "subjects"], "calibration numbers of eval.json are of format 2"),
    ],
)
def test_numbers_that_cannot_be_used_are_named_with_the_command_that_renews_them(folder, tmp_path, change, left, said):
    copied = shutil.copytree(folder, tmp_path / "mine")
    own = read_adapter(copied).adapter_id
    (copied / "eval.json").write_text(json.dumps({**evaluation(), "adapter_id": own, **change}))
    found = report([copied], samples=False)
    assert any(said in note for note in found.notes), found.notes
    kept = evidence_of("mine", read_adapter(copied)).evaluation
    assert [k for k in ("attacks", "calibration", "subjects") if k in kept] == left


def test_an_eval_json_that_was_cut_short_says_what_to_do(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "mine")
    (copied / "eval.json").write_text('{"format": 1, "subj')
    with pytest.raises(UserError, match=r"not JSON.*Delete it, and `peft-unlearn eval`"):
        report([copied], samples=False)


BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_it(page, tmp_path, width):
    from PIL import Image

    shot = tmp_path / "shot.png"
    command = [
        str(BROWSER),
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},1600",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=90)
    assert shot.is_file(), done.stderr.decode()[-500:]
    picture = Image.open(shot).convert("RGB")
    assert picture.size == (width, 1600)
    pixels = np.asarray(picture)
    ink = (pixels < 200).all(-1)
    assert 0.005 < ink.mean() < 0.5  # text on white, neither blank nor black
    assert ink[:400].any() and ink[1200:].any()  # from top to bottom
    assert not ink[:, -8:].any()  # nothing runs out of the window on the right
    green = (pixels == (0x3C, 0x8D, 0x5A)).all(-1)
    assert green.sum() > 100  # the verdict's edge: the style sheet is there


@pytest.mark.parametrize(
    ("text", "shown"),
    [("1. gru", r"1\. gru"), ("- x", r"\- x"), ("2) x", r"2\) x"), ("0.5 of 2", "0.5 of 2"), ("a|b\nc", r"a\|b c"), ("&lt;", "&amp;lt;")],
)  # fmt: skip
def test_text_stays_text_in_markdown(text, shown):
    assert plain(text) == shown
