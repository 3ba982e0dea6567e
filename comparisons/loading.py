"""Data sets from local files: JSON lines, a folder, or a published benchmark's own layout. Nothing is fetched.

Everything is checked before the first question is asked; an error names the file, the line and the field.
"""

from __future__ import annotations

import base64
import binascii
import csv
import difflib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from comparisons.dataset import Dataset, Media, Row
from comparisons.layouts import LAYOUTS, Layout
from comparisons.measures import Measure, Tolerance, check_reference
from models.errors import BadRequest
from models.images import Detail, known_format
from models.request import MAX_IMAGES, JsonFormat, Task

METADATA = "metadata.jsonl"
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
UNKNOWN_LICENCE = "not stated"
FILE_KINDS = {
    "image": ("image/jpeg", "image/png", "image/webp", "image/gif"),
    "document": ("PDF", "TIFF"),
    "video": ("MP4", "WebM", "image/gif"),
}
FileKind = Literal["image", "document", "video"]


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What holds for rows that do not say themselves, and where pictures lie if not beside the file."""

    prompt: str | None = None
    task: Task = "vqa"
    measure: Measure | None = None
    images: Path | None = None


class _Line(BaseModel):
    """A row as it is written. Other fields are ignored, unless they look like a slip of one of these."""

    model_config = ConfigDict(strict=True, frozen=True)

    id: str | int | None = None
    image: str | None = None
    file_name: str | None = None  # what folders of pictures for other tools call it
    images: list[str] = Field(default=[], max_length=MAX_IMAGES)
    document: str | None = None
    video: str | None = None
    prompt: str | None = None
    reference: Any = None
    measure: Measure | None = None
    task: Task | None = None
    detail: Detail | None = None
    tolerance: float | None = Field(None, ge=0, allow_inf_nan=False)  # a share of the right number
    json_schema: dict[str, Any] | None = Field(None, alias="schema")  # to which the answer is held
    slices: list[str] | dict[str, str | int | float | bool] = []


FIELDS = [field.alias or name for name, field in _Line.model_fields.items()]


class _Place(NamedTuple):
    """Where a row stands, for errors."""

    file: Path
    number: int
    unit: str = "line"

    def error(self, field: str, why: str) -> BadRequest:
        where = f"{self.file.name} {self.unit} {self.number}"
        return BadRequest(f"{where}, {field}: {why}" if field else f"{where}: {why}")


def load(path: Path, defaults: Defaults) -> Dataset:
    """The data set of a file or folder. Raises BadRequest that names what is wrong and where."""
    if path.is_dir():
        metadata = path / METADATA
        return load(metadata, defaults) if metadata.is_file() else _folder(path, defaults)
    if path.suffix == ".tsv":
        records, unit = _tsv(path), "row"
    else:
        records, unit = _json(path)
    if not records:
        raise BadRequest(f"{path.name} has no rows")
    layout = next((each for each in LAYOUTS if each.fits(records[0][1])), None)
    if layout is None and unit != "line":
        raise BadRequest(f"{path.name} is in no layout that is known: JSON lines, or as one of {_layout_names()}")
    folders = [defaults.images] if defaults.images else [path.parent]
    if layout:
        folders = [folder / name for folder in folders for name in ("", *layout.folders)]
    rows = [_row(record, _Place(path, number, unit), folders, defaults, layout) for number, record in records]
    name = path.parent.name if path.name == METADATA else path.stem
    if layout:
        return Dataset(name=f"{layout.name}-{name}", rows=tuple(rows), licence=layout.licence, about=layout.about)
    return Dataset(name=name or "data", rows=tuple(rows), licence=UNKNOWN_LICENCE)


def _layout_names() -> str:
    return ", ".join(layout.name for layout in LAYOUTS)


def _folder(path: Path, defaults: Defaults) -> Dataset:
    """Pictures, each with its right answer in a text file of the same name, if there is one."""
    rows = []
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in PICTURES)
    if not found:
        others = " It holds parquet files, which are not read." if any(path.rglob("*.parquet")) else ""
        raise BadRequest(f"{path} holds neither {METADATA} nor pictures.{others}")
    for number, picture in enumerate(found, 1):
        place = _Place(path, number, "picture")
        beside = picture.with_suffix(".txt")
        line: dict[str, Any] = {"id": picture.name, "image": picture.name}
        if beside.is_file():
            line["reference"] = _text(beside).strip()
        rows.append(_row(line, place, [path], defaults, None))
    return Dataset(name=path.resolve().name, rows=tuple(rows), licence=UNKNOWN_LICENCE)


def _json(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], str]:
    """Records with their numbers: of a JSON list, of the list in an object's `data`, or of JSON lines."""
    text = _text(path)
    try:
        whole = json.loads(text)
    except ValueError:
        return [(number, _object(line, _Place(path, number))) for number, line in _lines(text)], "line"
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        whole = whole["data"]
    if isinstance(whole, dict):  # a single line
        return [(1, whole)], "line"
    if not isinstance(whole, list) or not all(isinstance(each, dict) for each in whole):
        raise BadRequest(f"{path.name} holds no list of objects")
    return list(enumerate(whole, 1)), "record"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _object(line: str, place: _Place) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise place.error("", f"is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise place.error("", "is no JSON object")
    return value


def _tsv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # pictures in base64
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t", restkey="")
    return [(number, {name: value for name, value in row.items() if value}) for number, row in enumerate(reader, 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadRequest(f"{path.name} line {line}: is not UTF-8") from error


def _row(
    record: dict[str, Any], place: _Place, folders: Sequence[Path], defaults: Defaults, layout: Layout | None
) -> Row:
    line = _checked(layout.line(record) if layout else record, place, layout)
    task = line.task or defaults.task
    prompt = line.prompt or defaults.prompt
    if task == "vqa" and not (prompt and prompt.strip()):
        raise place.error("prompt", "is missing; write one, give --prompt for all rows, or a task that has its own")
    measure = line.measure or defaults.measure or _usual_measure(line.reference, task)
    names = [name for name in (line.image or line.file_name, *line.images) if name]
    pictures = tuple(_media(name, "image", place, folders) for name in names)
    if len(pictures) > MAX_IMAGES:
        raise place.error("images", f"{len(pictures)} pictures, at most {MAX_IMAGES} in one request")
    return Row(
        row_id=str(place.number if line.id is None else line.id),
        prompt=prompt,
        images=pictures,
        document=_media(line.document, "document", place, folders) if line.document else None,
        video=_media(line.video, "video", place, folders) if line.video else None,
        references=_references(line.reference, measure, place),
        measure=measure,
        tolerance=Tolerance(relative=line.tolerance or 0.0),
        task=task,
        slices=_slices(line.slices),
        detail=line.detail,
        output=JsonFormat(schema=line.json_schema) if line.json_schema else None,
    )


def as_line(row: Row) -> str:
    """The row as `load` reads it in a file of JSON lines anywhere on this machine: files by their whole path."""

    def named(media: Media) -> str:
        if isinstance(media.source, Path):
            return str(media.source.resolve())
        return f"data:;base64,{base64.b64encode(media.source).decode()}"

    line: dict[str, Any] = {
        "id": row.row_id,
        "images": list(map(named, row.images)),
        "document": named(row.document) if row.document else None,
        "video": named(row.video) if row.video else None,
        "prompt": row.prompt,
        "reference": row.references[0] if len(row.references) == 1 else list(row.references) or None,
        "measure": row.measure,
        "task": row.task,
        "detail": row.detail,
        "tolerance": row.tolerance.relative or None,
        "schema": row.output.schema if isinstance(row.output, JsonFormat) else None,
        "slices": list(row.slices),
    }
    return json.dumps({name: value for name, value in line.items() if value not in (None, [])}, ensure_ascii=False)


def _checked(record: dict[str, Any], place: _Place, layout: Layout | None) -> _Line:
    for name in record:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if layout is None and near and name not in FIELDS:
            raise place.error(name, f"there is no such field; did you mean {near[0]}?")
    try:
        return _Line.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise place.error(str(first["loc"][0]), first["msg"]) from error


def _usual_measure(reference: Any, task: Task) -> Measure:
    if isinstance(reference, dict):
        return "json"
    return "anls" if task in ("ocr", "document") else "exact"


def _references(value: Any, measure: Measure, place: _Place) -> tuple[str, ...]:
    """As texts. Raises BadRequest for what is none, and for what the measure cannot compare."""
    whole = measure in ("json", "mentions")  # a list is one reference then
    several = value if isinstance(value, list) and not whole else [] if value is None else [value]
    if value == [] or any(
        each is None or isinstance(each, bool) or (isinstance(each, list) and not whole) for each in several
    ):
        raise place.error("reference", "must be a text, a number, an object, or a list of them with at least one")
    texts = tuple(each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in several)
    try:
        for text in texts:
            check_reference(text, measure)
    except BadRequest as error:
        raise place.error("reference", error.message) from error
    return texts


def _slices(given: list[str] | dict[str, str | int | float | bool]) -> tuple[str, ...]:
    named = given if isinstance(given, list) else [f"{name}={value}" for name, value in given.items()]
    return tuple(dict.fromkeys(named))


def _media(name: str, kind: FileKind, place: _Place, folders: Sequence[Path]) -> Media:
    """A file or a data URL, told by its first bytes to be what it should be."""
    if name.startswith("data:"):
        source: Path | bytes = _decoded(name, kind, place)
    elif name.startswith(("http://", "https://")):
        raise place.error(kind, "is an address; nothing is fetched: save it as a file")
    else:
        candidates = [folder / part for folder in folders for part in dict.fromkeys((name, Path(name).name))]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise place.error(kind, f"{name} is not there, seen from {folders[0]}")
        source = found
    kinds = FILE_KINDS[kind]
    if known_format(_head(source, kind, place)) not in kinds:
        wanted = ", ".join(each.removeprefix("image/").upper() if "/" in each else each for each in kinds)
        raise place.error(kind, f"{'it' if isinstance(source, bytes) else name} is none of {wanted} by its content")
    return Media(source=source)


def _head(source: Path | bytes, kind: FileKind, place: _Place) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        with source.open("rb") as file:
            return file.read(4096)
    except OSError as error:
        raise place.error(kind, f"{source.name}: {error.strerror}") from error


def _decoded(url: str, kind: FileKind, place: _Place) -> bytes:
    head, _, payload = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise place.error(kind, "a data URL must read data:<type>;base64,<data>") from error
