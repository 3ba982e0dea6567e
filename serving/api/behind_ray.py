"""In Ray's HTTP proxy, around it: what Ray itself refuses or leaves unfinished ends in an error of ours. Knows no Ray.

A replica's responses bear our request id in a header of their own, `request-id`; one without it is Ray's.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import DeadlineExceeded, NearfarError, Overloaded, Unavailable
from serving.api.errors import anthropic_error_object, error_object, error_response, openai_error_object
from serving.api.schemas import sse
from serving.api.security import request_id_of

RAYS_OWN = "/-/"  # where the proxy tells how it is itself
ID = "x-request-id"
log = logging.getLogger("nearfar.ray")


def middlewares() -> list[Middleware]:
    """What Ray's proxy asks for: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this function."""
    return [Middleware(OwnErrors)]


class OwnErrors:
    """ASGI middleware. Every request that is not for the proxy itself ends whole, or in an error of its dialect."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        MutableHeaders(scope=scope)[ID] = request_id  # or Ray would choose one, and the replica another
        answer = _Answer(send, request_id)
        try:
            await self._app(scope, answer.receive_of(receive), answer.send)
        finally:
            await answer.end(scope, receive)


class _Answer:
    """One response on its way to the client."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._rays_own: NearfarError | None = None
        self._begun = self._whole = self._streams = self._left = False

    def receive_of(self, receive: Receive) -> Receive:
        """The same, and it is noticed when the client leaves: nothing is owed to it then."""

        async def noticed() -> Message:
            message = await receive()
            self._left = self._left or message["type"] == "http.disconnect"
            return message

        return noticed

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if "request-id" not in headers:
                self._rays_own = _error_of(message["status"], headers)
            else:
                headers[ID] = self._request_id  # once: Ray's proxy had added it to ours
                self._streams = headers.get("content-type", "").startswith("text/event-stream")
        if self._rays_own:
            return
        self._begun = True
        self._whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end(self, scope: Scope, receive: Receive) -> None:
        """What is still owed."""
        path, request_id = scope["path"], self._request_id
        if self._whole or self._left:
            return
        error = self._rays_own or Unavailable("the replica that worked on this request is gone; it may be sent again")
        log.warning("request_id=%s path=%s error=%s: %s", request_id, path[:200], error.type, error.message)
        if not self._begun:
            response = error_response(error, path, request_id)
            response.headers.update({ID: request_id, "request-id": request_id})
            await response(scope, receive, self._send)
        elif self._streams:
            piece = stream_error(error, path, request_id).encode()
            await self._send({"type": "http.response.body", "body": piece, "more_body": False})
        # Else a plain body is torn: the server closes the connection before its stated length.


def _error_of(status: int, headers: Headers) -> NearfarError:
    """What Ray's proxy means by a status of its own."""
    match status:
        case 429:
            wait = headers.get("retry-after", "")
            retry_after_s = int(wait) if wait.isdecimal() else 1
            return Overloaded("all replicas are full; try again shortly", retry_after_s=retry_after_s)
        case 408:
            return DeadlineExceeded("the answer was not whole within the time that the request gave Ray's proxy")
        case 404 | 503:
            return Unavailable("no replica takes requests now")
        case _:
            return Unavailable("the request was not brought to its end; Ray's log says how")


def stream_error(error: NearfarError, path: str, request_id: str) -> str:
    """The last event of a stream that has begun and fails, in the dialect that its path speaks."""
    if path.startswith("/v1/messages"):
        return sse("error", anthropic_error_object(error, request_id))
    told = openai_error_object if path.startswith("/v1/") else error_object
    return sse("error", {"error": told(error, request_id)})
