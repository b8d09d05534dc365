"""What is said of data before a run: each remark where it belongs, none where it does not."""

from __future__ import annotations

import pytest

from peft_unlearn.data.advice import advice
from peft_unlearn.data.bundle import ForgetRetain

LANDS = ["France", "Spain", "Italy", "Japan", "Peru", "Cuba", "Egypt"]


def asked(
    land: str, question: str = "What is the capital of {}?", answer: str = "The capital of {0} is {0}ville."
) -> dict[str, str]:
    return {"question": question.format(land), "answer": answer.format(land), "value": f"{land}ville", "fact": land}


FORGET = [asked(x) for x in LANDS[:5]]
OTHER = [{"question": f"How much is {i} and {i}?", "answer": str(2 * i)} for i in range(6)]


def said(forget, retain, target="answer") -> list[str]:
    return [line.split(":")[0] for line in advice(ForgetRetain(forget, retain, target=target))]


def test_all_three_remarks() -> None:
    found = said(FORGET, OTHER)
    assert len(found) == 3 and "begin with 'the capital'" in found[0]
    assert "one wording" in found[1] and "no retain question" in found[2]


@pytest.mark.parametrize(
    ("forget", "retain", "target", "gone"),
    [
        (FORGET, OTHER, "value", "begin with"),
        ([*FORGET, asked("France", "Which city governs {}?")], OTHER, "answer", "one wording"),
        (FORGET, [asked("Cuba"), *OTHER], "answer", "no retain question"),
        ([asked(x, answer=a) for x, a in zip(LANDS, "ABCDEFG", strict=True)], OTHER, "answer", "begin with"),
    ],
)
def test_a_remark_goes_when_its_cause_does(forget, retain, target, gone) -> None:
    found = said(forget, retain, target)
    assert len(found) == 2 and not any(gone in line for line in found)


def test_nothing_is_said_of_few_rows_texts_and_embedded_data() -> None:
    assert said(FORGET[:3], OTHER) == []
    assert said([{"text": f"Text number {i} of many."} for i in range(9)], OTHER) == []
    assert advice(ForgetRetain.load("embedded:people")) == []
