"""Streams over real sockets: errors keep their status, silence is bridged, who leaves or reads no more frees a slot."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import psutil
import pytest

from models.errors import UpstreamError
from models.events import AnswerEvent, Cost, Egress, Failed, Finished, Memory, TextDelta, Timings, Usage
from models.request import AnswerRequest
from serving.child import child_service
from serving.targets import Target, Targets
from tests.serving.conftest import RunningService, picture, running, wait_for
from tests.serving.spoken import COMPARE, DIALECTS, MUCH, RESPONSES, Asked, Dialect

LONG = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 900, "ignore_eos": True, "stream": True}


@dataclass
class Script:
    """A target that says and does what it is told, and remembers what it was asked and that it was closed."""

    steps: tuple[object, ...]  # text, seconds of silence, or an error
    name: str = "script/one"
    asked: list[AnswerRequest] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    async def stream(self, request: AnswerRequest) -> AsyncGenerator[AnswerEvent, None]:
        self.asked.append(request)
        try:
            for step in self.steps:
                match step:
                    case str():
                        yield TextDelta(text=step)
                    case float():
                        await asyncio.sleep(step)
                    case Exception():
                        yield Failed(error=step)  # type: ignore[arg-type]
                        return
            yield finished(self.name)
        finally:
            self.closed.set()

    async def count_tokens(self, request: AnswerRequest) -> int:
        self.asked.append(request)
        await asyncio.sleep(sum(step for step in self.steps if isinstance(step, float)))
        return 1

    async def aclose(self) -> None:
        pass


def finished(name: str) -> Finished:
    return Finished(
        model="one",
        target=name,
        finish_reason="stop",
        usage=Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4),
        timings=Timings(ttft_ms=20.0, total_ms=50.0),
        images=(),
        memory=Memory(),
        egress=Egress(left_device=True, bytes_sent=1234, destination="far:443"),
        cost=Cost(usd=None, basis="none"),
    )


def serve_script(service: RunningService, *steps: object) -> Script:
    """Let that service offer one more target, `script/one`."""
    return serve(service, Script(steps))


def serve(service: RunningService, script: Script) -> Script:
    """Let that service offer it as one more target."""
    own = [target for target in service.services.targets() if target.name != script.name]
    service.services._targets = Targets([*own, Target(answerer=script, kind="hosted", model="one")])
    return script


@pytest.fixture(scope="module")
def impatient() -> Iterator[RunningService]:
    with running(keep_alive_s=0.2, stalled_reader_s=0.5, models=("tiny-scenes@fp32",)) as service:
        yield service.ready()


def ask(service: RunningService, path: str = "/infer", **more: Any) -> httpx2.Response:
    message = {"messages": [{"role": "user", "content": "x"}]} if path.startswith("/v1") else {"prompt": "x"}
    return service.client.post(path, json={**message, "model": "script/one", "stream": True, **more})


@pytest.mark.parametrize("path", ["/infer", "/v1/chat/completions"])
def test_an_error_before_the_first_text_of_a_stream_has_its_own_status(impatient: RunningService, path: str) -> None:
    script = serve_script(impatient, UpstreamError("far failed"))
    response = ask(impatient, path)
    assert (response.status_code, response.headers["content-type"]) == (502, "application/json")
    assert "far failed" in response.json()["error"]["message"]
    assert script.closed.wait(10)


@pytest.mark.parametrize("path", ["/infer", "/v1/chat/completions"])
def test_an_error_after_the_first_text_is_the_streams_last_event(impatient: RunningService, path: str) -> None:
    serve_script(impatient, "so far", UpstreamError("far broke off"))
    response = ask(impatient, path)
    assert response.status_code == 200
    last = response.text.strip().split("\n\n")[-1]
    assert "far broke off" in json.loads(last.partition("data: ")[2])["error"]["message"]
    assert "[DONE]" not in response.text


def test_silence_is_filled_with_comments_before_and_between_pieces(impatient: RunningService) -> None:
    serve_script(impatient, 0.7, "one", 0.5, "two")
    text = ask(impatient).text
    before, _, after = text.partition('{"text": "one"}')
    assert before.count(": keep-alive\n\n") >= 1
    assert after.count(": keep-alive\n\n") >= 1
    assert '{"text": "two"}' in after
    assert "event: finished" in after


def test_an_error_after_the_first_comment_is_an_event(impatient: RunningService) -> None:
    serve_script(impatient, 0.5, UpstreamError("far failed late"))
    response = ask(impatient)
    assert response.status_code == 200
    assert "event: error" in response.text
    assert "far failed late" in response.text


STREAMS = {
    "/infer": {"prompt": "x", "images": [""], "detail": "high", "max_tokens": 900},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": "high"}}]}],
        "max_tokens": 900,
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "", "detail": "high"}]}],
        "max_output_tokens": 900,
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": ""}}]}],
        "max_tokens": 900,
    },
}


def about_a_picture(path: str, shade: int) -> dict[str, Any]:
    """A streamed request of that route, about a picture of many tiles that nobody asked about before."""
    data = base64.b64encode(picture(512, 256 + shade)).decode()
    text = json.dumps(STREAMS[path]).replace('"data": ""', f'"media_type": "image/png", "data": "{data}"')
    return {**json.loads(text.replace('""', f'"data:image/png;base64,{data}"')), "stream": True}


@pytest.mark.parametrize("path", STREAMS)
def test_comments_keep_a_stream_alive_while_a_picture_is_encoded(
    impatient: RunningService, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    slowed(impatient, monkeypatch, "encode_tiles", 0.5)
    body = about_a_picture(path, list(STREAMS).index(path))
    with impatient.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        before = next(response.iter_bytes())
    assert before.startswith(b": keep-alive\n\n")
    free_soon(impatient)


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("step", ["encode_tiles", "decode_together"])
def test_a_deadline_ends_an_answer_of_the_engine_and_frees_its_slot(
    impatient: RunningService, monkeypatch: pytest.MonkeyPatch, path: str, step: str
) -> None:
    begun = slowed(impatient, monkeypatch, step, 0.8)  # the first of them outlasts the deadline
    shade = list(STREAMS).index(path) + (10 if step == "encode_tiles" else 20)
    body = {**about_a_picture(path, shade), "stream": False}
    response = impatient.client.post(path, json=body, headers={"x-request-timeout-s": "0.6"})
    assert response.status_code == 504
    assert begun.is_set()
    free_soon(impatient)


def slowed(service: RunningService, monkeypatch: pytest.MonkeyPatch, step: str, seconds: float) -> threading.Event:
    """Let each such step of the model take that much longer, as a large one's does; set once there was one."""
    onnx, begun = service.model().onnx, threading.Event()
    real = getattr(onnx, step)

    def slowly(*arguments: Any) -> Any:
        begun.set()
        time.sleep(seconds)
        return real(*arguments)

    monkeypatch.setattr(onnx, step, slowly)
    return begun


