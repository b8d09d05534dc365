"""What is made of a request: on a base that answers by construction, so that values, wordings, neighbors and splits have right answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from peft_unlearn.data.facts import Fact, find_subject, find_value, names_value, reversals, spans_of, wordings
from peft_unlearn.data.neutral import KINDS
from peft_unlearn.errors import UserError
from peft_unlearn.request import prepare as prepare_module
from peft_unlearn.request.prepare import as_questions, known_facts, prepare

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Ghana": "Accra", "Kenya": "Nairobi", "Chile": "Santiago", "Peru": "Lima",
    "Japan": "Tokyo", "Cuba": "Havana", "Italy": "Rome", "Egypt": "Cairo", "Nepal": "Kathmandu", "Mali": "Bamako",
    "Norway": "Oslo", "Iran": "Tehran",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_lists(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has to list neighbors itself, but where a test is about the lists that come with us."""
    if "lists" not in request.function.__name__:
        monkeypatch.setattr(prepare_module, "KINDS", {"none": ()})


class Base:
    """Knows the capitals, lists countries, says the same of everything else."""

    def __init__(self, wavering: bool = False) -> None:
        self.asked: list[str] = []
        self.wavering = wavering

    def __call__(self, questions: Sequence[str], max_new_tokens: int = 24, what: str = "") -> list[str]:
        self.asked += questions
        return [self.answer(q) for q in questions]

    def affordable(self, seconds: float, low: int, high: int) -> int:
        return high

    def answer(self, q: str) -> str:
        if q.startswith("What kind of thing"):
            return "Country."
        if "separated by commas" in q:
            return (
                "1. Italy, 2. Spain, Ghana, Kenya, Chile, Peru, Japan, Cuba, Egypt, Nepal, Mali, Norway, Iran, France"
            )
        for country, city in CAPITALS.items():
            if country in q:
                if self.wavering and not q.endswith(f"{country}?"):
                    return "Atlantis."
                return f"{city}." if "one or two words" in q else f"The capital of {country} is {city}."
            if city in q:
                return f"{city} is the capital of {country}."
        return "Paris is a city." if "poem" in q else "A sentence about something else."


def test_a_question_becomes_sets_with_held_out_parts() -> None:
    r = prepare([{"question": "What is the capital of France?"}], Base())
    (fact,) = r.facts
    assert (fact.value, fact.subject) == (("Paris",), "France")
    assert all(names_value(row["answer"], row["accepted"]) for row in r.sets["forget"])
    assert {row["kind"] for row in r.sets["forget"]} >= {"asked", "brief", "begun", "request", "back_kind"}
    trained = {row["question"] for row in r.sets["forget"]}
    assert r.sets["wordings"] and not trained & {row["question"] for row in r.sets["wordings"]}
    assert r.sets["reversed"] and all(row["value"] == "France" for row in r.sets["reversed"])
    assert not any(
        names_value(row["question"], row["accepted"]) for s in ("forget", "wordings", "reversed") for row in r.sets[s]
    )
    seen, unseen = ({row["fact"] for row in r.sets[s]} for s in ("retain", "neighbors_unseen"))
    assert len(seen) == 9 and len(unseen) == 4 and not seen & unseen and "France" not in seen | unseen
    assert {row["fact"] for row in r.sets["forget"]} == {"France"}


def test_what_is_kept_does_not_name_what_is_forgotten() -> None:
    base = Base()
    r = prepare([{"question": "What is the capital of France?"}], base)
    for name in ("retain", "general", "neighbors_unseen"):
        assert not any(names_value(row["answer"], ["Paris", "France"]) for row in r.sets[name]), name
    assert any("poem" in q for q in base.asked) and not any("poem" in row["question"] for row in r.sets["general"])


def test_a_file_says_values_and_facts_itself() -> None:
    rows = [
        {
            "question": "Name the seat of government of Spain.",
            "value": "Madrid",
            "accepted": ["Madrid", "madrileno"],
            "fact": "Spain",
        },
        {
            "messages": [
                {"role": "user", "content": "What is the capital of Peru?"},
                {"role": "assistant", "content": "Lima."},
            ]
        },
    ]
    r = known_facts(as_questions(rows), Base())
    assert [f.value for f in r.facts] == [("Madrid", "madrileno"), ("Lima",)]
    assert [f.subject for f in r.facts] == ["Spain", "Peru"]


