"""Ten pictures with a question each, and a text to continue: what a model is checked on where it will run.

Where the pictures come from and under which licence: README.md beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from models.images import Detail

FOLDER = Path(__file__).resolve().parent


class Specimen(NamedTuple):
    """One picture, the question about it, and how finely it is cut."""

    file: str
    question: str
    detail: Detail = "auto"

    def read(self) -> bytes:
        return (FOLDER / self.file).read_bytes()


# In the order in which a check that has little time takes them: unlike ones first.
SPECIMENS = (
    Specimen("cat.jpg", "What animal is this?"),
    Specimen("chart.png", "Which month has the highest bar, and what is its value?"),
    Specimen("letter.jpg", "Who wrote this letter, and what does the repair cost?"),
    Specimen("sign.png", "What number is on the sign?"),
    Specimen("photographer.jpg", "What is the man doing?"),
    Specimen("receipt.png", "What is the total on this receipt?", "high"),
    Specimen("coffee.jpg", "Describe this picture."),
    Specimen("rocket.jpg", "Is it day or night in this picture?"),
    Specimen("writing.png", "What kind of writing is this?"),
    Specimen("galaxies.jpg", "What does this picture show?"),
)


def text() -> str:
    """About 200 words of plain English prose, on one line."""
    return " ".join((FOLDER / "text.txt").read_text(encoding="utf-8").split())
