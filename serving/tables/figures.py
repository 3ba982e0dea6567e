"""Figures in words, as every table of a terminal has them. A figure that was not measured is a dash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.text import Text

from comparisons import cost

Format = Callable[[Any], str]


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def dollars(value: float | None) -> str:
    return "-" if value is None else cost.dollars(value)


def plain(value: Any) -> str:
    return "-" if value is None else str(value)


def plain_text(cell: str) -> Text:
    """A model's words as they are: no markup, no control characters for the terminal."""
    return Text("".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in cell))


def bounded(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
