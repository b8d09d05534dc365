"""A shape names everything that does not fit, each with its place and the nearest spelling."""

from typing import Any

import pytest

from peft_unlearn.errors import Errors, UserError
from peft_unlearn.folder import schema as s

ROW = s.record(
    {
        "name": s.matching("[a-z]+", "lower-case letters"),
        "scale": s.maybe(s.FINITE),
        "kind": s.one_of("forget", "retain"),
    },
    required=("name",),
)
ON = s.shape("true or false", lambda v: isinstance(v, bool))
FILE = s.record({
    "rows": s.list_of(ROW), "seeds": s.mapping_of(s.COUNT), "on": ON, "rate": s.POSITIVE, "about": s.ANY,
    "metrics": s.list_of(s.one_of("rouge_l", "probability", what="a metric")),
})  # fmt: skip


def complaints(value: Any) -> list[str]:
    errors = Errors()
    FILE(value, "", errors)
    return errors.messages


def test_what_fits() -> None:
    row = {"name": "a", "scale": None, "kind": "retain"}
    value = {"rows": [row, {"name": "b", "scale": 1}], "seeds": {"x": 1}, "on": False, "rate": 0.5, "about": ()}
    assert complaints(value) == complaints({}) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "it must be a mapping, not a list"),
        ({"rows": {}}, "rows must be a list, not a mapping"),
        ({"row": []}, "unknown key 'row'. Did you mean 'rows'?"),
        ({"rows": [{"name": "a", "kinds": 1}]}, "unknown key 'kinds' in rows[0]. Did you mean 'kind'?"),
        ({"rows": [{}]}, "rows[0].name is missing"),
        ({"rows": [{"name": "A"}]}, "rows[0].name must be lower-case letters, not 'A'"),
        ({"rows": [{"name": "a", "scale": float("nan")}]}, "rows[0].scale must be a finite number, not nan"),
        ({"rows": [{"name": "a", "kind": "retian"}]},
         "rows[0].kind must be forget or retain, not 'retian'. Did you mean 'retain'?"),
        ({"rows": [{"name": "a", "kind": 5}]}, "rows[0].kind must be forget or retain, not 5"),
        ({"seeds": {"x": True}}, "seeds.x must be a whole number from 1 on, not true"),
        ({"seeds": {"x": 0}}, "seeds.x must be a whole number from 1 on, not 0"),
        ({"on": None}, "on must be true or false, not null"),
        ({"rate": -1}, "rate must be a number above 0, not -1"),
        ({"metrics": ["rouge"]}, "metrics[0] must be a metric, not 'rouge'. Did you mean 'rouge_l'?"),
        ({"metrics": ["x"]}, "metrics[0] must be a metric, not 'x'. Known: probability, rouge_l."),
    ],
)  # fmt: skip
def test_what_does_not(value: Any, message: str) -> None:
    assert complaints(value) == [message]


def test_all_at_once() -> None:
    with pytest.raises(UserError, match=r"f\.yaml: 3 problems") as e:
        s.require({"on": 1, "rate": "fast", "more": 1}, FILE, "f.yaml")
    assert len(e.value.problems) == 3
