from __future__ import annotations

import pytest

from comparisons.measures import is_correct, normalise


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("red", "red"),
        (" Red.\n", "red"),
        ("“Dark   red”", "dark red"),
        ("STRASSE", "straße"),
        ("cafe\u0301", "café"),
        ("1,000", "1000.0"),
        ("5.", "5"),
        (".5", "0.50"),
        ("1e3", "1000"),
        ("\N{MINUS SIGN}5", "-5"),
        ('{"a": 1, "b": [true, "x"]}', '{ "b": [true, "x"], "a": 1.0 }'),
        ("?", "?"),
    ],
)
def test_answers_that_differ_in_form_alone_are_right(text, reference):
    assert is_correct(text, reference) is True


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("blue", "red"),
        ("It is red.", "red"),
        ("", "red"),
        ("5", "-5"),
        ("-5 degrees", "5 degrees"),
        ("two", "2"),
        ("1,00", "100"),
        ("?", "!"),
        ('{"a": true}', '{"a": 1}'),
        ('{"a": 1}', '{"a": 1, "b": 2}'),
        ("[" * 100_000, "[]"),
        ("9" * 10_000, "red"),
        ("NaN", "red"),
        ("!" * 200_000, "red"),
    ],
)
def test_other_answers_are_wrong(text, reference):
    assert is_correct(text, reference) is False


@pytest.mark.parametrize("reference", [None, "", "  "])
def test_without_a_reference_nothing_is_right_or_wrong(reference):
    assert is_correct("red", reference) is None


def test_a_sign_before_a_digit_is_no_punctuation():
    assert normalise("(-5)") == "-5"
    assert normalise("- five") == "five"
