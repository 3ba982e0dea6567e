"""What stands before every route: Host allow-list, cross-site rule, body caps, request ids, the log; the key check."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import Forbidden, NearfarError, PayloadTooLarge, RequestTimeout
from serving.api.caller import Caller
from serving.api.errors import error_response
from serving.keys import KeyRing
from serving.metrics import Metrics
from serving.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


_PROBES = ("/health", "/ready", "/metrics")
log = logging.getLogger("nearfar.access")


async def require_key(request: Request) -> None:
    """A route's dependency: with keys configured, one must come as Bearer token or `x-api-key`.

    Where both come, one that is right is enough: clients and proxies add a header of their own. `x-api-key` goes first.
    A POST counts against the key's limits, until its response is whole. Raises Unauthorized and RateLimited.
    """
    keys: KeyRing = request.app.state.keys
    if not keys:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = keys.find(request.headers.get("x-api-key", ""), token if scheme.lower() == "bearer" else "")
    caller: Caller = request.state.caller
    caller.name, caller.policy, caller.reduction = key.name, key.policy, key.reduce
    if request.method == "POST":
        caller.holds.enter_context(keys.use(key))


def host_name(header: str) -> str:
    """The name in a Host header, lower-case, without its port."""
    header = header.strip().lower()
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0]


def request_id_of(headers: Headers) -> str:
    """The one that the client offers, where it is plain enough for a log, or a new one."""
    offered = headers.get("x-request-id", "")
    return offered if _REQUEST_ID.fullmatch(offered) else f"req_{secrets.token_hex(8)}"


class Guard:
    """ASGI middleware. What it lets pass has a request id and a `receive` that counts and times the body."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = request_id_of(headers)
        caller = Caller()
        scope.setdefault("state", {}).update(request_id=request_id, caller=caller)
        begun, status = time.perf_counter(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = (b"x-request-id", b"request-id")  # the second is where Anthropic's clients look
                message.setdefault("headers", []).extend((name, request_id.encode()) for name in names)
            elif not message.get("more_body", False):
                caller.holds.close()  # before the last byte: who has read it may ask again at once
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal:
                caller.error = refusal.type
                await error_response(refusal, scope["path"], request_id)(scope, receive, send_with_id)
            else:
                await self._app(scope, self._bounded(receive), send_with_id)
        finally:
            caller.holds.close()
            if caller.error:
                self._metrics.error(caller.error)
            _tell(scope, request_id, caller, status, (time.perf_counter() - begun) * 1000)

    def _refusal(self, scope: Scope, headers: Headers) -> NearfarError | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._settings.host_names:
            return Forbidden("this Host is not served: add it with NEARFAR_ALLOWED_HOSTS")  # against DNS rebinding
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and _is_cross_site(headers, hosts[0]):
            return Forbidden("a cross-site request is refused")  # a multipart POST needs no preflight
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            return PayloadTooLarge(f"the body has {length} bytes, at most {self._settings.max_body_bytes} are read")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        seen = 0
        whole = False
        deadline: float | None = None

        async def bounded() -> Message:
            nonlocal seen, whole, deadline
            if whole:  # after the body, `receive` waits for the client's leaving, however long that takes
                return await receive()
            loop = asyncio.get_running_loop()
            deadline = deadline or loop.time() + self._settings.body_timeout_s
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise RequestTimeout(f"the body took longer than {self._settings.body_timeout_s:g} s") from error
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > self._settings.max_body_bytes:
                raise PayloadTooLarge(f"the body has more than {self._settings.max_body_bytes} bytes")
            return message

        return bounded


def _tell(scope: Scope, request_id: str, caller: Caller, status: int, duration_ms: float) -> None:
    """One line for each request, with neither prompt nor picture. Probes are told at debug level."""
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    if not log.isEnabledFor(level):
        return
    # As it came, percent signs and all: no line breaks in the log.
    path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
    fields = {
        "request_id": request_id,
        "key": caller.name or None,
        "method": scope["method"],
        "path": path,
        "status": status,
        "duration_ms": round(duration_ms, 1),
        "target": caller.target,
        "served_by": caller.served_by,
        **{name: round(value, 1) for name, value in caller.figures.items() if value is not None},
        "error": caller.error,
    }
    told = {name: value for name, value in fields.items() if value is not None}
    log.log(level, " ".join(f"{name}={value}" for name, value in told.items()), extra={"fields": told})


def _is_cross_site(headers: Headers, host: str) -> bool:
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True


SECURITY_HEADERS: dict[str, Any] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
