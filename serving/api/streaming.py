"""Answers over HTTP: whole or as server-sent events, and given up as soon as the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

Result = TypeVar("Result")


class ClientLeft(Exception):
    """The connection closed before the answer was whole; nobody reads what is raised."""


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, and cancel it when the client disconnects. Raises ClientLeft then.

    A streamed response is cancelled by the server itself; a plain one would otherwise be computed for nobody.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """A text/event-stream response. No proxy may hold its pieces back."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
