"""What needs no Ray: in its proxy, its own refusals and torn answers become errors of ours. Ray itself: test_ray.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send
from typer.testing import CliRunner

from models.machine import available_cores
from serving.api.behind_ray import OwnErrors, middlewares
from serving.cli import app
from serving.engine.loop import EngineFigures
from serving.metrics import Metrics, merged
from serving.ray_head import _check_proxy
from serving.ray_settings import cpus_claimed
from serving.settings import Settings
from tests.serving.test_cli import assert_fails, nearfar

OURS = [(b"request-id", b"set-by-the-replica"), (b"content-type", b"application/json")]
STREAM = [(b"request-id", b"set-by-the-replica"), (b"content-type", b"text/event-stream; charset=utf-8")]


def begun(status: int, headers: Sequence[tuple[bytes, bytes]] = ()) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def proxy(*messages: Message) -> Any:
    """An application that sends these and is done, as Ray's proxy is when a replica has gone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send({**message, **({"headers": list(message["headers"])} if "headers" in message else {})})

    (middleware,) = middlewares()
    return middleware.cls(app, *middleware.args, **middleware.kwargs)


def answer(*messages: Message, path: str = "/infer", **headers: str) -> httpx2.Response:
    return TestClient(proxy(*messages)).post(path, headers=headers)


def test_a_replicas_answer_passes_as_it_is_under_one_request_id() -> None:
    got = answer(
        begun(422, [*OURS, (b"x-request-id", b"a"), (b"x-request-id", b"b")]), body(b"{}"), **{"x-request-id": "mine"}
    )
    assert (got.status_code, got.json()) == (422, {})
    assert got.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize(
    ("own", "status", "kind", "retry_after"),
    [
        ([begun(429, [(b"retry-after", b"3")]), body(b"Request dropped")], 429, "overloaded", "3"),
        ([begun(503), body(b"Deployment is unavailable")], 503, "unavailable", None),
        ([begun(404), body(b"Path '/infer' not found")], 503, "unavailable", None),
        ([begun(408), body(b"Request timed out")], 504, "deadline_exceeded", None),
        ([begun(500), body(b"Internal")], 503, "unavailable", None),
        ([], 503, "unavailable", None),
    ],
)
def test_what_ray_answers_itself_or_leaves_without_an_answer_is_an_error_of_ours(
    own: list[Message], status: int, kind: str, retry_after: str | None
) -> None:
    got = answer(*own, **{"x-request-id": "mine"})
    error = got.json()["error"]
    assert (got.status_code, error["type"], error["request_id"]) == (status, kind, "mine")
    assert got.headers.get("retry-after") == retry_after
    assert got.headers["x-request-id"] == got.headers["request-id"] == "mine"


def test_each_dialect_has_its_own_shape() -> None:
    refused = begun(429), body(b"")
    assert answer(*refused, path="/v1/chat/completions").json()["error"]["code"] == "rate_limit_exceeded"
    assert answer(*refused, path="/v1/messages").json()["type"] == "error"


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/infer", "unavailable"), ("/v1/chat/completions", "server_error"), ("/v1/messages", "overloaded_error")],
)
def test_a_torn_stream_ends_in_an_error_event(path: str, kind: str) -> None:
    got = answer(begun(200, STREAM), body(b"event: delta\ndata: {}\n\n", more=True), path=path)
    *_, last = got.text.strip().split("\n\n")
    event, data = last.splitlines()
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] == kind


def test_a_whole_stream_gets_nothing_more() -> None:
    got = answer(begun(200, STREAM), body(b"data: [DONE]\n\n", more=True), body(b""))
    assert got.text == "data: [DONE]\n\n"


@pytest.mark.asyncio
async def test_a_torn_plain_body_is_not_made_whole_and_a_client_that_left_is_owed_nothing() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    scope = {"type": "http", "path": "/infer", "headers": []}
    await proxy(begun(200, OURS), body(b'{"te', more=True))(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    sent.clear()
    await OwnErrors(waits)({**scope, "headers": []}, receive, send)
    assert sent == []


def test_rays_own_paths_are_left_alone() -> None:
    got = answer(begun(503), body(b"starting"), path="/-/healthz")
    assert (got.status_code, got.text) == (503, "starting")


def test_the_figures_of_several_replicas_are_one_text_with_a_label_more() -> None:
    first, second = Metrics(EngineFigures), Metrics(lambda: EngineFigures(running=2))
    first.error("overloaded")
    text = merged({"a": first.text(), "b": second.text()}).decode()
    assert 'nearfar_errors_total{replica="a",type="overloaded"} 1.0' in text
    assert 'nearfar_requests_running{replica="a"} 0.0' in text
    assert 'nearfar_requests_running{replica="b"} 2.0' in text
    assert text.count("# TYPE nearfar_requests_running gauge") == 1


def test_a_cluster_whose_port_another_program_has_is_a_warning_and_no_end(caplog: pytest.LogCaptureFixture) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.wfile.write(next(answers))

    answers = iter((b"HTTP/1.0 200 OK\r\n\r\n", b"SSH-2.0-Other\r\n"))
    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever).start()
        for _ in range(2):
            _check_proxy(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert [line.startswith("nothing answers at http") for line in caplog.messages] == [True, True]


def test_replicas_claim_their_threads_of_a_cluster_and_nothing_of_a_ray_of_their_own() -> None:
    # Ray counts a container's quota, which may be fewer cores than the system tells: a claim would wait for ever.
    assert cpus_claimed(Settings(threads=4), own=True) == 0
    assert cpus_claimed(Settings(threads=1), own=False) == 1
    assert cpus_claimed(Settings(threads=10_000), own=False) == cpus_claimed(Settings(), own=False) == available_cores()


def test_replicas_without_ray_are_refused_before_anything_is_fetched() -> None:
    done = CliRunner().invoke(app, ["serve", "--replicas", "2", "--model", "smolvlm2-256m", "--offline"])
    assert (done.exit_code, done.stderr) == (2, "nearfar: --replicas and --ray-address need --ray\n")
    done = CliRunner().invoke(app, ["serve", "--ray", "--model", "smolvlm2-256m", "--offline"])
    assert (done.exit_code, done.stderr) == (1, "nearfar: --ray needs Ray: pip install 'nearfar[ray]'\n")


def test_ray_without_its_serve_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "ray" / "serve").mkdir(parents=True)
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "ray" / "serve" / "__init__.py").write_text("import not_installed")
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    run = nearfar("serve", "--ray", "--model", "tiny-scenes", "--offline", PYTHONPATH=path)
    assert_fails(run, 1, "--ray needs Ray: pip install 'nearfar[ray]'", "not_installed is missing")
