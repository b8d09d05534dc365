"""Progress goes to standard error: bars on a terminal, elsewhere a line for every finished tenth."""

from __future__ import annotations

from types import SimpleNamespace

from peft_unlearn.progress import bars, training_bar


def test_a_line_for_every_finished_tenth(capsys) -> None:
    with bars() as progress:
        for done in range(1, 41):
            progress("base: reading", done, 40)
        progress("short", 1, 2)
        progress("short", 2, 2)
        progress("empty", 0, 0)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and len(lines) == 12
    assert lines[0] == "base: reading: 4/40" and lines[9] == "base: reading: 40/40"
    assert lines[10:] == ["short: 1/2", "short: 2/2"]


def test_training_says_steps_with_its_latest_losses(capsys) -> None:
    bar, state = training_bar(), SimpleNamespace(global_step=0, max_steps=20)
    bar.on_train_begin(None, state, None)
    for state.global_step in range(1, 21):
        bar.on_step_end(None, state, None)
        bar.on_log(None, state, None, logs={"loss/forget": 0.5, "learning_rate": 1.0})
    bar.on_train_end(None, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1] == "unlearning: 20/20  forget 0.5"


def test_lines_say_what_is_left_of_long_work_and_what_was_judged(capsys, monkeypatch) -> None:
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with bars() as progress:
        for done in range(11):
            progress("asking", done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert "min left" in lines[0] and "min left" not in lines[-1]
    bar, state = training_bar(), SimpleNamespace(global_step=0, max_steps=2)
    bar.on_train_begin(None, state, None)
    bar.on_evaluate(None, state, None, metrics={"eval_forget/value_accuracy": 0.25, "eval_forget/probability": 0.1})
    state.global_step = 2
    bar.on_step_end(None, state, None)
    bar.on_train_end(None, state, None)
    assert capsys.readouterr().err.splitlines()[-1] == "unlearning: 2/2  forget/value_accuracy 0.25"
