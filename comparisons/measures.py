"""Right or wrong against a reference, by rule."""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][+-]?\d{1,3})?")
_NUMBER_START = re.compile(r"[-.]\d")


def is_correct(text: str, reference: str | None) -> bool | None:
    """Whether `text` is the reference answer; None without a reference, or with a blank one.

    JSON objects and lists are compared as values, numbers as numbers ("1,000" is "1000.0"), all else by exact match
    after normalising: Unicode form, letter case, white space and surrounding punctuation do not count.

    It does not read meaning: no synonyms, no "two" for "2", no units ("5 cm" is not "5"), no answer found inside a
    sentence ("It is red." is not "red"), no partial credit, no code fences around JSON, no locale (a comma separates
    thousands only). A long answer that is right is counted as wrong: ask for a short one.
    """
    if reference is None or not reference.strip():
        return None
    return same_answer(text, reference)


def same_answer(left: str, right: str) -> bool:
    """Equality as `is_correct` has it, between two answers."""
    structures = _structure(left), _structure(right)
    if structures[0] is not None and structures[1] is not None:
        return _same_value(*structures)
    numbers = _number(left), _number(right)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return normalise(left) == normalise(right)


def normalise(text: str) -> str:
    """Case folded, white space collapsed, surrounding punctuation gone, unless nothing else is there.

    A sign or a decimal point right before a digit stays: "-5 degrees" is not "5 degrees".
    """
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    start, end = 0, len(plain)
    while start < end and _is_edge(plain[start]) and not _NUMBER_START.match(plain, start):
        start += 1
    while end > start and _is_edge(plain[end - 1]):
        end -= 1
    return plain[start:end] or plain


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character).startswith("P")


def _number(text: str) -> Decimal | None:
    plain = text.strip().replace("\N{MINUS SIGN}", "-").rstrip(".")
    if not any(character.isdigit() for character in plain) or not _NUMBER.fullmatch(plain):
        return None
    try:
        return Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return None


def _structure(text: str) -> object | None:
    """A JSON object or list, None for anything else."""
    if not text.strip().startswith(("{", "[")):
        return None
    try:
        value: object = json.loads(text, parse_float=Decimal)
    except (ValueError, RecursionError, InvalidOperation):
        return None
    return value


def _same_value(left: object, right: object) -> bool:
    """Equality of JSON values. Python's own would take true for 1."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_value(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_value, left, right))
    return isinstance(left, bool) == isinstance(right, bool) and left == right