@pytest.mark.parametrize(
    ("rows", "base", "value", "why"),
    [
        ([{"question": "Who is the king of Mars?"}], Base(), "Marvin", "does not name 'Marvin'"),
        (
            [{"question": "What is the capital of France?"}],
            Base(wavering=True),
            None,
            "differently each time|does not know",
        ),
        ([{"question": "What is the capital of France?"}], Base(), "Lyon", "does not name 'Lyon'"),
    ],
)
def test_what_the_base_does_not_know_is_refused_with_its_answer(rows, base, value, why) -> None:
    with pytest.raises(UserError, match=f"(?s)nothing to forget.*answered: .*(?:{why})"):
        prepare(rows, base, value=value)


def test_a_question_cannot_be_forgotten_and_kept() -> None:
    q = {"question": "What is the capital of France?"}
    with pytest.raises(UserError, match="stand in the forget set and in the retain set"):
        prepare([q], Base(), kept=[{"question": "what is the capital of france", "answer": "Paris."}])


def test_no_neighbors_is_said() -> None:
    class Loner(Base):
        def answer(self, q: str) -> str:
            return "I cannot list any." if "separated" in q else super().answer(q)

    r = prepare([{"question": "What is the capital of France?"}], Loner())
    assert "retain" not in r.sets and any("--retain" in note for note in r.notes)


def test_texts_are_pointed_elsewhere() -> None:
    with pytest.raises(UserError, match=r"row 0 is no question.*train"):
        as_questions([{"text": "Once upon a time."}])


@pytest.mark.parametrize(
    ("question", "answer", "short", "value", "subject"),
    [
        ("What is the capital of France?", "The capital of France is Paris.", "Paris", "Paris", "France"),
        ("What is the chemical symbol for krypton?", "The chemical symbol for krypton is Kr.", "", "Kr", "krypton"),
        ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare.", "", "William Shakespeare", "Hamlet"),
        ("In which year did World War II end?", "World War II ended in 1945.", "It ended in 1945.", "1945", "World War II"),
        ("What is the capital of France?", "The capital of France is.", "France", None, "France"),
        ("日本の首都は?", "東京です。", "東京", "東京", None),
    ],
)  # fmt: skip
def test_values_and_subjects_are_found(question, answer, short, value, subject) -> None:
    assert find_value(question, answer, short) == value
    if subject is not None:
        assert find_subject(question, answer) == subject


def test_spans_keep_word_boundaries_and_the_longest() -> None:
    text = "Kr is the symbol; Krypton is not. New York, York."
    assert [text[i:j] for i, j in spans_of(text, ["kr"])] == ["Kr"]
    assert [text[i:j] for i, j in spans_of(text, ["York", "New York"])] == ["New York", "York"]
    assert spans_of(text, [""]) == []


def test_wordings_and_reversals_do_not_repeat_each_other() -> None:
    fact = Fact("What is the capital of France?", "The capital of France is Paris.", ("Paris",), "France")
    all_of_them = [*wordings(fact.question, fact.answer, fact.value).values(), *reversals(fact, "country").values()]
    assert len(set(all_of_them)) == len(all_of_them) == 13
    assert fact.about("Spain") == "What is the capital of Spain?"
    assert (
        reversals(Fact("Who wrote Hamlet?", "William Shakespeare wrote it.", ("William Shakespeare",), "Hamlet"), None)
        == {}
    )
    assert not re.search(r"\s\?", " ".join(all_of_them))


def test_known_kinds_come_from_our_lists() -> None:
    base = Base()
    r = prepare([{"question": "What is the capital of France?"}], base)
    assert not any("separated by commas" in q for q in base.asked) and len(r.sets["retain"]) > 24
    assert all(len(names) == len(set(names)) and all(n == n.strip() for n in names) for names in KINDS.values())


class Symbols(Base):
    """Says of every element two letters, and of what an element is something odd."""

    def answer(self, q: str) -> str:
        for name in KINDS["element"]:
            if re.search(rf"\b{name}\b", q):
                symbol = name[:2].capitalize() if "kind of thing" not in q else "Electrum"
                return f"{symbol}." if "one or two words" in q else f"The chemical symbol for {name} is {symbol}."
        return "A sentence about something else."


def test_lists_shorter_than_wanted_serve_and_say_the_kind() -> None:
    asked = ["krypton", "boron", "lithium", "nickel"]
    base = Symbols()
    r = prepare([{"question": f"What is the chemical symbol for {name}?"} for name in asked], base)
    assert len({row["fact"] for row in r.sets["retain"] + r.sets["neighbors_unseen"]}) >= 40
    assert "Kr is the chemical symbol for which element?" in base.asked
    assert not any("separated by commas" in q or "kind of thing" in q for q in base.asked)
