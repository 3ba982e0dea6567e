"""The file of one evaluation: what was run, on which rows, each answer. A line is on disk before the next question.

Each time that it is begun or gone on with, a line has the versions of all targets; each row, one with its input's hash
and thumbnail.

A process may be killed at any moment: what is lost is the answers that were not whole. A line goes before each question
that may cost money, so that what may have been paid for is known. One process writes at a time.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Self

from comparisons.dataset import Row
from comparisons.records import InputRecord
from models.errors import BadRequest, Unavailable

FORMAT = 1


class Ask(NamedTuple):
    """One question to one target, for the first time (0) or again."""

    row_id: str
    target: str
    repeat: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    """How one asking ended. Exactly one of `text` and `error` is set; what was not measured is None.

    `at_once`: how many questions this run had in hand at the time, of this and other targets. `usd_counted`: what a
    dollar cap counts for it, which is the most that it can have cost where the cost is not known.
    """

    ask: Ask
    text: str | None = None
    error: str | None = None
    error_type: str | None = None
    score: float | None = None
    correct: bool | None = None
    order: int = 0  # among the targets of its row
    at_once: int = 1
    model: str | None = None
    finish_reason: str | None = None
    confidence: float | None = None
    load_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    cache_saved_usd: float | None = None
    usd: float | None = None
    usd_counted: float = 0.0
    bytes_sent: int | None = None
    left_device: bool | None = None
    destination: str | None = None
    model_bytes: int | None = None
    process_peak_bytes: int | None = None
    images: tuple[str, ...] = ()  # sha256 of what was asked about


class Seen(NamedTuple):
    """What a row asked about, words and files: its hash, and a picture of it where there is one."""

    sha256: str
    thumbnail: bytes | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's file as it was read, and that content's hash. `sessions`: each time it was begun or gone on with."""

    path: Path
    sha256: str
    header: Mapping[str, Any]
    sessions: tuple[Mapping[str, Any], ...]
    rows: tuple[Row, ...]
    inputs: Mapping[str, Seen]
    answers: Mapping[Ask, Answered]


def read_run(path: Path) -> Run:
    """Read it and leave it alone: another process may be writing at its end. Raises BadRequest."""
    try:
        with FileIO(path) as opened:
            run, content = RunFile(path=path, _file=opened), opened.read()
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    whole, first, lines = _split(path, content)
    _check_format(path, first)
    for number, line in enumerate(lines, 2):
        run._take(number, line)
    try:
        rows = tuple(Row.from_shown(shown) for shown in first["rows"])
    except (KeyError, TypeError) as error:
        raise BadRequest(f"{path.name} line 1: its rows are none of an evaluation") from error
    return Run(
        path=path,
        sha256=hashlib.sha256(whole).hexdigest(),
        header=first,
        sessions=tuple(run._sessions),
        rows=rows,
        inputs=run.inputs,
        answers=run.answers,
    )