def test_a_full_queue_is_429_on_every_route_streamed_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(max_waiting=1, models=("tiny-scenes@fp32",)) as full:
        slowed(full.ready(), monkeypatch, "decode_together", 0.01)
        with full.client.stream("POST", "/v1/chat/completions", json=LONG) as busy:
            pieces = busy.iter_bytes()  # kept: without a reader the response is closed
            next(pieces)
            for path, stream in itertools.product(STREAMS, (True, False)):
                refused = full.client.post(path, json={**about_a_picture(path, 0), "stream": stream})
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
            assert full.engine.loop.running == 1  # nobody waited for that one


def test_a_stalled_reader_is_cut_and_its_target_closed(impatient: RunningService) -> None:
    script = serve_script(impatient, *["x" * 100_000] * 500)
    with open_request(impatient, {"prompt": "x", "model": "script/one", "stream": True}) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert script.closed.wait(10)  # though 50 MB were to come, and nobody read them


def test_a_stalled_readers_connection_is_given_up_with_what_it_did_not_take() -> None:
    settings = {"NEARFAR_STALLED_READER_S": "1"}
    with child_service("--model", "tiny-scenes@fp32", settings=settings) as address:
        port = int(address.rpartition(":")[2])

        def connections() -> int:
            """Those that the service holds open."""
            own = [each for each in psutil.net_connections("tcp4") if each.laddr.port == port]
            return sum(each.status == psutil.CONN_ESTABLISHED for each in own)

        with open_request(address, MUCH, RESPONSES.path) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            assert connections() == 1
            wait_for(lambda: connections() == 0, timeout_s=15)  # though the client still holds its end


def open_request(service: RunningService | str, body: dict[str, Any], path: str = "/infer") -> socket.socket:
    """A connection with that request sent and its answer not read."""
    url = service if isinstance(service, str) else service.url
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + data)
    return connection


