"""The generator of the five domains: counts, determinism, what unlearning may see, and that nothing gives a fact away."""

import hashlib
import json

import pytest

from peft_unlearn.data import domains, embedded
from peft_unlearn.data.bundle import ForgetRetain
from peft_unlearn.errors import UserError
from peft_unlearn.evaluation.metrics.generation import value_accuracy, words

# sha256 of by_domain(0) and of generate(0) as canonical JSON: the committed models know exactly these facts.
PINNED = "0c7cc7df1aa8a5d27c097db57e40ac86e818da5bf17d0208d26e8e2148b35024"
PINNED_SETS = "f7508e879e080c75e16b9ec5bfa39011547bf50a085c894440b9f715602a5d5f"
COUNTS = {
    "forget": 80, "forget_other": 80, "forget_unseen": 160, "retain": 640, "retain_unseen": 640,
    "retain_unseen_people": 160, "retain_unseen_code": 160, "retain_unseen_lang": 160, "retain_unseen_geo": 160,
    "holdout": 40,
}  # fmt: skip
KEYS = ["question", "answer", "value", "paraphrased_answer", "perturbed_answer", "subject"]


@pytest.fixture(scope="module")
def sets():
    return domains.generate(0)


@pytest.fixture(scope="module")
def trained():
    return domains.by_domain(0)


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def subjects(rows) -> set[str]:
    return {row["subject"] for row in rows}


def texts(rows) -> set[tuple[str, str]]:
    return {(row["question"], row["answer"]) for row in rows}


def test_counts_and_layout(sets, trained):
    assert {name: len(rows) for name, rows in sets.items()} == COUNTS
    assert {name: len(rows) for name, rows in trained.items()} == dict.fromkeys(domains.DOMAINS, 320)
    assert len(texts(row for rows in trained.values() for row in rows)) == 1600
    for rows in [*sets.values(), *trained.values()]:
        for row in rows:
            assert list(row) == KEYS and len(set(row["perturbed_answer"])) == 5


def test_same_seed_same_data_everywhere(sets, trained):
    assert digest(trained) == PINNED
    assert digest(sets) == PINNED_SETS
    assert digest(domains.by_domain(1)) != PINNED


def test_facts_do_not_depend_on_what_is_forgotten(sets, trained):
    for forget in domains.DOMAINS:
        found = domains.generate(0, forget)
        gone = found["forget"] + found["forget_other"] + found["forget_unseen"]
        assert texts(gone) == texts(trained[forget])
        kept = [row for name in domains.DOMAINS if name != forget for row in trained[name]]
        assert texts(found["retain"] + found["retain_unseen"]) == texts(kept)
        assert f"retain_unseen_{forget}" not in found
    assert domains.generate(0, "lang")["retain_unseen_geo"] == sets["retain_unseen_geo"]


def test_what_unlearning_sees_and_what_it_does_not(sets, trained):
    assert subjects(sets["forget"]) == subjects(sets["forget_other"])
    for seen, unseen in (("forget", "forget_unseen"), ("retain", "retain_unseen")):
        assert not subjects(sets[seen]) & subjects(sets[unseen])
        assert len(subjects(sets[seen])) == len(subjects(sets[unseen]))
    parts = [row for name in domains.DOMAINS[:1] + domains.DOMAINS[2:] for row in sets[f"retain_unseen_{name}"]]
    assert parts == sets["retain_unseen"]
    assert not texts(sets["forget"]) & texts(sets["forget_other"])
    everyone = subjects(row for rows in trained.values() for row in rows)
    assert len(everyone) == 200 and not subjects(sets["holdout"]) & everyone


def test_right_answers_name_the_value_and_wrong_ones_do_not(sets, trained):
    rows = [row for part in trained.values() for row in part] + sets["holdout"]
    values = [row["value"] for row in rows]
    assert value_accuracy([row["answer"] for row in rows], values).all()
    assert value_accuracy([row["paraphrased_answer"] for row in rows], values).all()
    assert not value_accuracy([row["question"] for row in rows], values).any(), "a question gives its value away"
    for k in range(5):
        assert not value_accuracy([row["perturbed_answer"][k] for row in rows], values).any()


def test_wrong_answers_differ_from_the_answer_in_the_value_alone(trained):
    for row in (row for rows in trained.values() for row in rows):
        assert row["paraphrased_answer"] == row["answer"]
        before, after = row["answer"].split(row["value"])
        assert all(wrong.startswith(before) and wrong.endswith(after) for wrong in row["perturbed_answer"])


