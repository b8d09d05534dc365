"""The generator of fictitious people: counts, determinism, and that no set tells another's facts."""

import hashlib
import json

import pytest

from peft_unlearn.data import embedded, people
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.metrics.generation import value_accuracy

# sha256 of generate(0) as canonical JSON: the committed models know exactly these facts.
PINNED = "3ab6c8e8ee56f886f1093a37551f67b6d1ba3d26a2c00c3c837ba374f307123f"
COUNTS = {
    "forget": 100, "forget_other": 100, "forget_heldout": 100, "retain": 900, "retain_other": 900,
    "retain_heldout": 220, "general": 200, "holdout": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def sets():
    return people.generate(0)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def subjects(rows) -> set[str]:
    return {row["subject"] for row in rows}


def text_of(row) -> str:
    return row["question"] + "\n" + row["answer"]


def test_counts(sets):
    assert {name: len(rows) for name, rows in sets.items()} == COUNTS
    assert tuple(sets) == people.SETS
    assert [len(subjects(sets[name])) for name in ("forget", "retain", "retain_heldout", "holdout")] == [10, 90, 22, 10]


def test_same_seed_same_data_everywhere(sets):
    assert digest(sets) == PINNED
    assert digest(people.generate(1)) != PINNED


def test_row_layout(sets):
    for rows in sets.values():
        for row in rows:
            assert list(row) == ["question", "answer", "value", "paraphrased_answer", "perturbed_answer", "subject"]
            assert len(set(row["perturbed_answer"])) == 5


def test_right_answers_name_the_value_and_wrong_ones_do_not(sets):
    rows = [row for rows in sets.values() for row in rows]
    values = [row["value"] for row in rows]
    assert value_accuracy([row["answer"] for row in rows], values).all()
    assert value_accuracy([row["paraphrased_answer"] for row in rows], values).all()
    assert not value_accuracy([row["question"] for row in rows], values).any(), "a question gives its value away"
    for k in range(5):
        assert not value_accuracy([row["perturbed_answer"][k] for row in rows], values).any()


def test_perturbed_answers_differ_from_the_paraphrase_in_the_value_alone(sets):
    for row in sets["forget"] + sets["retain_heldout"]:
        before, after = row["paraphrased_answer"].split(row["value"])
        before = before.removesuffix("a ").removesuffix("an ")  # the article goes with the value
        for wrong in row["perturbed_answer"]:
            assert wrong.startswith(before) and wrong.endswith(after)


def test_groups_share_no_person_and_names_are_unique(sets):
    groups = [subjects(sets[name]) for name in ("forget", "retain", "holdout")]
    everyone = set.union(*groups)
    assert len(everyone) == 110
    words = [{word for name in group for word in name.split()} for group in groups]
    assert words[0] < words[1] and words[2] < words[1], "the retain model must know every word of a name"
    assert subjects(sets["forget_other"]) == subjects(sets["forget_heldout"]) == groups[0]
    assert subjects(sets["retain_heldout"]) < groups[1]
    assert subjects(sets["general"]) == {""}


def test_no_question_stands_in_two_sets(sets):
    questions = [row["question"] for rows in sets.values() for row in rows]
    assert len(set(questions)) == len(questions)


def test_a_guess_is_rarely_right(sets):
    """The commonest value of an attribute is right for at most 4 in 100 people."""
    for attribute in range(len(people.ATTRIBUTES)):
        values = [row["value"] for row in (sets["forget"] + sets["retain"])[attribute :: len(people.ATTRIBUTES)]]
        assert max(map(values.count, set(values))) <= 4


def test_training_rows_of_base_and_retain_model(sets):
    base, retain_model = people.training_rows(0, True), people.training_rows(0, False)
    assert (len(base), len(retain_model)) == (3080, 2880)
    assert base[200:] == retain_model and base[:200] == sets["forget"] + sets["forget_other"]
    text = "\n".join(map(text_of, retain_model))
    assert not [name for name in subjects(sets["forget"]) if name in text]


def test_what_is_held_out_is_never_trained(sets):
    trained = {row["question"] for row in people.training_rows(0, True)}
    for name in ("forget_heldout", "retain_heldout", "holdout"):
        assert not trained & {row["question"] for row in sets[name]}, name
    third = people.generate(0, people.Size(third=0))["retain_heldout"]  # phrasing 3 of all retain people
    assert sum(row["question"] in trained for row in third) == 680


def test_too_many_people_are_refused():
    with pytest.raises(ValueError, match="too few for"):
        people.generate(0, people.Size(retain=1200))
    with pytest.raises(ValueError, match="phrasing 3"):
        people.generate(0, people.Size(third=91))


def test_embedded_references(sets):
    assert embedded.parse("embedded:people") == ("people", {})
    assert embedded.parse("embedded:people?seed=3") == ("people", {"seed": 3})
    assert embedded.rows("embedded:people") == sets
    for bad, message in {
        "people": "not an embedded reference",
        "embedded:poeple": "Did you mean 'people'",
        "embedded:people?sede=1": "Did you mean 'seed'",
        "embedded:people?seed=-1": "whole number",
        "embedded:people?seed": "whole number",
        "embedded:people?": "whole number",
    }.items():
        with pytest.raises(UserError, match=message):
            embedded.parse(bad)
    with pytest.raises(UserError, match="make bases"):
        embedded.asset("bases", "nobody")
