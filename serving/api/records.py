"""`GET /compare`: the comparisons that were kept, each for the key that asked; one of them, all as a file, deletion."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from comparisons.store import MAX_PAGE, Filter
from models.errors import NotFound
from models.request import Task
from serving.api.security import require_key
from serving.records import Records, exported, record_object, seconds_of, summary_object

router = APIRouter(dependencies=[Depends(require_key)])
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
Word = Annotated[str, Field(max_length=300, pattern=r"^[^\x00]*$")]


class RecordsQuery(BaseModel):
    """Which records; all that is said must fit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Word | None = Field(None, description="an arm has this target")
    task: Task | None = None
    input: Word | None = Field(None, description="sha256 of the input, as a record has it")
    correct: bool | None = Field(None, description="an arm, of that target where one is named, was right, or wrong")
    since: datetime | None = Field(None, description="UTC where no zone is given")
    until: datetime | None = None

    def to_filter(self, owner: str) -> Filter:
        """The noun below HTTP."""
        return Filter(
            owner=owner,
            target=self.target,
            task=self.task,
            input_sha256=self.input,
            correct=self.correct,
            since=seconds_of(self.since),
            until=seconds_of(self.until),
        )


class PageQuery(RecordsQuery):
    """Which records, and which page of them."""

    limit: int = Field(50, ge=1, le=MAX_PAGE)
    cursor: Word | None = Field(None, description="`next` of the page before")
    thumbnails: bool = Field(False, description="with each record's thumbnail, as a data URL")


class OneQuery(BaseModel):
    """Who looks at a comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    voter: Word | None = None


class ExportQuery(RecordsQuery):
    """Which records, and as what."""

    format: Literal["jsonl", "csv"] = "jsonl"


@router.get("/compare")
async def listing(request: Request, query: Annotated[PageQuery, Query()]) -> dict[str, Any]:
    """The comparisons of this key, the newest first. `next` is the cursor of the page behind; null at the end."""
    where = query.to_filter(owner_of(request))
    page = await records_of(request).work(
        lambda store: store.page(where, limit=query.limit, cursor=query.cursor, whole=query.thumbnails)
    )
    return {"comparisons": [summary_object(record) for record in page.records], "next": page.next}


@router.get("/compare/export", response_class=StreamingResponse)
async def export(request: Request, query: Annotated[ExportQuery, Query()]) -> Response:
    """All comparisons of this key that fit: whole, one JSON object a line, or as CSV, one line for each arm."""
    where = query.to_filter(owner_of(request))
    pieces = exported(await records_of(request).work(lambda store: store.all(where)), query.format)
    first = await asyncio.to_thread(next, pieces, "")  # an error of the store still has its own status

    def all_pieces() -> Iterator[str]:
        yield first
        yield from pieces

    kind = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}[query.format]
    disposition = f'attachment; filename="comparisons.{query.format}"'
    return StreamingResponse(all_pieces(), media_type=kind, headers={"content-disposition": disposition})


@router.get("/compare/{comparison_id}")
async def one(request: Request, comparison_id: str, query: Annotated[OneQuery, Query()]) -> dict[str, Any]:
    """A comparison as it was answered, with its input's hash and thumbnail, raw events, settings and versions.

    A blind one shows its sides alone until `voter` has voted; without `voter`, until anybody has.
    """
    name, owner = checked_id(comparison_id), owner_of(request)
    record = await records_of(request).work(lambda store: store.get(name, owner=owner))
    if record is None:
        raise NotFound("there is no such comparison")
    return record_object(record, query.voter)


@router.delete("/compare/{comparison_id}", status_code=204)
async def remove(request: Request, comparison_id: str) -> Response:
    """Remove a comparison for good, its bytes in the file too."""
    where = Filter(owner=owner_of(request), ids=(checked_id(comparison_id),))
    if not await records_of(request).work(lambda store: store.delete(where)):
        raise NotFound("there is no such comparison")
    return Response(status_code=204)


def records_of(request: Request) -> Records:
    """What this service keeps."""
    records: Records = request.app.state.services.records
    return records


def owner_of(request: Request) -> str:
    """The name of the key that asks: each sees its own."""
    name: str = request.state.caller.name
    return name


def checked_id(comparison_id: str) -> str:
    """Raises NotFound for what is no comparison's id."""
    if not _ID.fullmatch(comparison_id):
        raise NotFound("there is no such comparison")
    return comparison_id