def test_domains_share_no_name_no_value_and_no_template(trained):
    for kind in ("subject", "value"):
        found = [{words(row[kind]) for row in rows} for rows in trained.values()]
        assert len(set.union(*found)) == sum(map(len, found)), kind
    syllables = [{o + v + c for o in d.onsets for v in d.vowels for c in d.codas} for d in domains.SPECS.values()]
    lowered = [{s.lower() for s in part} for part in syllables]
    assert len(set.union(*lowered)) == sum(map(len, lowered))
    templates = [t for d in domains.SPECS.values() for a in d.attributes for pair in a.phrasings for t in pair]
    assert len(set(templates)) == len(templates)


def test_a_guess_is_rarely_right(trained):
    """Values use their pool evenly: the commonest is right for no more entities than the pool's size makes it."""
    for name, rows in trained.items():
        for k, attribute in enumerate(domains.SPECS[name].attributes):
            values = [row["value"] for row in rows[:160][k::4]]
            size = attribute.pool if isinstance(attribute.pool, int) else len(attribute.pool)
            assert max(map(values.count, set(values))) <= -(-40 // size)


def test_invented_words_of_a_domain_begin_differently(trained):
    for name in ("people", "chem", "code", "geo"):
        spec = domains.SPECS[name]
        begins = [s.lower() for s in (o + v + c for o in spec.onsets for v in spec.vowels for c in spec.codas)]
        firsts = []
        for subject in subjects(trained[name]):
            firsts += [max((b for b in begins if w.lower().startswith(b)), key=len) for w in subject.split()]
        assert len(set(firsts)) == len(firsts)


def test_other_sizes():
    small = domains.generate(0, "geo", domains.Size(entities=4, holdout=1))
    assert (len(small["forget"]), len(small["retain"]), len(small["holdout"])) == (8, 64, 4)
    assert domains.generate(0, "geo", domains.Size(entities=4, holdout=0))["holdout"] == []
    with pytest.raises(ValueError, match=r"fewer entities|words for"):
        domains.generate(0, "geo", domains.Size(entities=200))


def test_embedded_references(sets):
    assert embedded.parse("embedded:domains?forget=lang&seed=3") == ("domains", {"forget": "lang", "seed": 3})
    assert embedded.parse("embedded:domains-natural") == ("domains-natural", {})
    assert embedded.resolve("embedded:domains?seed=2") == ("domains", {"forget": "chem", "seed": 2})
    assert embedded.rows("embedded:domains") == sets
    assert embedded.rows("embedded:domains?forget=geo") == domains.generate(0, "geo")
    for bad, message in {
        "embedded:domains?forget=chme": "Did you mean 'chem'",
        "embedded:domains?forget=": "there is no domain ''",
        "embedded:domains?frget=chem": "Did you mean 'forget'",
        "embedded:domains?seed=a": "whole number",
        "embedded:people?forget=chem": "unknown option 'forget'",
        "embedded:domains-natural?seed=1": "unknown option 'seed'",
    }.items():
        with pytest.raises(UserError, match=message):
            embedded.parse(bad)
    with pytest.raises(UserError, match=r"no embedded data set 'domains-natural'.*'domains'"):
        embedded.rows("embedded:domains-natural")


def test_which_retain_model_is_a_reference(monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(embedded, "asset", lambda *parts: Path(*parts))
    retain_model = Path("bases/domains-retain")
    assert embedded.retain_model_for("embedded:domains", "embedded:domains?forget=chem&seed=0") == retain_model
    assert embedded.retain_model_for("embedded:domains", "embedded:domains#forget_unseen") == retain_model
    for data in ("embedded:domains?forget=lang", "embedded:domains?seed=1", "embedded:people", "rows.jsonl", None):
        assert embedded.retain_model_for("embedded:domains", data) is None
    assert embedded.retain_model_for("embedded:domains-natural", "embedded:domains") is None
    assert embedded.retain_model_for("local:abc", "embedded:domains") is None
    assert embedded.retain_model_for("embedded:people", None) == Path("bases/people-retain")
    with pytest.raises(UserError, match="has no retain model"):
        embedded.retain_model_path("domains-natural")


def test_a_bundle_says_which_domain_goes(sets):
    bundle = ForgetRetain.load("embedded:domains?forget=lang")
    assert bundle.refs["forget"] == "embedded:domains?forget=lang&seed=0"
    assert (len(bundle.forget), len(bundle.retain or []), len(bundle.holdout or [])) == (80, 640, 40)
    assert {"forget_unseen", "retain_unseen", "retain_unseen_chem"} <= set(bundle.extra)
    assert bundle.sha256["forget"] != ForgetRetain.load("embedded:domains").sha256["forget"]