def free_soon(service: RunningService) -> None:
    def is_free() -> bool:
        figures = service.services.engine_figures()
        return figures.running == figures.waiting == figures.slots_in_use == 0

    wait_for(is_free, timeout_s=5.0)  # the answers that were left would have taken nine and more


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_decoding_frees_the_slot(
    impatient: RunningService, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(impatient, monkeypatch, "decode_together", 0.01)
    with open_request(impatient, {**LONG, "stream": stream}, "/v1/chat/completions"):
        wait_for(lambda: impatient.services.engine_figures().running == 1)
    free_soon(impatient)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.path)
def test_who_leaves_closes_the_target_in_every_dialect(
    impatient: RunningService, dialect: Dialect, stream: bool
) -> None:
    script = serve_script(impatient, "so far", 60.0)
    named = {"targets": [script.name]} if dialect is COMPARE else {"model": script.name}
    body = {**dialect.to_body(Asked(prompt="x")), **named, "stream": stream}
    with open_request(impatient, body, dialect.path):
        wait_for(lambda: script.asked)
    assert script.closed.wait(10)


@pytest.mark.parametrize("parallel", [True, False])
def test_who_leaves_a_comparison_closes_what_runs_and_begins_no_more(
    impatient: RunningService, parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = [Script((60.0,), name=f"script/{number}") for number in range(3)]
    targets = Targets([Target(answerer=script, kind="hosted", model="m") for script in scripts])
    monkeypatch.setattr(impatient.services, "_targets", targets)
    running = 3 if parallel else 1
    body = {"prompt": "x", "targets": [script.name for script in scripts], "parallel": parallel}
    with open_request(impatient, body, "/compare"):
        wait_for(lambda: sum(bool(script.asked) for script in scripts) == running)
    wait_for(lambda: sum(script.closed.is_set() for script in scripts) == running)
    assert sum(bool(script.asked) for script in scripts) == running


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_pictures_are_encoded_frees_the_slot(
    impatient: RunningService, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = slowed(impatient, monkeypatch, "encode_tiles", 0.2)
    url = "data:image/png;base64," + base64.b64encode(picture(512, 511 + stream)).decode()  # not one that is known
    body = {"prompt": "x", "images": [url] * 4, "detail": "high", "stream": stream}
    with open_request(impatient, body):
        assert begun.wait(10)
    free_soon(impatient)


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_while_queued_frees_the_place(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(max_running=1, models=("tiny-scenes@fp32",)) as narrow:
        slowed(narrow.ready(), monkeypatch, "decode_together", 0.01)
        with narrow.client.stream("POST", "/v1/chat/completions", json=LONG) as busy:
            pieces = busy.iter_bytes()  # kept: without a reader the response is closed
            next(pieces)
            with open_request(narrow, {**LONG, "stream": stream}, "/v1/chat/completions"):
                wait_for(lambda: narrow.services.engine_figures().waiting == 1)
            wait_for(lambda: narrow.services.engine_figures().waiting == 0, timeout_s=5.0)
        free_soon(narrow)


@pytest.mark.parametrize("by", ["field", "header"])
def test_an_answer_that_is_not_whole_in_time_is_504(impatient: RunningService, by: str) -> None:
    script = serve_script(impatient, 5.0)
    header = {"x-request-timeout-s": "0.05"} if by == "header" else {}
    more = {"timeout_s": 0.05} if by == "field" else {}
    body = {"prompt": "x", "model": "script/one", **more}
    response = impatient.client.post("/infer", json=body, headers=header)
    assert (response.status_code, response.json()["error"]["type"]) == (504, "deadline_exceeded")
    assert script.closed.wait(10)


def test_counting_tokens_has_its_callers_time_too(impatient: RunningService) -> None:
    script = serve_script(impatient, 5.0)
    body = {"model": "script/one", "messages": [{"role": "user", "content": "x"}]}
    response = impatient.client.post("/v1/messages/count_tokens", json=body, headers={"x-request-timeout-s": "0.05"})
    assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout_error")
    assert [request.deadline_s for request in script.asked] == [0.05]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon"])
def test_a_timeout_that_is_no_time_is_refused(impatient: RunningService, value: str) -> None:
    header = {"x-request-timeout-s": value}
    assert impatient.client.post("/infer", json={"prompt": "x"}, headers=header).status_code == 422
