"""Incremental text is whole characters, and equal to the text decoded at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from models.tiny_scenes import BUNDLES
from models.tokenizer import IncrementalText, TextTokenizer

TOKENIZER = TextTokenizer(BUNDLES["tiny-scenes@int8"] / "tokenizer.json")


def pieces_of(ids: list[int]) -> list[str]:
    text = IncrementalText(TOKENIZER)
    return [*(text.push(token) for token in ids), text.flush()]


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole_and_none_is_half_a_character(text: str) -> None:
    pieces = pieces_of(TOKENIZER.encode_literal(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(3, 511), max_size=30))
def test_any_ids_join_to_what_they_decode_to_at_once(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)


def test_an_emoji_comes_in_one_piece() -> None:
    ids = TOKENIZER.encode_literal("a 🦊!")
    assert len(ids) > 4  # the vocabulary has only its bytes
    assert [piece for piece in pieces_of(ids) if "🦊" in piece]


def test_special_tokens_in_text_are_ordinary_pieces() -> None:
    image = TOKENIZER.marker("<image>")
    assert TOKENIZER.encode_markers("<image>") == [image]
    assert image not in TOKENIZER.encode_literal("<image>")
    assert TOKENIZER.decode(TOKENIZER.encode_literal("<image>")) == "<image>"
