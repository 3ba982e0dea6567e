"""A data set: questions about pictures, what is right, and the slices they count in. Files are read late."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from comparisons.corruptions import Corruption, corrupted
from comparisons.measures import EXACTLY, Measure, Score, Tolerance, score
from models.errors import BadRequest, InvalidValue
from models.images import Detail
from models.request import AnswerRequest, GenerationSettings, OutputFormat, Task, question


@dataclass(frozen=True, kw_only=True)
class Media:
    """A picture, document or video: where it lies, or its bytes. `corruption` is done to a picture when it is read."""

    source: Path | bytes = field(repr=False)
    corruption: Corruption | None = None
    seed: str = ""  # of the corruption

    def read(self) -> bytes:
        """Raises BadRequest where the file is gone, or is no picture that can be corrupted."""
        try:
            data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        except OSError as error:
            raise BadRequest(f"{self.source!s}: {error.strerror}") from error
        return corrupted(data, self.corruption, seed=self.seed) if self.corruption else data

    @property
    def identity(self) -> str:
        """What tells it from others without reading it: its name and size, or the hash of its bytes."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return f"{self.source.name} {self.source.stat().st_size}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question. Any of `references` is right; without one there is nothing to be right about."""

    row_id: str
    prompt: str | None = None  # None: the task's own
    images: tuple[Media, ...] = ()
    document: Media | None = None
    video: Media | None = None
    references: tuple[str, ...] = ()
    measure: Measure = "exact"
    tolerance: Tolerance = EXACTLY
    task: Task = "vqa"
    slices: tuple[str, ...] = ()
    detail: Detail | None = None  # None: the run's
    output: OutputFormat | None = None
    text_first: bool = False

    @classmethod
    def from_shown(cls, shown: Mapping[str, Any]) -> Self:
        """A row as a run's file shows it, to be scored again: its files are not there. Raises KeyError, TypeError."""
        corruption = shown.get("corruption")
        picture = Media(source=b"", corruption=Corruption(**corruption) if corruption else None)
        return cls(
            row_id=shown["row_id"],
            prompt=shown["prompt"],
            images=(picture,) if corruption else (),
            references=tuple(shown["references"]),
            measure=shown["measure"],
            tolerance=Tolerance(**shown.get("tolerance", {})),
            task=shown["task"],
            slices=tuple(shown["slices"]),
        )

    @property
    def is_corrupted(self) -> bool:
        """Whether something is done to its pictures: it is no input of its own."""
        return any(picture.corruption for picture in self.images)

    def request(self, settings: GenerationSettings, detail: Detail) -> AnswerRequest:
        """Reads the files. Raises BadRequest and its kin."""
        asked = question(
            self.prompt,
            tuple(picture.read() for picture in self.images),
            document=self.document.read() if self.document else None,
            video=self.video.read() if self.video else None,
            task=self.task,
            settings=settings,
            detail=self.detail or detail,
            output=self.output,
        )
        if not self.text_first:
            return asked
        (message,) = asked.messages
        *media, text = message.parts
        return replace(asked, messages=(replace(message, parts=(text, *media)),))

    def score(self, text: str) -> Score | None:
        """None without a reference."""
        return score(text, self.references, self.measure, self.tolerance) if self.references else None

    @property
    def shown(self) -> dict[str, object]:
        """For a run's file: all but the files themselves."""
        return {
            "row_id": self.row_id,
            "prompt": self.prompt,
            "references": self.references,
            "measure": self.measure,
            "task": self.task,
            "slices": self.slices,
            "files": [each.identity for each in self.files],
            "corruption": next((asdict(each.corruption) for each in self.images if each.corruption), None),
            "tolerance": asdict(self.tolerance),
        }

    @property
    def files(self) -> tuple[Media, ...]:
        """Pictures, document and video."""
        return (*self.images, *(each for each in (self.document, self.video) if each))

    @property
    def identity(self) -> tuple[object, ...]:
        """All that an answer depends on, as far as it is known without reading the files."""
        shown = [(each.identity, each.corruption.name if each.corruption else None) for each in self.files]
        right = (self.references, self.measure, self.tolerance.relative, self.tolerance.absolute)
        return (self.row_id, self.prompt, shown, right, self.task, self.detail, repr(self.output), self.text_first)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Rows in their order, each with an id of its own. `licence` is what is known of it, in words."""

    name: str
    rows: tuple[Row, ...]
    licence: str
    about: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise BadRequest(f"{self.name} has no rows")
        twice = [row_id for row_id, count in Counter(row.row_id for row in self.rows).items() if count > 1]
        if twice:
            raise BadRequest(f"{self.name}: the id {twice[0]!r} is given to more than one row")

    @property
    def fingerprint(self) -> str:
        """Changes with any row. Of files it knows name and size alone."""
        text = json.dumps([row.identity for row in self.rows], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def only(self, rows: Sequence[Row]) -> Dataset:
        """The same data set with those of its rows. Raises BadRequest where none is left."""
        return replace(self, rows=tuple(rows))

    def sample(self, limit: int | None, seed: int) -> Dataset:
        """At most so many rows, drawn by the seed, in their order."""
        if limit is None or limit >= len(self.rows):
            return self
        return self.only([self.rows[at] for at in sorted(random.Random(seed).sample(range(len(self.rows)), limit))])


def split(dataset: Dataset, share: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The rows, and that share of them set apart, both in their order.

    Rows about one picture stay together, and every combination of slices gives its share. Raises InvalidValue.
    """
    if not 0 <= share < 1:
        raise InvalidValue(f"a share is a number from 0 to below 1, got {share}")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in dataset.rows:
        groups.setdefault(tuple(each.identity for each in row.files) or (row.row_id,), []).append(row)
    strata: dict[tuple[str, ...], list[list[Row]]] = {}
    for group in groups.values():
        strata.setdefault(group[0].slices, []).append(group)
    rng, apart, owed = random.Random(seed), set[str](), 0.0
    for stratum in strata.values():
        owed += share * len(stratum)  # what rounding took from one goes to the next
        for group in rng.sample(stratum, min(round(owed), len(stratum))):
            owed -= 1
            apart |= {row.row_id for row in group}
    kept = tuple(row for row in dataset.rows if row.row_id not in apart)
    return kept, tuple(row for row in dataset.rows if row.row_id in apart)


def with_corruptions(dataset: Dataset, corruptions: Sequence[Corruption], seed: int) -> Dataset:
    """Every row as it is, and once more for each corruption, with slices that tell them apart.

    Raises BadRequest for a row without pictures: documents and videos stay as they are.
    """
    rows: list[Row] = []
    for row in dataset.rows:
        if not row.images or row.document or row.video:
            raise BadRequest(f"{dataset.name} row {row.row_id}: only pictures can be corrupted")
        rows.append(replace(row, slices=(*row.slices, "corruption=none")))
        for each in corruptions:
            pictures = [
                replace(picture, corruption=each, seed=f"{seed}:{row.row_id}:{place}")
                for place, picture in enumerate(row.images)
            ]
            name = f"{row.row_id}#{each.name}"
            rows.append(
                replace(row, row_id=name, images=tuple(pictures), slices=(*row.slices, f"corruption={each.name}"))
            )
    return replace(dataset, rows=tuple(rows))
