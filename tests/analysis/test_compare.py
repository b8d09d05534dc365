"""calibrate, compare and interference on real folders: the embedded base with adapters that were trained for a second."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from made import make

from peft_unlearn.analysis import calibrate as calibrating
from peft_unlearn.analysis import compare as comparing
from peft_unlearn.analysis import interference as interfering
from peft_unlearn.analysis.calibrate import Calibrated
from peft_unlearn.analysis.compare import LEVEL, check_same_sets, headline
from peft_unlearn.analysis.interference import common_retain, same_sets
from peft_unlearn.analysis.search import Calibration, Levels, Point
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.numbers import Number
from peft_unlearn.evaluation.suites import load
from peft_unlearn.folder.read import read_adapter
from peft_unlearn.folder.results import check_out, save
from peft_unlearn.reporting.document import Picture
from peft_unlearn.reporting.figure import widest_gap
from peft_unlearn.reporting.interference import notes as interference_notes

N = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """strong and weak forget the embedded people; first and second the first and second half of them."""
    root = tmp_path_factory.mktemp("adapters")
    data = ForgetRetain.load("embedded:people")
    shown = data.forget[::17]
    halves = {}
    for name, rows in (("first", data.forget[:50]), ("second", data.forget[50:])):
        folder = root / f"data-{name}"
        folder.mkdir()
        retain = data.extra["retain"][:60] + (data.forget[50:60] if name == "first" else data.forget[:10])
        for kind, some in (("forget", rows), ("retain", retain)):
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
        halves[name] = ForgetRetain.load(folder)
        make(root / name, halves[name], rows[::9])
    make(root / "strong", data, shown, steps=14)
    make(root / "weak", data, shown, steps=6, lr=2e-3)
    return SimpleNamespace(root=root, data=data, halves=halves)


def copy(made, name, to):
    return shutil.copytree(made.root / name, to / name)


# -- calibrate --------------------------------------------------------------------------------------------------------


def test_the_scale_found_is_stored_and_meets_what_was_asked(made, tmp_path):
    folder = copy(made, "strong", tmp_path)
    before = read_adapter(folder)
    looked = calibrating.calibrate(folder, n=N)
    assert read_adapter(folder).eval is None  # a part of the rows: nothing stored
    assert looked.to_dict()["n"] == {"forget": N, "retain": N}
    assert looked.stored is False and any("nothing was stored" in note for note in looked.remarks())
    assert not any("eval.json" in note for note in looked.remarks())

    few = ForgetRetain(made.data.forget[:12], made.data.extra["retain"][:20])
    bundle, calibrating.bundle_for = calibrating.bundle_for, lambda *_: few
    try:
        found = calibrating.calibrate(folder, retain_floor=0.9)
    finally:
        calibrating.bundle_for = bundle
    block = found.to_dict()
    after = read_adapter(folder)
    assert block["scale"] is not None and 0 < block["scale"] <= 1
    assert after.manifest.scale == block["scale"] and after.adapter_id == before.adapter_id
    assert after.config["lora_alpha"] == before.config["lora_alpha"]
    assert after.eval is not None and after.eval["calibration"] == json.loads(json.dumps(block))
    assert (
        block["chosen"]["retain"]["value"]
        >= block["wanted"]
        == pytest.approx(0.9 * block["curve"][0]["retain"]["value"])
    )
    assert block["retain_only"]["retain"]["n"] == 20
    if block["how"] == "bisection":
        above = [p for p in block["curve"] if p["scale"] > block["scale"]]
        assert (
            above[0]["retain"]["value"] < block["wanted"] and above[0]["scale"] - block["scale"] <= block["tolerance"]
        )
    assert "scale" in str(found) and found.scale == block["scale"]
    (path,) = save(found, tmp_path / "deep" / "curve.png")
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_numbers_of_another_scale_are_marked_so(made, tmp_path):
    folder = copy(made, "strong", tmp_path)
    found = read_adapter(folder)
    (folder / "eval.json").write_text(json.dumps({
        "subjects": {"adapter": {"forget/extraction_strength": 0.1}}, "adapter_id": found.adapter_id,
        "attacks": {"adapter_id": found.adapter_id, "scale": {"adapter": 1.0}},
    }))  # fmt: skip
    found = read_adapter(folder)
    calibrating._store(found, {"scale": 0.5, "scale_before": 1.0, "baked": False, "adapter_id": found.adapter_id})
    stored = read_adapter(folder).eval or {}
    assert stored["scale"] == 1.0 and stored["attacks"]["scale"]["adapter"] == 1.0
    calibrating._store(found, {"scale": 0.5, "scale_before": 1.0, "baked": True, "adapter_id": found.adapter_id})
    stored = read_adapter(folder).eval or {}
    # in units of what scale 1 means now, they were taken at twice that
    assert stored["scale"] == 2.0 and stored["attacks"]["scale"]["adapter"] == 2.0


def test_bake_needs_all_rows(made):
    with pytest.raises(UserError, match="all rows"):
        calibrating.calibrate(made.root / "strong", n=3, bake=True)


def test_the_command_answers_no_with_the_curve(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from peft_unlearn.cli import app

    curve = tuple(Point(s, Levels(Number(1 - s, 5), Number(1 - s, 5))) for s in (0.0, 0.5, 1.0))
    rises = {"forget": 0.0, "retain": 0.2}
    found = Calibration(None, curve, 0.95, 0.95, False, rises, "the grid", "no scale above 0 keeps it")
    block = Calibrated(found, "extraction_strength", 1.0, None, 1.0, "sha256:x", stored=True)
    monkeypatch.setattr(calibrating, "calibrate", lambda *_, **__: block)
    out = CliRunner().invoke(app, ["calibrate", "x", "--out", str(tmp_path / "c.png")])
    assert out.exit_code == 1 and "no: no scale above 0" in out.stdout and "0.500" in out.stdout
    assert "do not only fall" in out.stderr and (tmp_path / "c.png").stat().st_size > 10_000
    out = CliRunner().invoke(app, ["calibrate", "x", "--json"])
    assert out.exit_code == 1 and json.loads(out.stdout)["curve"]


# -- compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(made):
    return comparing.compare([made.root / "weak", made.root / "strong"], n=N)


def test_a_comparison_holds_every_adapter_as_trained_and_at_the_floor(compared):
    subjects = compared.to_dict()["report"]["subjects"]
    assert {"base", "weak", "strong", "retain_only"} <= set(subjects) and compared.ranking
    calibration = compared.to_dict()["calibration"]
    for name in compared.ranking:
        chosen = calibration[name]["chosen"]
        assert (
            subjects[name + LEVEL]["forget/extraction_strength"] == chosen["forget"]["value"]
        )  # one reading, one number
        assert chosen["retain"]["value"] >= calibration[name]["wanted"] - 1e-9
    values = [calibration[n]["chosen"]["forget"]["value"] for n in compared.ranking]
    assert values == sorted(values) and set(compared.ranking) | set(compared.cannot) == {"weak", "strong"}
    assert calibration["strong"]["curve"][-1]["forget"]["value"] == subjects["strong"]["forget/extraction_strength"]
    assert subjects["base"]["forget/extraction_strength"] == 1.0
    assert set(compared.behind) == set(compared.ranking[1:])
    json.dumps(compared.to_dict(), allow_nan=False)


def test_it_is_written_as_html_markdown_json_and_picture(compared, tmp_path):
    compared.title = "Two <adapters>"
    paths = save(compared, tmp_path / "out")
    assert sorted(p.name for p in paths) == ["out-frontier.png", "out.html", "out.json", "out.md"]
    html = (tmp_path / "out" / "out.html").read_text()
    assert "Two &lt;adapters&gt;" in html and "retain model" in html and html.count("data:image/png") == 1
    assert "](out-frontier.png)" in (tmp_path / "out" / "out.md").read_text()
    assert json.loads((tmp_path / "out" / "out.json").read_text())["ranking"] == compared.ranking
    with pytest.raises(UserError, match="ends in"):
        save(compared, tmp_path / "out.pdf")
    text = str(compared)
    assert "as trained" in text and "retain model" in text
    assert next(p for p in compared.parts() if isinstance(p, Picture)).png.startswith(b"\x89PNG")


def test_adapters_of_different_forget_sets_are_refused_with_a_way_out(made):
    with pytest.raises(UserError, match=r"different sets.*first.*interference"):
        comparing.compare([made.root / "first", made.root / "strong"])
    check_same_sets({"a": "x", "b": "x"})
    with pytest.raises(UserError, match="called strong"):
        comparing.compare([made.root / "strong", made.root / "strong"])


def test_a_misspelt_suite_and_a_file_that_cannot_be_written_are_refused_before_any_model_is_read(
    made, monkeypatch, tmp_path
):
    monkeypatch.setattr(comparing.ForgetModel, "from_pretrained", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"suite 'poeple'.*people"):
        comparing.compare([made.root / "weak"], suite="poeple")
    with pytest.raises(UserError, match=r"\.html, \.md, \.json or \.png, or a folder"):
        check_out(tmp_path / "x.pdf")
    (tmp_path / "x.html").mkdir()
    with pytest.raises(UserError, match="is a folder; name a file"):
        check_out(tmp_path / "x.html")
    for good in (None, tmp_path, tmp_path / "new", tmp_path / "y.HTML"):
        check_out(good)


def test_only_the_sets_that_the_headline_needs_are_read():
    cut, keys = headline(load("people"))
    assert "model_utility" in keys and "forget/forget_quality" in keys
    assert set(cut.sets) == {"forget", "retain", "general"}  # general is a part of model utility
    own = {"format": 1, "name": "own", "sets": {"x": {"role": "forget", "metrics": ["probability"]}}}
    assert headline(load(own))[1] == ["x/probability"]


# -- interference -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together(made):
    data = [str(made.root / f"data-{n}") for n in ("second", "first")]  # found by hash, not by order
    return interfering.interference([made.root / "first", made.root / "second"], data=data, n=N)


def test_each_is_judged_alone_and_together_on_every_set(together, made):
    found = together.to_dict()
    matrix = found["subjects"]
    assert list(matrix) == ["base", "first", "second", "together"]
    assert list(found["sets"]) == ["forget_first", "forget_second", "retain"]
    assert matrix["base"]["forget_first"]["value"] == 1.0
    assert matrix["first"]["forget_first"]["value"] < matrix["base"]["forget_first"]["value"]
    own = found["own"]["first"]
    assert own["alone"] == matrix["first"]["forget_first"]["value"]
    assert own["difference"] == pytest.approx(own["together"] - own["alone"])
    assert found["cost"]["together"] == pytest.approx(
        matrix["base"]["retain"]["value"] - matrix["together"]["retain"]["value"]
    )
    assert together.forget_sets["first"] == made.halves["first"].sha256["forget"]
    json.dumps(found, allow_nan=False)
    assert "all together" in str(together)
    assert any(isinstance(p, Picture) for p in together.parts())


def test_an_adapter_alone_is_what_it_is_without_the_other(together, made):
    """The other adapter is on the same model, and off: the number is that of the adapter's own evaluation."""
    from peft_unlearn.evaluation.score import on_one_model, score
    from peft_unlearn.stack.model import ForgetModel

    stack = ForgetModel.from_pretrained(None, {"only": made.root / "first"})
    spec = {"format": 1, "name": "s", "sets": {"forget": {"role": "forget", "metrics": ["extraction_strength"]}}}
    data = {"forget": made.halves["first"].forget}
    report = score(on_one_model(stack.model, {"only": "only"}), spec, data, stack.tokenizer, n=N)
    assert together.left("first", "forget_first") == report.subjects["only"]["forget/extraction_strength"]


