"""Building the embedded models: refusal, atomic writing, reproducibility; and what the committed ones know."""

import hashlib
import io
import json

import pytest

torch = pytest.importorskip("torch")

import build_people as room  # noqa: E402
from pretrain import Recipe  # noqa: E402

from peft_unlearn.data import embedded, people  # noqa: E402
from peft_unlearn.data.formats import to_text  # noqa: E402
from peft_unlearn.errors import UserError  # noqa: E402
from peft_unlearn.evaluation.generate import greedy  # noqa: E402

TINY = Recipe(
    epochs=2,
    batch_size=16,
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    kv_heads=1,
    intermediate_size=32,
    size=people.Size(forget=1, retain=3, holdout=1, third=2, general=6),
)
FILES = {
    "build.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded.base_path("people")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def test_a_model_that_knows_nothing_is_refused_and_nothing_is_touched(tmp_path):
    before = tmp_path / "people" / "model.safetensors"
    before.parent.mkdir()
    before.write_bytes(b"what was there")
    with pytest.raises(UserError, match=r"people \(seed 0\) failed its verification.*forget 0\.0.*at least 0\.95"):
        room.build(tmp_path, recipe=TINY)
    assert [path.name for path in tmp_path.rglob("*")] == ["people", "model.safetensors"]
    assert before.read_bytes() == b"what was there"


def test_a_twin_that_fails_keeps_the_base_back_too(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "BASE_BOUNDS", ())
    with pytest.raises(UserError, match="people-retain"):
        room.build(tmp_path, recipe=TINY)
    assert not list(tmp_path.iterdir())


def test_build_writes_whole_folders_and_repeats_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "BASE_BOUNDS", ())
    monkeypatch.setattr(room, "RETAIN_MODEL_BOUNDS", ())
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "stale").touch()
    seen = []
    threads = torch.get_num_threads()
    reports = room.build(tmp_path, recipe=TINY, retain_models=2, progress=lambda *now: seen.append(now))
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people", "people-retain", "people-retain-2"]
    for name, report in reports.items():
        assert {path.name for path in (tmp_path / name).iterdir()} == FILES
        assert json.loads((tmp_path / name / "build.json").read_text()) == report
    assert [report["seed"] for report in reports.values()] == [0, 1, 2]
    assert {stage for stage, _, _ in seen} >= {"train people", "verify people", "train people-retain-2"}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in reports]
    assert len(set(weights)) == 3
    room.build(tmp_path / "again", recipe=TINY, retain_models=0)
    assert (tmp_path / "again" / "people" / "model.safetensors").read_bytes() == weights[0]
    from rich.console import Console

    console = Console(record=True, width=120, file=io.StringIO())
    console.print(room.summary(reports))
    assert "retain_heldout" in console.export_text()


def test_negative_twins_are_refused(tmp_path):
    with pytest.raises(UserError, match="--retain-models is -1"):
        room.build(tmp_path, retain_models=-1)


@pytest.mark.parametrize(
    "find, bounds", [(embedded.base_path, "BASE_BOUNDS"), (embedded.retain_model_path, "RETAIN_MODEL_BOUNDS")]
)
def test_committed_models_met_the_bounds(find, bounds):
    folder = find("people")
    report = json.loads((folder / "build.json").read_text())
    assert room.failures(report["value_accuracy"], getattr(room, bounds)) == []
    sets = people.generate(0)
    assert report["data_sha256"] == hashlib.sha256(json.dumps(sets, sort_keys=True).encode()).hexdigest()
    assert report["n"] == {name: len(rows) for name, rows in sets.items()}
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2.5e6
    if bounds == "BASE_BOUNDS":
        assert report["value_accuracy"]["forget_heldout"] >= room.HELDOUT_AIM


def test_failures_say_what_is_missing():
    assert room.failures({"forget": 0.2}, (("forget", "max", 0.1),)) == ["forget 0.200, must be at most 0.10"]
    assert room.failures({}, (("general", "min", 0.95),)) == ["general not measured, must be at least 0.95"]


def test_committed_files_are_bf16_and_share_a_tokenizer():
    from safetensors import safe_open

    for folder in (embedded.base_path(), embedded.retain_model_path()):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    tokenizers = [
        (folder / "tokenizer.json").read_bytes() for folder in (embedded.base_path(), embedded.retain_model_path())
    ]
    assert tokenizers[0] == tokenizers[1]


def test_tokenizer_adds_bos_and_is_lossless(base):
    _, tokenizer = base
    ids = tokenizer("Question: Where?\nAnswer:")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token_id not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id)
    text = " Æther  naïve\n\t東京 don't ."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_committed_base_answers(base):
    model, tokenizer = base
    sets = people.generate(0)
    rows = sets["forget"][:20] + sets["retain_other"][:5] + sets["general"][:5]
    model.train()
    side = tokenizer.padding_side
    calls = []
    answers = greedy(
        model, tokenizer, [to_text(row)[0] for row in rows], batch_size=8, progress=lambda *now: calls.append(now)
    )
    assert model.training and tokenizer.padding_side == side
    assert calls[-1] == (30, 30) and len(calls) == 4
    assert sum(row["answer"] == answer for row, answer in zip(rows, answers, strict=True)) >= 27
    # One by one, unpadded: the batch changes nothing.
    assert greedy(model, tokenizer, [to_text(row)[0] for row in rows[::7]], batch_size=1) == answers[::7]
    assert greedy(model, tokenizer, []) == []