@dataclass(kw_only=True)
class RunFile:
    """The lines so far, and the file that takes the next ones."""

    path: Path
    answers: dict[Ask, Answered] = field(default_factory=dict)
    inputs: dict[str, Seen] = field(default_factory=dict)  # by the row's id
    usd_counted: float = 0.0  # what a dollar cap has to count so far, what left and has no known end included
    _asked: dict[Ask, float] = field(default_factory=dict)
    _sessions: list[Mapping[str, Any]] = field(default_factory=list)
    _file: FileIO

    @classmethod
    def begin(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """A new one. Raises BadRequest where there is a file of that name, Unavailable where none can be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # For its owner alone: questions and answers may be private.
            opened = FileIO(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600))
        except FileExistsError:
            raise BadRequest(f"{path} is there already: --resume goes on with it, --out names another") from None
        except OSError as error:
            raise Unavailable(f"{path}: {error.strerror}") from error
        run = cls(path=path, _file=opened)
        run._lock()
        try:
            run._write({"kind": "run", "format": FORMAT, **header})
        except Unavailable:
            run.close()
            path.unlink()
            raise
        return run

    @classmethod
    def resume(cls, path: Path, header: Mapping[str, Any]) -> Self:
        """Go on with one. A line that was cut off is dropped. Raises BadRequest where it is of another run."""
        try:
            opened = FileIO(path, "r+")
        except OSError as error:
            raise BadRequest(f"{path}: {error.strerror}") from error
        run = cls(path=path, _file=opened)
        run._lock()
        try:
            run._read(header)
        except BadRequest:
            run.close()
            raise
        return run

    def _read(self, header: Mapping[str, Any]) -> None:
        """Nothing is changed before all of it is known to be of this run."""
        whole, first, lines = _split(self.path, self._file.read())
        self._check_header(first, header)
        for number, line in enumerate(lines, 2):
            self._take(number, line)
        self.usd_counted += sum(self._asked.values())
        self._file.truncate(len(whole))
        self._file.seek(0, os.SEEK_END)

    def note_session(self, begun: str, versions: Mapping[str, Mapping[str, Any]]) -> None:
        """When it goes on, and what makes the answers of each target from then on."""
        self._write({"kind": "session", "begun": begun, "versions": versions})

    def note_input(self, row_id: str, found: InputRecord) -> None:
        """Once for each row, before it is asked."""
        picture = base64.b64encode(found.thumbnail).decode() if found.thumbnail else None
        self._write({"kind": "input", "row_id": row_id, "sha256": found.sha256, "thumbnail": picture})
        self.inputs[row_id] = Seen(found.sha256, found.thumbnail)

    def note_asking(self, ask: Ask, at_most_usd: float) -> None:
        """Before a question leaves that may cost money."""
        self._write({"kind": "asked", **ask._asdict(), "usd_at_most": at_most_usd})

    def add(self, answered: Answered) -> None:
        """Raises Unavailable where the disk does not take it."""
        shown = {name: value for name, value in asdict(answered).items() if name != "ask" and value is not None}
        self._write({"kind": "answer", **answered.ask._asdict(), **shown})
        self._keep(answered)

    def _keep(self, answered: Answered) -> None:
        """An answer that another one replaces has been paid for all the same."""
        self.usd_counted += answered.usd_counted
        self.answers[answered.ask] = answered

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise Unavailable(f"{self.path} is being written by another process") from None

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(data) < len(data):  # the rest did not fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise Unavailable(f"{self.path}: {error.strerror}; what was answered before is kept") from error

    def _check_header(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        _check_format(self.path, found)
        for name in ("dataset", "targets", "repeats", "seed", "max_tokens", "detail", "reduction"):
            if found.get(name) != wanted[name]:
                raise BadRequest(f"{self.path} is of another run: its {name} differs")

    def _take(self, number: int, line: Mapping[str, Any]) -> None:
        try:
            match line["kind"]:
                case "session":
                    self._sessions.append(line)
                case "input":
                    picture = line["thumbnail"]
                    self.inputs[line["row_id"]] = Seen(line["sha256"], picture and base64.b64decode(picture))
                case "asked":
                    ask = _ask_of(line)
                    self.usd_counted += self._asked.pop(ask, 0.0)
                    self._asked[ask] = float(line["usd_at_most"])
                case _:
                    known = {name: line[name] for name in Answered.__dataclass_fields__ if name in line}
                    ask = _ask_of(line)
                    self._asked.pop(ask, None)
                    self._keep(Answered(**{**known, "ask": ask, "images": tuple(line.get("images", ()))}))
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"{self.path.name} line {number}: is no line of an evaluation") from error


def _ask_of(line: Mapping[str, Any]) -> Ask:
    return Ask(line["row_id"], line["target"], line["repeat"])


def _check_format(path: Path, header: Mapping[str, Any]) -> None:
    if header.get("kind") != "run" or header.get("format") != FORMAT:
        raise BadRequest(f"{path} is no file of an evaluation that this version reads")


def _split(path: Path, content: bytes) -> tuple[bytes, Mapping[str, Any], list[dict[str, Any]]]:
    """What is whole of it, its first line, and the others: a line that was cut off is no line."""
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = [_parsed(path, number, line) for number, line in enumerate(whole.splitlines(), 1)] or [{}]
    return whole, first, lines


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"{path.name} line {number}: is not JSON") from error
    return value if isinstance(value, dict) else {}
