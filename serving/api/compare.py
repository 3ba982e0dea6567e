"""`POST /compare`: one question, several targets, measured side by side."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, assert_never

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from comparisons.results import Comparison
from comparisons.runner import ArmDelta, ArmFinished, ArmRepeated, Compared, CompareEvent, compare
from models.errors import NearfarError
from serving.api.body import read_fields
from serving.api.caller import choose, choose_several, policy_of
from serving.api.schemas import CompareBody, comparison_object, parse, result_object, sse, sse_error
from serving.api.security import require_key
from serving.api.streaming import event_stream, unless_client_leaves
from serving.api.votes import in_step
from serving.records import Asked, Records, blind_object, two_sides

router = APIRouter(dependencies=[Depends(require_key)])


@router.post("/compare")
async def compare_targets(request: Request) -> Response:
    """Ask every target the same and say how the answers and their figures differ.

    Models of this service begin cold: what one of them was asked before is no merit of its own. A hosted one's caches
    are out of reach; its `cached_tokens` tell.
    """
    fields = await read_fields(request)
    body = parse(CompareBody, fields)
    chosen = choose_several(request, body.targets, body.policy)
    if body.blind:
        chosen = await two_sides(request.app.state.services.records, request.state.caller.name, chosen)
    judge = choose(request, body.judge, body.policy, compared=True) if body.judge else None
    question = body.to_request(fields)
    comparison_id = f"cmp_{secrets.token_hex(8)}"
    keeping = Keeping(
        records=request.app.state.services.records,
        asked=Asked(
            request=replace(question, policy=policy_of(request, body.policy)),
            task=body.task,
            reference=body.reference,
            owner=request.state.caller.name,
            targets=tuple(chosen),
            parallel=body.parallel,
            blind=body.blind,
            measure=body.measure,
            tolerance=body.number_tolerance,
            repeats=body.repeats,
            judge=judge.name if judge else None,
        ),
        request_id=request.state.request_id,
    )
    await keeping.records.check()
    events = compare(
        replace(question, cache_salt=comparison_id, restart=not body.stream),  # unseen, a route may begin anew
        [target.answerer for target in chosen],
        reference=body.reference,
        parallel=body.parallel,
        rng=random.SystemRandom(),
        comparison_id=comparison_id,
        measure=body.measure,
        tolerance=body.number_tolerance,
        repeats=body.repeats,
        judge=judge.answerer if judge else None,
    )
    if body.stream:
        written = _in_step(events, keeping) if body.blind else _written(events, comparison_id, keeping)
        return await event_stream(request, written, sse_error(request))
    return JSONResponse(await unless_client_leaves(request, _whole(events, keeping)))


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Makes a comparison's object, and keeps it before anybody gets it."""

    records: Records
    asked: Asked
    request_id: str

    async def kept(self, comparison: Comparison) -> dict[str, Any]:
        """The object; of a blind one, its sides. Raises Unavailable where it cannot be kept."""
        shown = comparison_object(comparison, self.request_id)
        await self.records.keep(self.asked, comparison, shown)
        return blind_object(shown) if self.asked.blind else shown


async def _whole(events: AsyncGenerator[CompareEvent, None], keeping: Keeping) -> dict[str, Any]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Compared):
                return await keeping.kept(event.comparison)
    raise NearfarError("the comparison ended without a result")


async def _in_step(events: AsyncGenerator[CompareEvent, None], keeping: Keeping) -> AsyncGenerator[str, None]:
    """Both sides have answered before the first word of either is told: who was faster cannot be seen."""
    async with aclosing(in_step(await _whole(events, keeping))) as pieces:
        async for piece in pieces:
            yield piece


async def _written(
    events: AsyncGenerator[CompareEvent, None], comparison_id: str, keeping: Keeping
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        async for event in events:
            match event:
                case ArmDelta(target=target, text=text):
                    yield sse("delta", {"target": target, "text": text})
                case ArmFinished(result=result):
                    kind = "error" if result.finished is None else "finished"
                    yield sse(kind, result_object(comparison_id, result, keeping.request_id))
                case ArmRepeated(round=turn, result=result):
                    yield sse("repeat", {"round": turn, **result_object(comparison_id, result, keeping.request_id)})
                case Compared(comparison=comparison):
                    yield sse("comparison", await keeping.kept(comparison))
                case _:
                    assert_never(event)
