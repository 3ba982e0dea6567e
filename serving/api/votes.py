"""Blind comparisons: two sides without names, the vote that opens them, and the leaderboard of all votes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from comparisons.ballots import Ballots, Leaderboard, Middle, Ranked
from comparisons.rating import Winner
from comparisons.statistics import Interval
from models.errors import NotFound
from serving.api.body import Fields, read_json
from serving.api.records import checked_id, owner_of, records_of
from serving.api.schemas import parse, sse
from serving.api.security import require_key
from serving.records import record_object

router = APIRouter(dependencies=[Depends(require_key)])
TICK_S = 0.04
CHARACTERS = 4  # of each side at a time: 100 a second, about as fast as one reads along
LONGEST_S = 6.0  # long answers go faster, both sides alike


class VoteBody(BaseModel):
    """Fields of `POST /compare/{id}/vote`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    winner: Winner
    voter: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")]


async def in_step(shown: Mapping[str, Any]) -> AsyncGenerator[str, None]:
    """Both answers as server-sent events, as many characters of each at each tick of one clock."""
    texts = {each["side"]: each["text"] for each in shown["results"] if each["ok"]}
    longest = max(map(len, texts.values()), default=0)
    size = max(CHARACTERS, math.ceil(longest * TICK_S / LONGEST_S))
    for start in range(0, longest, size):
        pieces = ((side, text[start : start + size]) for side, text in texts.items())
        yield "".join(sse("delta", {"side": side, "text": piece}) for side, piece in pieces if piece)
        await asyncio.sleep(TICK_S)
    for each in shown["results"]:
        yield sse("finished" if each["ok"] else "error", each)
    yield sse("comparison", dict(shown))


@router.post("/compare/{comparison_id}/vote")
async def vote(request: Request, comparison_id: str) -> dict[str, Any]:
    """Say which side was better, once, and see who they were: the comparison with everything that was hidden."""
    body = parse(VoteBody, Fields(await read_json(request)))
    name, owner, records = checked_id(comparison_id), owner_of(request), records_of(request)
    await records.work(lambda store: Ballots(store).cast(name, owner=owner, voter=body.voter, winner=body.winner))
    record = await records.work(lambda store: store.get(name, owner=owner))
    if record is None:
        raise NotFound("there is no such comparison")
    return {"vote": body.model_dump(), **record_object(record, body.voter)}


@router.get("/leaderboard")
async def leaderboard(request: Request) -> dict[str, Any]:
    """The targets by the votes of this key, with what each one's answers took in the records."""
    owner = owner_of(request)
    return leaderboard_object(await records_of(request).work(lambda store: Ballots(store).leaderboard(owner)))


def leaderboard_object(found: Leaderboard) -> dict[str, Any]:
    """The object of `GET /leaderboard`."""
    ratings = found.ratings
    return {
        "method": ratings.method,
        "basis": ratings.basis,
        "votes": ratings.votes,
        "comparisons": ratings.comparisons,
        "targets": [_ranked_object(row) for row in found.rows],
    }


def _ranked_object(row: Ranked) -> dict[str, Any]:
    rating = row.rating
    medians: dict[str, Middle] = {
        "usd": row.usd,
        "total_ms": row.total_ms,
        "ttft_ms": row.ttft_ms,
        "bytes_sent": row.bytes_sent,
    }
    return {
        **asdict(rating),
        "share": _interval(rating.share),
        "strength": _interval(rating.strength),
        "medians": {name: asdict(middle) for name, middle in medians.items()},
        "left_device": row.left_device,
    }


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return interval and {name: round(value, 4) for name, value in interval._asdict().items()}