def test_adapters_of_one_forget_set_do_not_take_from_each_others_set():
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
    same = same_sets({"a": rows, "b": rows[:2], "c": list(reversed(rows))})
    assert same == [("a", "c")]
    left = {"base": 1.0, "a": 0.1, "b": 0.4, "c": 0.2}
    taken = {(other, name): left["base"] - left[other] for name in "abc" for other in "abc"}
    own = {n: {"alone": left[n], "together": left[n], "difference": 0.0} for n in "abc"}
    notes = interference_notes(own, {"together": None}, taken, same)
    assert notes[0] == "a and c forget the same set."
    assert {n for n in notes if " too." in n} == {
        "b alone takes 0.600 from the set of a too.", "a alone takes 0.900 from the set of b too.",
        "c alone takes 0.800 from the set of b too.", "b alone takes 0.600 from the set of c too.",
    }  # fmt: skip


def test_a_label_stands_where_no_line_is():
    assert widest_gap([0.0, 1.0, 0.95, 0.868, 1.0, 0.304]) == pytest.approx((0.304 + 0.868) / 2)
    assert widest_gap([0.0, 1.0]) == 0.5


def test_rows_that_another_adapter_forgets_are_no_retain_rows(made):
    forget = {n: b.forget for n, b in made.halves.items()}
    kept = common_retain(forget, made.halves["first"].retain)
    assert len(made.halves["first"].retain) == 70 and len(kept) == 60


def test_what_cannot_be_judged_together_is_refused(made):
    with pytest.raises(UserError, match="at least two"):
        interfering.interference([made.root / "first"])
    with pytest.raises(UserError, match="none of the data given is its forget set"):
        interfering.interference([made.root / "first", made.root / "second"], data=[str(made.root / "data-first")])
    with pytest.raises(UserError, match="shown in one of"):
        interfering.interference([made.root / "strong", made.root / "weak"], metric="truth_ratio", n=2)


def test_a_kl_budget_sets_the_scale_and_leaves_the_numbers(made, tmp_path):
    folder = shutil.copytree(made.root / "strong", tmp_path / "K")
    found = calibrating.calibrate(folder, kl=0.02, n=None)
    assert found.exit_code == 0 and 0 < found.scale <= 1 and found.kl <= 0.02
    assert read_adapter(folder).manifest.scale == found.scale and "nats a token" in str(found)
    assert (read_adapter(folder).eval or {}).get("calibration") is None
    with pytest.raises(UserError, match="--on"):
        calibrating.calibrate(folder, kl=0.02, on="nothing")
