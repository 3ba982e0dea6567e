"""Servers that others wrote after the providers' protocols, before a hosted model and before the whole service.

`fakellm` (https://github.com/1dg618/fakellm) deviates from the protocols: where its rule says an error, it streams an
answer; asked for usage, it tells OpenAI's clients none and Anthropic's clients one token of input; text beside a call
is left out of OpenAI's stream. `aimock` (https://aimock.copilotkit.dev) tells Claude's tokens as 0 where its fixture
names none, knows no schema in Claude's `output_config`, and cuts text between the two halves of a character outside
Unicode's basic plane, which no provider does. Neither knows caches, errors inside a stream or broken UTF-8:
`test_provider_faults.py` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx2
import openai
import pytest
import pytest_asyncio

from models.answerer import collect
from models.errors import UpstreamError
from models.events import Failed, TextDelta
from models.request import (
    AnswerRequest,
    JsonFormat,
    Message,
    Tool,
    ToolCallPart,
    ToolResultPart,
    ToolUse,
    question,
)
from serving.child import free_port
from serving.hosted.hosted_model import HostedModel
from serving.hosted.rows import available, parse_endpoint
from tests.npm import installed
from tests.serving.conftest import RunningService, running, wait_for

AIMOCK = "1.43.0"
KEY = "sk-right-0123456789abcdefghij"
SCHEMA = {"type": "object", "properties": {"color": {"type": "string"}}}
PAINT = ToolUse(tools=(Tool(name="paint", parameters=SCHEMA),))
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
NO_MODEL = "far answered 404, no such model (its name may have been retired) or path"
SAID = "It is grün, said the far one."
COUNTS = {"prompt_tokens": 31, "completion_tokens": 7, "input_tokens": 31, "output_tokens": 7}
RULES = [
    {"when": {"tool_result_contains": "wet"}, "respond": {"content": "Painted."}},
    {"when": {"messages_contain": "colour"}, "respond": {"content": SAID}},
    {"when": {"messages_contain": "paint", "tools_include": "paint"}, "respond": {"tool_calls": [
        {"name": "paint", "arguments": {"color": "red"}}]}},
]  # fmt: skip
WORDS = {"content": "one two three four five six seven"}
FIXTURES: list[dict[str, Any]] = [
    {"match": {"userMessage": "paint", "hasToolResult": True, "toolResultContains": "wet"},
     "response": {"content": "Painted."}},
    {"match": {"userMessage": "colour"}, "response": {"content": SAID, "usage": COUNTS}, "chunkSize": 3},
    {"match": {"userMessage": "paint", "hasToolResult": False}, "chunkSize": 5,
     "response": {"toolCalls": [{"name": "paint", "arguments": {"color": "red"}}]}},
    {"match": {"userMessage": "think"}, "response": {"content": "Red.", "reasoning": "secret thoughts"}},
    {"match": {"userMessage": "write"}, "response": {**WORDS, "finishReason": "length"}},
    {"match": {"userMessage": "form", "responseFormat": "json_schema"}, "response": {"content": {"color": "red"}}},
    *({"match": {"userMessage": f"refuse with {status}"},
       "response": {"error": {"message": "not now", "type": "some_error"}, "status": status, "retryAfter": 7}}
      for status in (400, 402, 403, 404, 413, 429, 500, 503, 529)),
    {"match": {"userMessage": "truncate"}, "response": WORDS, "chunkSize": 4, "truncateAfterChunks": 5, "latency": 20},
    {"match": {"userMessage": "disconnect"},
     "response": WORDS, "chunkSize": 4, "latency": 50, "disconnectAfterMs": 220},
    {"match": {"userMessage": "malform"}, "response": WORDS, "chaos": {"malformedRate": 1}},
    {"match": {"userMessage": "drop"}, "response": WORDS, "chaos": {"dropRate": 1}},
    {"match": {"userMessage": "hang up"}, "response": WORDS, "chaos": {"disconnectRate": 1}},
]  # fmt: skip


@contextmanager
def started(command: list[str], log: Path, **environment: str) -> Iterator[str]:
    """A server in a process of its own; its address, which its log tells."""
    environment = {**os.environ, **environment}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            wait_for(lambda: process.poll() is not None or ADDRESS.search(log.read_text()))
            found = ADDRESS.search(log.read_text())
            assert found, log.read_text()
            wait_for(lambda: process.poll() is not None or answers(found[0]))
            yield found[0]
        finally:
            process.terminate()


def answers(address: str) -> bool:
    try:
        httpx2.get(address, trust_env=False)
    except httpx2.TransportError:
        return False
    return True


@pytest.fixture(scope="module")
def fakellm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("fakellm")
    (folder / "rules.yaml").write_text(json.dumps({"version": 1, "rules": [{"name": "r", **rule} for rule in RULES]}))
    program = str(Path(sys.executable).with_name("fakellm"))
    command = [program, "serve", "--port", str(free_port()), "--config", str(folder / "rules.yaml")]
    with started(command, folder / "log", PYTHONUNBUFFERED="1") as address:
        yield address


@pytest.fixture(scope="module")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("aimock")
    (folder / "fixtures.json").write_text(json.dumps({"fixtures": FIXTURES}))
    program = installed("@copilotkit/aimock", AIMOCK) / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
    command = ["node", str(program), "--port", "0", "--fixtures", str(folder / "fixtures.json")]
    with started(command, folder / "log", AIMOCK_API_KEYS=KEY) as address:
        yield address


class Server(NamedTuple):
    """An independent server as one protocol reaches it: how an endpoint of it is written."""

    name: str
    scheme: str
    path: str
    model: str = "m"

    def endpoint(self, address: str) -> str:
        return f"far={self.scheme}{address}{self.path},{self.model}"


FAKELLM = (Server("fakellm", "", "/v1"), Server("fakellm", "messages+", ""))
AIMOCKS = (
    Server("aimock", "", "/v1", "gpt-4.1"),
    Server("aimock", "messages+", "", "claude-haiku-5-5"),
    Server("aimock", "", "/v1beta/openai", "gemini-2.5-flash"),
)
HOSTED = [*FAKELLM, *(pytest.param(server, marks=pytest.mark.slow) for server in AIMOCKS)]
named = {"ids": lambda server: f"{server.name}-{server.model}{server.scheme}"}


@pytest.fixture
def endpoint(request: pytest.FixtureRequest, server: Server) -> str:
    address = request.getfixturevalue(server.name)
    if server.name == "fakellm":  # it remembers a conversation by its first message
        httpx2.post(f"{address}/_fakellm/reset", trust_env=False)
    return server.endpoint(address)


@pytest_asyncio.fixture
async def far(endpoint: str) -> AsyncIterator[HostedModel]:
    [(provider, key)] = available([parse_endpoint(endpoint)], {"FAR_API_KEY": KEY})
    answerer = HostedModel(provider, provider.models[0], key)
    yield answerer
    await answerer.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("server", HOSTED, **named)
async def test_an_answer_comes_in_pieces_with_the_tokens_that_are_told(far: HostedModel, server: Server) -> None:
    *pieces, finished = [event async for event in far.stream(question("what colour is it?"))]
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextDelta)) == SAID
    usage = (finished.usage.prompt_tokens, finished.usage.completion_tokens)
    assert usage == ((31, 7) if server.name == "aimock" else (1, 7) if server.scheme else (None, None))


@pytest.mark.asyncio
@pytest.mark.parametrize("server", HOSTED, **named)
async def test_a_call_is_read_and_its_result_is_understood(far: HostedModel) -> None:
    asked = AnswerRequest(messages=question("paint the wall").messages, tool_use=PAINT)
    [call] = (await collect(far.stream(asked))).tool_calls
    assert (call.name, json.loads(call.arguments)) == ("paint", {"color": "red"})
    told = (
        Message(role="assistant", parts=(ToolCallPart(**call._asdict()),)),
        Message(role="tool", parts=(ToolResultPart(call_id=call.call_id, text="it is wet"),)),
    )
    after = await collect(far.stream(replace(asked, messages=(*asked.messages, *told))))
    assert (after.text, after.tool_calls, after.finished.finish_reason) == ("Painted.", (), "stop")


async def failure(far: HostedModel, prompt: str) -> tuple[str, UpstreamError]:
    *pieces, failed = [event async for event in far.stream(question(prompt))]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UpstreamError)
    return "".join(piece.text for piece in pieces if isinstance(piece, TextDelta)), failed.error


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", AIMOCKS, **named)
@pytest.mark.parametrize("status", [400, 402, 403, 404, 413, 429, 500, 503, 529])
async def test_a_refusal_tells_its_status_and_when_to_come_again(far: HostedModel, status: int) -> None:
    text, error = await failure(far, f"refuse with {status}")
    assert (text, error.upstream_status) == ("", status)
    assert error.message.endswith(": not now")
    assert error.retry_after_s == (7.0 if status == 429 else None)


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", AIMOCKS, **named)
@pytest.mark.parametrize(
    ("prompt", "says", "status"),
    [
        ("truncate", "the connection to far broke before the answer was whole", None),
        ("disconnect", "the connection to far broke before the answer was whole", None),
        ("hang up", "the connection to far broke before the answer was whole", None),
        ("malform", "far answered 200 with JSON instead of a stream", None),
        ("drop", "far answered 500, it failed: Chaos: request dropped", 500),
        ("nobody knows", f"{NO_MODEL}: No fixture matched", 404),
    ],
)
async def test_what_breaks_is_an_error_and_no_answer(
    far: HostedModel, prompt: str, says: str, status: int | None
) -> None:
    text, error = await failure(far, prompt)
    assert (error.message, error.upstream_status) == (says, status)
    assert WORDS["content"].startswith(text)
    assert text != WORDS["content"]
    assert bool(text) == (prompt in ("truncate", "disconnect"))


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", AIMOCKS, **named)
async def test_thinking_forms_and_limits_are_understood(far: HostedModel, server: Server) -> None:
    thought = await collect(far.stream(question("think first")))
    assert thought.text == "Red."
    assert thought.finished.timings.thinking_ms is not None
    cut = await collect(far.stream(question("write on")))
    assert (cut.text, cut.finished.finish_reason) == (WORDS["content"], "length")
    if not server.scheme:
        formed = await collect(far.stream(question("fill the form", output=JsonFormat(schema=SCHEMA))))
        assert json.loads(formed.text) == {"color": "red"}


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", AIMOCKS, **named)
async def test_another_key_is_refused(endpoint: str) -> None:
    [(provider, key)] = available([parse_endpoint(endpoint)], {"FAR_API_KEY": "sk-wrong"})
    answerer = HostedModel(provider, provider.models[0], key)
    _, error = await failure(answerer, "what colour?")
    assert error.upstream_status == 401
    await answerer.aclose()


@pytest.fixture
def service(endpoint: str) -> Iterator[RunningService]:
    """Ours in between."""
    with running({"FAR_API_KEY": KEY}, models=("tiny-scenes",), endpoints=(endpoint,)) as started:
        yield started.ready()


@pytest.mark.asyncio
@pytest.mark.parametrize("server", HOSTED, **named)
async def test_the_official_clients_reach_either_protocol_through_our_dialects(
    service: RunningService, server: Server
) -> None:
    model, asked = f"far/{server.model}", [{"role": "user", "content": "what colour is it?"}]
    functions: Any = [{"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}]
    tools: Any = [{"name": "paint", "input_schema": SCHEMA}]
    painted: Any = [{"role": "user", "content": "paint the wall"}]
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        chat = await client.chat.completions.create(model=model, messages=asked)  # type: ignore[arg-type]
        async with client.chat.completions.stream(model=model, messages=painted, tools=functions) as stream:
            called = await stream.get_final_completion()
        async with client.responses.stream(model=model, input="what colour is it?") as responding:
            response = await responding.get_final_response()
    async with (
        anthropic.AsyncAnthropic(base_url=service.url, api_key="any", max_retries=0) as client,
        client.messages.stream(model=model, max_tokens=50, messages=asked) as streaming,
    ):
        message = await streaming.get_final_message()
        calling = await client.messages.create(model=model, max_tokens=50, messages=painted, tools=tools)
    assert chat.choices[0].message.content == response.output_text == SAID
    assert [block.text for block in message.content if block.type == "text"] == [SAID]
    [call] = called.choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("paint", {"color": "red"})
    assert [(block.name, block.input) for block in calling.content if block.type == "tool_use"] == [
        ("paint", {"color": "red"})
    ]


@pytest.mark.parametrize("server", HOSTED, **named)
def test_a_comparison_with_the_toy_has_both_answers(service: RunningService, server: Server) -> None:
    body = {"prompt": "what colour is it?", "targets": ["local/tiny-scenes@int8", f"far/{server.model}"]}
    compared = service.client.post("/compare", json=body).json()
    near, far = sorted(compared["results"], key=lambda result: result["target"], reverse=True)
    assert near["ok"]
    assert far["text"] == SAID
    assert far["usage"]["completion_tokens"] == (7 if server.name == "aimock" or server.scheme else None)


@pytest.mark.slow
@pytest.mark.asyncio
@pytest.mark.parametrize("server", AIMOCKS, **named)
async def test_a_client_of_either_dialect_gets_its_own_errors(service: RunningService, server: Server) -> None:
    model = f"far/{server.model}"

    def asked(prompt: str) -> dict[str, Any]:
        return {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": prompt}]}

    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="rate or spending limit"):
            await client.chat.completions.create(**asked("refuse with 429"))
        with pytest.raises(openai.APIError, match="broke before the answer was whole"):
            async for _ in await client.chat.completions.create(**asked("truncate"), stream=True):
                pass
    async with anthropic.AsyncAnthropic(base_url=service.url, api_key="any", max_retries=0) as client:
        with pytest.raises(anthropic.InternalServerError, match="rate or spending limit"):
            await client.messages.create(**asked("refuse with 429"))
        with pytest.raises(anthropic.APIStatusError, match="broke before the answer was whole"):
            async with client.messages.stream(**asked("truncate")) as stream:
                await stream.get_final_message()
    assert (await asyncio.to_thread(service.client.get, "/ready")).status_code == 200
