"""Figures in words, as every table of a terminal has them. A figure that was not measured is a dash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.text import Text

Format = Callable[[Any], str]


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def size(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def dollars(value: float | None) -> str:
    """What is less than a millionth is not shown as nothing."""
    if not value:
        return "-" if value is None else "$0"
    size = abs(value)
    return f"{'-' * (value < 0)}${f'{size:.2f}' if size >= 1 else f'{size:.6f}' if size >= 1e-5 else f'{size:.1e}'}"


def plain(value: Any) -> str:
    return "-" if value is None else str(value)


def plain_text(cell: str) -> Text:
    """A model's words as they are: no markup, no control characters for the terminal."""
    return Text("".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in cell))


def bounded(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
