"""What the suites of the dialects share: answers in the making, and a far endpoint that breaks off."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from models.events import Cost, Egress, Finished, FinishReason, Memory, TextDelta, Timings, ToolCallDelta, Usage
from tests.serving.conftest import RunningService, running, wait_for
from tests.serving.test_streams import slowed

COLORS: dict[str, Any] = {
    "type": "object",
    "properties": {"color": {"type": "string", "enum": ["green", "red", "blue"]}},
    "required": ["color"],
}
CALLS = (
    TextDelta(text="Let me"),
    TextDelta(text=" look."),
    ToolCallDelta(index=0, call_id="call_1", name="paint", arguments=""),
    ToolCallDelta(index=0, arguments='{"color":'),
    ToolCallDelta(index=0, arguments='"red"}'),
    ToolCallDelta(index=1, call_id="call_2", name="erase", arguments="{}"),
)


class Seen(BaseModel):
    """What is asked for by schema."""

    color: Literal["green", "red", "blue"]
    round: bool


def finished(reason: FinishReason = "stop", usage: Usage | None = None) -> Finished:
    """The end of an answer to 40 tokens of prompt, of which 30 were cached."""
    return Finished(
        model="m",
        target="local/m@int8",
        finish_reason=reason,
        usage=usage or Usage(prompt_tokens=40, completion_tokens=7, image_tokens=16, cached_tokens=30),
        timings=Timings(),
        images=(),
        memory=Memory(),
        egress=Egress(left_device=False, bytes_sent=0, destination=None),
        cost=Cost(usd=0.0, basis=""),
    )


@contextmanager
def endpoint_that_breaks_off(*pieces: str, wait_s: float = 0.0) -> Iterator[str]:
    """The address of an OpenAI-compatible endpoint whose every answer is a silence, these pieces and then an error."""

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            time.sleep(wait_s)
            chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
            for data in (*chunks, {"error": {"message": "out of luck"}}):
                self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


@contextmanager
def busy(**settings: Any) -> Iterator[RunningService]:
    """A service that takes one request at a time and has it in hand, for as long as the clients take to be made."""
    with (
        running(max_waiting=1, models=("tiny-scenes@fp32",), **settings) as service,
        pytest.MonkeyPatch.context() as patch,
    ):
        slowed(service.ready(), patch, "decode_together", 0.02)
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True, "stream": True}
        key = {"x-api-key": settings.get("api_keys", ("any",))[0]}
        with service.client.stream("POST", "/v1/chat/completions", json=body, headers=key) as answer:
            pieces = answer.iter_bytes()  # kept: a reader that is forgotten closes its connection
            next(pieces)
            wait_for(lambda: service.engine.in_hand == 1)
            yield service
