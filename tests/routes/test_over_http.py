"""Routes through the running service: two far models that fail in every way, and the embedded one behind them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio

from models.tiny_scenes import SAMPLES
from serving.routes import breaker, router
from tests.hosted.wire_server import ANTHROPIC, DONE, OPENAI, Break, Reply, WireServer, chunk, usage
from tests.serving.conftest import RunningService, events_of, running, wait_for

ASKED = {"prompt": "What color is the circle?", "max_tokens": 9, "model": "smart"}
CHAT: list[Any] = [{"role": "user", "content": "What color is the circle?"}]
PLAIN = {"content_type": "application/json", "script": (b'{"error": {"message": "not now"}}',)}
BUSY = Reply(status=529, **PLAIN)
TOLD = Reply(script=(OPENAI.begin(), OPENAI.text("bl", "ue"), OPENAI.end(prompt=20, completion=3)))
CUT = Reply(script=(OPENAI.begin(), OPENAI.text("gre"), usage(31, 2), Break.CLOSE))


@dataclass
class Far:
    """Two servers: `one` speaks OpenAI's protocol, `two` Anthropic's."""

    one: WireServer
    two: WireServer

    def endpoints(self) -> tuple[str, ...]:
        one, two = (f"http://127.0.0.1:{server.port}" for server in (self.one, self.two))
        return (f"one={one}/v1,m", f"two=messages+{two},m")

    @property
    def askings(self) -> tuple[int, int]:
        return len(self.one.received), len(self.two.received)


@pytest_asyncio.fixture
async def far() -> AsyncIterator[Far]:
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(WireServer().listening()) for _ in range(2)]
        two.script = (ANTHROPIC.begin(), ANTHROPIC.text("yel", "low"), ANTHROPIC.end())
        yield Far(one, two)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "RETRY_WAIT_S", 0.01)


@contextmanager
def routed(far: Far, *hops: Any, **more: Any) -> Iterator[RunningService]:
    """A service whose route `smart` is that chain."""
    settings = {"models": ("tiny-scenes",), "endpoints": far.endpoints(), "routes": {"smart": list(hops)}, **more}
    with running(**settings) as service:
        yield service.ready()


async def post(service: RunningService, path: str = "/infer", **body: Any) -> Any:
    return await asyncio.to_thread(service.client.post, path, json={**ASKED, **body})


def outcomes(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(attempt["target"], attempt["error_type"] or attempt["outcome"]) for attempt in answer["attempts"]]


IN_300_DAYS = format_datetime(datetime.now(UTC) + timedelta(days=300), usegmt=True)
# How a target fails before its first text, and how often it is asked then.
FAULTS: dict[str, tuple[Reply, int]] = {
    **{f"{status}": (Reply(status=status, **PLAIN), 2) for status in (408, 409, 429, 500, 502, 503, 529)},
    **{f"{status}": (Reply(status=status, **PLAIN), 1) for status in (401, 402, 403, 404)},
    "429, at once": (Reply(status=429, headers="Retry-After: 0\r\n", **PLAIN), 2),
    "429, soon, and another stands behind": (Reply(status=429, headers="Retry-After: 30\r\n", **PLAIN), 1),
    "429, in hours": (Reply(status=429, headers="Retry-After: 9999\r\n", **PLAIN), 1),
    "429, on a day": (Reply(status=429, headers=f"Retry-After: {IN_300_DAYS}\r\n", **PLAIN), 1),
    "HTML": (Reply(content_type="text/html", script=(b"<html>",)), 2),
    "garbage": (Reply(script=(b"data: <html>\n\n",)), 2),
    "an error in the stream": (Reply(script=(OPENAI.begin(), OPENAI.error("busy"))), 2),
    "closed": (Reply(script=(OPENAI.begin(), Break.CLOSE)), 2),
    "reset": (Reply(script=(OPENAI.begin(), Break.RESET)), 2),
    "no reason to end": (Reply(script=(OPENAI.begin(), OPENAI.terminator)), 2),
    "no word of it": (Reply(script=(chunk(finish="length"), usage(31, 9), DONE)), 1),
}


@pytest.mark.asyncio
async def test_what_fails_before_its_first_text_is_tried_again_and_then_passed_by(far: Far) -> None:
    replies = dict(enumerate(FAULTS.values()))
    far.one.reply_to = lambda received: replies[int(received.json["model"])][0]
    one, two = far.endpoints()
    endpoints = (",".join([one.removesuffix(",m"), *map(str, replies)]), two)  # a model, and so a breaker, for each
    routes = {f"past{number}": [f"one/{number}", "two/m"] for number in replies}
    with routed(far, endpoints=endpoints, routes=routes) as service:
        answers = {name: (await post(service, model=f"past{number}")).json() for number, name in enumerate(FAULTS)}
    assert {name: answer["text"] for name, answer in answers.items()} == dict.fromkeys(FAULTS, "yellow")
    tried = {name: [attempt["error_type"] for attempt in answer["attempts"]] for name, answer in answers.items()}
    assert tried == {name: ["upstream_error"] * times + [None] for name, (_, times) in FAULTS.items()}
    statuses = {name: answer["attempts"][0]["upstream_status"] for name, answer in answers.items()}
    refused = {name: reply.status if reply.status > 200 else None for name, (reply, _) in FAULTS.items()}
    assert statuses == {**refused, "an error in the stream": 529}
    answer = answers["500"]
    *_, served = answer["attempts"]
    assert (answer["target"], answer["model"]) == ("two/m", "m")
    assert served["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"] == 31
    assert answer["egress"]["bytes_sent"] == sum(attempt["egress"]["bytes_sent"] for attempt in answer["attempts"])
    assert answer["egress"]["destination"] == f"127.0.0.1:{far.one.port}, 127.0.0.1:{far.two.port}"
    assert answer["timings"]["total_ms"] >= served["begun_ms"]
    sent = sum(len(received.body) for server in (far.one, far.two) for received in server.received)
    assert sum(each["egress"]["bytes_sent"] for each in answers.values()) == sent


@pytest.mark.asyncio
async def test_a_short_wait_that_is_asked_for_is_kept(far: Far) -> None:
    busy = Reply(status=429, headers="Retry-After: 1\r\n", **PLAIN)
    far.one.reply_to = lambda _: busy if len(far.one.received) == 1 else TOLD
    with routed(far, "one/m", "two/m") as service:
        answer = (await post(service)).json()
    assert (answer["text"], far.askings) == ("blue", (2, 0))
    failed, served = answer["attempts"]
    assert served["begun_ms"] - failed["begun_ms"] >= 1000
    assert answer["timings"]["ttft_ms"] >= 1000


@pytest.mark.parametrize("script", [(10.0,), (*OPENAI.pings, 0.1) * 50], ids=["silent", "pings only"])
@pytest.mark.asyncio
async def test_one_that_does_not_begin_in_time_is_left(far: Far, script: Any) -> None:
    by_asking, by_hop = {"target": "one/m", "first_token_s": 0.5}, {"target": "one/m", "deadline_s": 0.5}
    chains = {"twice": [by_asking, "two/m"], "once": [by_hop, "two/m"]}
    with routed(far, "one/m", routes=chains) as service:
        await post(service, model="one/m")  # the SDK's client is made for the first one who asks
        far.one.script = script
        far.one.received.clear()
        asked_twice = (await post(service, model="twice")).json()
        asked_once = (await post(service, model="once")).json()
    assert asked_twice["text"] == asked_once["text"] == "yellow"
    assert [len(answer["attempts"]) for answer in (asked_twice, asked_once)] == [3, 2]
    assert asked_once["attempts"][0]["reason"] == "one took too long: no text within 0.5 s"
    assert asked_once["attempts"][0]["egress"]["bytes_sent"] == len(far.one.received[0].body)
    assert asked_once["cost"]["usd"] is None
    await asyncio.wait_for(far.one.left.wait(), 10)


@pytest.mark.asyncio
async def test_a_hop_that_has_begun_in_time_may_take_longer(far: Far) -> None:
    far.one.script = (OPENAI.begin(), OPENAI.text("bl"), 1.5, OPENAI.text("ue"), OPENAI.end())
    with routed(far, {"target": "one/m", "deadline_s": 1.2}, "two/m") as service:
        await post(service, model="one/m")
        answer = (await post(service)).json()
    assert (answer["text"], far.askings) == ("blue", (2, 0))


@pytest.mark.asyncio
async def test_the_requests_deadline_holds_over_all_attempts_and_its_error_tells_them(far: Far) -> None:
    with routed(far, {"target": "one/m", "deadline_s": 0.2}, "two/m") as service:
        for model in ("one/m", "two/m"):
            await post(service, model=model)  # the SDK's client is made for the first one who asks
        far.one.script = far.two.script = (10.0,)
        answer = await post(service, timeout_s=1.5)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (504, "deadline_exceeded")
    assert error["message"] == "the answer was not whole within 1.5 s"
    assert outcomes(error) == [("one/m", "upstream_error"), ("two/m", "deadline_exceeded")]


@pytest.mark.asyncio
async def test_a_request_at_fault_is_asked_nobody_else(far: Far) -> None:
    far.one.status, far.one.content_type, far.one.script = 400, "application/json", PLAIN["script"]
    with routed(far, "one/m", "two/m") as service:
        answer = await post(service)
    assert (answer.status_code, far.askings) == (502, (1, 0))
    assert "one answered 400" in answer.json()["error"]["message"]


@pytest.mark.asyncio
async def test_a_refusal_is_an_answer(far: Far) -> None:
    far.one.script = (chunk(refusal="No, "), chunk(refusal="thanks."), chunk(finish="stop"), usage(31, 2), DONE)
    with routed(far, "one/m", "two/m") as service:
        answer = (await post(service)).json()
    assert (answer["finish_reason"], answer["text"], far.askings) == ("refusal", "No, thanks.", (1, 0))


@pytest.mark.asyncio
async def test_a_stream_that_breaks_off_behind_its_first_text_ends_there(far: Far) -> None:
    far.one.reply_to = lambda _: CUT
    with routed(far, "one/m", "two/m") as service:
        events = events_of((await post(service, stream=True)).text)
        metrics = service.client.get("/metrics").text
    assert [(kind, json.loads(data).get("text")) for kind, data in events] == [("delta", "gre"), ("error", None)]
    error = json.loads(events[-1][1])["error"]
    assert (error["type"], error["usage"]["prompt_tokens"], far.askings) == ("upstream_error", 31, (1, 0))
    assert outcomes(error) == [("one/m", "upstream_error")]
    assert 'nearfar_broken_streams_total{error="upstream_error",target="smart"} 1.0' in metrics


@pytest.mark.asyncio
async def test_on_request_it_begins_anew_and_says_so(far: Far) -> None:
    far.one.reply_to = lambda _: CUT
    with routed(far, "one/m", "two/m") as service:
        events = [
            (kind, json.loads(data)) for kind, data in events_of((await post(service, stream=True, restart=True)).text)
        ]
    assert [kind for kind, _ in events] == ["delta", "restarted", "delta", "delta", "finished"]
    assert events[1][1]["target"] == "two/m"
    assert "connection to one broke" in events[1][1]["reason"]
    assert events[-1][1]["text"] == "yellow"
    assert outcomes(events[-1][1]) == [("one/m", "upstream_error"), ("two/m", "served")]


@pytest.mark.asyncio
async def test_of_an_answer_that_is_read_whole_nobody_saw_the_first_beginning(far: Far) -> None:
    far.one.reply_to = lambda _: CUT
    with routed(far, "one/m", "two/m") as service:
        answer = (await post(service)).json()
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
            done = await client.chat.completions.create(model="smart", messages=CHAT)
    assert answer["text"] == done.choices[0].message.content == "yellow"
    assert done.choices[0].model_extra is not None
    assert outcomes(done.choices[0].model_extra["nearfar"])[-1] == ("two/m", "served")


@pytest.mark.asyncio
async def test_a_tool_call_that_was_begun_is_not_taken_back(far: Far) -> None:
    far.one.script = (OPENAI.begin(), OPENAI.call('{"color": '), Break.CLOSE)
    tools: Any = [{"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}]
    with routed(far, "one/m", "two/m") as service:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError, match="the connection to"):
                await client.chat.completions.create(model="smart", messages=CHAT, tools=tools)
    assert far.askings == (1, 0)


@pytest.mark.asyncio
async def test_the_official_clients_read_what_a_route_tells_and_an_error_behind_the_first_text(far: Far) -> None:
    far.one.reply_to = lambda _: BUSY
    with routed(far, "one/m", "two/m") as service:
        async with (
            openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as ours,
            anthropic.AsyncAnthropic(base_url=service.url, api_key="any", max_retries=0) as theirs,
        ):
            async with ours.chat.completions.stream(model="smart", messages=CHAT) as chat:
                chunks = [event.chunk async for event in chat if event.type == "chunk"]
                completion = await chat.get_final_completion()
            async with ours.responses.stream(model="smart", input="What color?") as stream:
                response = await stream.get_final_response()
            async with theirs.messages.stream(model="smart", max_tokens=9, messages=CHAT) as told:
                kinds = [event async for event in told]
                message = await told.get_final_message()
            whole = await theirs.messages.create(model="smart", max_tokens=9, messages=CHAT)
            far.two.reply_to = lambda _: Reply(script=(ANTHROPIC.begin(), ANTHROPIC.text("yel"), Break.CLOSE))
            with pytest.raises(openai.APIError) as ended:
                async with ours.chat.completions.stream(model="smart", messages=CHAT) as chat:
                    await chat.get_final_completion()
            with pytest.raises(anthropic.APIStatusError, match="the connection to") as broken:
                async with theirs.messages.stream(model="smart", max_tokens=9, messages=CHAT) as told:
                    await told.get_final_message()
            response_events = [
                event async for event in await ours.responses.create(model="smart", input="What color?", stream=True)
            ]
    assert completion.choices[0].message.content == response.output_text == "yellow"
    assert [block.text for block in (*message.content, *whole.content) if block.type == "text"] == ["yellow"] * 2
    delta = next(event for event in kinds if event.type == "message_delta")
    last = next(chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason)
    for extra in (last.model_extra, response.model_extra, whole.model_extra, delta.model_extra):
        assert extra is not None
        assert extra["nearfar"]["target"] == "two/m"
        assert outcomes(extra["nearfar"])[-1] == ("two/m", "served")
    assert isinstance(ended.value.body, dict)
    assert outcomes(ended.value.body["nearfar"])[-1] == ("two/m", "upstream_error")
    assert isinstance(broken.value.body, dict)
    assert outcomes(broken.value.body["nearfar"])[-1] == ("two/m", "upstream_error")
    *_, error, failed = response_events
    assert (error.type, failed.type) == ("error", "response.failed")
    assert error.model_extra is not None
    assert error.model_extra["nearfar"]["usage"]["prompt_tokens"] == 31


@pytest.mark.asyncio
async def test_where_all_targets_are_down_the_error_lists_the_attempts(far: Far) -> None:
    far.one.reply_to = lambda _: BUSY
    far.two.reply_to = lambda _: Reply(status=401, **PLAIN)
    with routed(far, "one/m", "two/m") as service:
        answer = await post(service)
        async with anthropic.AsyncAnthropic(base_url=service.url, api_key="any", max_retries=0) as client:
            with pytest.raises(anthropic.APIStatusError) as refused:
                await client.messages.create(model="smart", max_tokens=9, messages=CHAT)
        log = service.client.get("/targets").json()["targets"]
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (503, "all_targets_failed")
    assert outcomes(error) == [("one/m", "upstream_error")] * 2 + [("two/m", "upstream_error")]
    assert [attempt["upstream_status"] for attempt in error["attempts"]] == [529, 529, 401]
    assert "one/m: one answered 529" in error["message"]
    assert "two/m: two answered 401" in error["message"]
    assert error["cost"]["usd"] == 0.0
    assert (refused.value.status_code, refused.value.type) == (503, "overloaded_error")
    (route,) = (row for row in log if row["name"] == "smart")
    assert [hop["breaker"] for hop in route["chain"]] == ["closed", "open"]  # a refused key is left alone at once


@pytest.mark.asyncio
async def test_a_target_that_keeps_failing_is_left_alone_and_the_figures_say_so(
    far: Far, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    far.one.reply_to = lambda _: BUSY
    with routed(far, "one/m", "two/m") as service:
        answers = [(await post(service)).json() for _ in range(7)]
        rows = {row["name"]: row for row in service.client.get("/targets").json()["targets"]}
        metrics = service.client.get("/metrics").text
    assert [answer["text"] for answer in answers] == ["yellow"] * 7
    assert far.askings == (10, 7)
    assert outcomes(answers[-1]) == [("one/m", "skipped"), ("two/m", "served")]
    assert "too often" in answers[-1]["attempts"][0]["reason"]
    assert [(hop["target"], hop["breaker"]) for hop in rows["smart"]["chain"]] == [
        ("one/m", "open"),
        ("two/m", "closed"),
    ]
    assert "target=smart served_by=two/m" in caplog.text
    for line in (
        'nearfar_breaker_state{target="one/m"} 2.0',
        'nearfar_breaker_state{target="two/m"} 0.0',
        'nearfar_route_attempts_total{outcome="upstream_error",route="smart",target="one/m"} 10.0',
        'nearfar_route_attempts_total{outcome="skipped",route="smart",target="one/m"} 2.0',
        'nearfar_route_attempts_total{outcome="served",route="smart",target="two/m"} 7.0',
        'nearfar_route_fallbacks_total{target="smart"} 7.0',
    ):
        assert line in metrics


@pytest.mark.asyncio
async def test_a_target_that_was_left_alone_is_probed_and_comes_back(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "OPEN_S", 1.0)
    far.one.reply_to = lambda _: BUSY
    with routed(far, "one/m", "two/m") as service:
        for _ in range(6):
            await post(service)
        states = [service.services.routes.breakers()["one/m"]]
        far.one.reply_to = lambda _: TOLD
        await asyncio.to_thread(wait_for, lambda: service.services.routes.breakers()["one/m"] != "open")
        states.append(service.services.routes.breakers()["one/m"])
        answer = (await post(service)).json()
        states.append(service.services.routes.breakers()["one/m"])
    assert states == ["open", "half-open", "closed"]
    assert answer["text"] == "blue"


@pytest.mark.asyncio
async def test_a_model_of_this_service_is_a_hop_like_any_other(far: Far, red_circle_url: str) -> None:
    far.one.reply_to = lambda _: BUSY
    body = {"images": [red_circle_url]}
    with routed(far, "one/m", "tiny-scenes") as service:
        fallen = (await post(service, **body)).json()
        streamed = events_of((await post(service, stream=True, **body)).text)
    with routed(far, "local/tiny-scenes", "two/m") as service:
        near = (await post(service, **body)).json()
        service.engine.max_waiting = 0  # as many requests in hand as there may be
        crowded = (await post(service, **body)).json()
    assert (fallen["text"], fallen["target"]) == ("red", "local/tiny-scenes@int8")
    assert json.loads(streamed[-1][1])["text"] == "red"
    assert fallen["egress"]["bytes_sent"] == 2 * len(far.one.received[0].body)
    assert fallen["cost"]["usd"] == 0.0
    assert outcomes(near) == [("local/tiny-scenes@int8", "served")]
    assert near["egress"] == {"left_device": False, "bytes_sent": 0, "destination": None, "withheld": None}
    assert outcomes(crowded) == [("local/tiny-scenes@int8", "overloaded")] * 2 + [("two/m", "served")]


@pytest.mark.asyncio
async def test_a_prompt_too_long_goes_on_to_a_target_that_is_declared_to_take_it(far: Far) -> None:
    long = {"prompt": "red " * 3000}
    far_enough = {"target": "two/m", "context_tokens": 100_000}
    with routed(far, "tiny-scenes", "one/m", far_enough) as service:
        answer = (await post(service, **long)).json()
    with routed(far, "tiny-scenes", "one/m") as service:
        refused = await post(service, **long)
    assert outcomes(answer) == [
        ("local/tiny-scenes@int8", "context_length_exceeded"),
        ("one/m", "skipped"),
        ("two/m", "served"),
    ]
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "context_length_exceeded")
    assert far.askings == (0, 1)


@pytest.mark.asyncio
async def test_what_one_protocol_cannot_express_another_target_does(far: Far) -> None:
    choice = {"type": "choice", "choices": ["red", "blue"]}
    with routed(far, "one/m", "tiny-scenes") as service:
        answer = (await post(service, response_format=choice)).json()
    assert answer["text"] in ("red", "blue")
    assert outcomes(answer) == [("one/m", "invalid_request"), ("local/tiny-scenes@int8", "served")]
    assert far.askings == (0, 0)


@pytest.mark.parametrize("path", ["/infer", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/compare"])
@pytest.mark.asyncio
async def test_the_policy_passes_by_what_leaves_the_device(far: Far, path: str) -> None:
    body = {"messages": CHAT, "input": "What color?", "targets": ["smart"]}
    names = {"/infer": ("prompt", "model"), "/compare": ("prompt", "targets"), "/v1/responses": ("input", "model")}
    named = {name: {**ASKED, **body}[name] for name in names.get(path, ("messages", "model"))}
    if path != "/v1/responses":
        named["max_tokens"] = 9
    endpoints = (*far.endpoints(), "away=http://192.0.2.1/v1,m")  # an address for documentation: nobody is there
    for hops, status in ((("away/m", "tiny-scenes"), 200), (("away/m",), 403)):
        with routed(far, *hops, endpoints=endpoints) as service:
            answer = await asyncio.to_thread(service.client.post, path, json=named)
        assert answer.status_code == status
        assert "policy local-only forbids" in answer.text
    assert far.askings == (0, 0)


@pytest.mark.asyncio
async def test_prefer_local_asks_first_what_stays_on_the_device(far: Far) -> None:
    endpoints = (*far.endpoints(), "away=http://192.0.2.1/v1,m")
    with routed(far, "away/m", "one/m", endpoints=endpoints, policy="prefer-local") as service:
        answer = (await post(service)).json()
    assert outcomes(answer) == [("one/m", "served")]


@pytest.mark.asyncio
async def test_a_route_is_compared_where_it_is_named_and_not_by_default(far: Far) -> None:
    far.one.reply_to = lambda _: BUSY
    with routed(far, "one/m", "two/m") as service:
        compared = (await post_compare(service, targets=["smart", "tiny-scenes"])).json()
        unnamed = (await post_compare(service)).json()
        models = [row["id"] for row in service.client.get("/v1/models").json()["data"]]
        rows = {row["name"]: row for row in service.client.get("/targets").json()["targets"]}
        counted = service.client.post("/v1/messages/count_tokens", json={"model": "smart", "messages": CHAT})
    smart, _ = compared["results"]
    assert (smart["ok"], smart["target"], smart["text"]) == (True, "smart", "yellow")
    assert outcomes(smart) == [("one/m", "upstream_error")] * 2 + [("two/m", "served")]
    assert [result["target"] for result in unnamed["results"]] == ["local/tiny-scenes@int8", "one/m", "two/m"]
    assert models == ["local/tiny-scenes@int8", "one/m", "two/m", "smart"]
    route = rows["smart"]
    assert (route["kind"], route["allowed"], route["compared_by_default"]) == ("route", True, False)
    assert [hop["target"] for hop in route["chain"]] == ["one/m", "two/m"]
    assert rows["one/m"]["chain"] is None
    assert counted.status_code == 400


async def post_compare(service: RunningService, **body: Any) -> Any:
    question = {"prompt": ASKED["prompt"], "max_tokens": 9, **body}
    return await asyncio.to_thread(service.client.post, "/compare", json=question)


@pytest.mark.asyncio
async def test_a_reader_who_leaves_ends_the_attempt(far: Far) -> None:
    far.one.script = (OPENAI.begin(), OPENAI.text("bl"), 10.0)
    with routed(far, "one/m", "two/m") as service:
        async with anthropic.AsyncAnthropic(base_url=service.url, api_key="any", max_retries=0) as client:
            async with client.messages.stream(model="smart", max_tokens=9, messages=CHAT) as stream:
                async for _ in stream.text_stream:
                    break
            await asyncio.wait_for(far.one.left.wait(), 10)
    assert far.askings == (1, 0)


@pytest.mark.asyncio
async def test_a_spent_budget_leads_to_what_costs_nothing(far: Far) -> None:
    endpoints = (*far.endpoints(), "away=http://192.0.2.1/v1,m")  # an address for documentation: nobody is there
    with routed(far, "away/m", "tiny-scenes", endpoints=endpoints, policy="any", daily_usd=0) as service:
        answer = (await post(service)).json()
        alone = await post(service, model="away/m")
    assert outcomes(answer) == [("away/m", "budget_spent"), ("local/tiny-scenes@int8", "served")]
    assert answer["attempts"][0]["outcome"] == "skipped"
    assert (answer["egress"]["bytes_sent"], answer["egress"]["left_device"]) == (0, False)
    assert alone.status_code == 402


@pytest.mark.asyncio
async def test_an_estimate_of_a_route_is_that_of_all_that_it_may_ask(far: Far) -> None:
    sizes = {"text_bytes": 100, "pictures": [{"width": 64, "height": 64, "bytes": 300}], "max_tokens": 9}
    endpoints = (*far.endpoints(), "away=http://192.0.2.1/v1,m")
    with routed(far, "away/m", "one/m", "tiny-scenes", endpoints=endpoints, policy="any") as service:
        rows = service.client.post("/estimate", json={**sizes, "targets": ["away/m", "one/m", "smart"]}).json()
        near = service.client.post("/estimate", json={**sizes, "targets": ["smart"], "policy": "local-only"}).json()
    away, one, smart = rows["estimates"]
    assert (smart["bytes"], smart["leaves_device"]) == (away["bytes"] + one["bytes"], True)
    assert smart["destination"] == "192.0.2.1:80"
    [here] = near["estimates"]
    assert (here["bytes"], here["leaves_device"], here["destination"]) == (one["bytes"], False, None)
    with routed(far, "away/m", "tiny-scenes", endpoints=endpoints) as service:
        [local] = service.client.post("/estimate", json={"targets": ["smart"]}).json()["estimates"]
    assert (local["bytes"], local["usd"]) == (0, None)  # not known, as of its one target that may be asked


def test_the_command_line_asks_a_route_and_shows_what_was_tried(tmp_path: Path) -> None:
    file = tmp_path / "nearfar.toml"
    file.write_text(
        'models = ["tiny-scenes"]\npolicy = "any"\nendpoints = ["gone=http://127.0.0.1:9/v1,m"]\n'
        '[routes]\nsmart = [{ target = "gone/m", deadline_s = 20 }, "tiny-scenes"]\n'
    )
    command = [sys.executable, "-m", "serving.cli", "infer", str(SAMPLES / "red-circle.png"), "What color?"]
    shown = subprocess.run(
        [*command, "--model", "smart"],
        env={**os.environ, "NEARFAR_CONFIG": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    told = shown.stderr.splitlines()
    assert shown.stdout.strip()
    assert [line for line in told if "gone/m" in line] == [
        "nearfar: gone/m failed: gone could not be reached at 127.0.0.1:9"
    ] * 2
    assert told[-1] == "nearfar: local/tiny-scenes@int8 answered"
