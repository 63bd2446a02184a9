"""JSON is strict on both ways: what moesim writes every other reader takes, and what it reads is no other language."""

import json
import math

import pytest

from moesim.errors import UserError
from moesim.strict_json import json_text, parse_json


def test_finite_values_read_back_equal() -> None:
    value = {"a": [1, 2.5, None, True, "\u00e9"], "b": {"c": 1e308, "d": 5e-324, "e": -0.0}}
    for layout in ({}, {"indent": 1}, {"separators": (",", ":")}, {"sort_keys": True}, {"ensure_ascii": False}):
        assert parse_json(json_text(value, **layout)) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda number: {"cost": {"per_step": number}}, "cost.per_step is "),
        (lambda number: {"range": [1.0, number]}, "range.1 is "),
        (lambda number: [{"a": ({"b": number},)}], "0.a.0.b is "),
        (lambda number: number, "a result is "),
    ],
)
def test_a_number_that_is_not_finite_is_named_and_not_written(number, wrap, place) -> None:
    with pytest.raises(UserError) as error:
        json_text(wrap(number))
    assert str(error.value).startswith(f"{place}{number}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["NaN", '{"a": [Infinity]}', "[-Infinity]", "1e999", "[" * 100_000, "", "{", '{"a": 1} x']
)
def test_what_is_not_strict_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_the_text_is_what_the_standard_library_writes() -> None:
    value = {"b": 0.1, "a": [3, {"c": "x"}]}
    assert json_text(value, indent=1, sort_keys=True) == json.dumps(value, indent=1, sort_keys=True)


def test_constants_that_others_write_are_texts_where_asked_for() -> None:
    assert parse_json('{"a": [0.0, Infinity], "b": NaN, "c": -Infinity}', constants=True) == {
        "a": [0.0, "Infinity"],
        "b": "NaN",
        "c": "-Infinity",
    }
