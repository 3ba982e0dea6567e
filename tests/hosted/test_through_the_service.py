"""The official clients through our dialects to far models that speak either protocol: four ways, one meaning."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import ValidationError

from serving.settings import Settings
from tests.serving.conftest import RunningService, events_of, running

ASKED = {"prompt": "what colour?", "max_tokens": 9}
TOOL = {"type": "object", "properties": {"color": {"type": "string"}}}
HELLO: list[Any] = [{"role": "user", "content": "paint the wall"}]


@pytest.fixture(params=["openai", "anthropic"])
def far(request: pytest.FixtureRequest, wire: Any) -> Iterator[RunningService]:
    """Our service before a far model that speaks that protocol."""
    address = f"http://127.0.0.1:{wire.port}"
    endpoint = f"far=messages+{address},m" if request.param == "anthropic" else f"far={address}/v1,m"
    with running(models=("tiny-scenes",), endpoints=(endpoint,)) as service:
        yield service.ready()


@pytest.fixture
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["far"])


@pytest.fixture
def answers(wire: Any, speak: Any, claude: Any, protocol: str) -> Any:
    """Lets the far model answer with these words and calls, as its protocol has them."""

    def answer(*words: str, call: tuple[str, ...] = (), finish: str = "stop") -> None:
        if protocol == "anthropic":
            deltas = ({"type": "input_json_delta", "partial_json": piece} for piece in call)
            block = claude.block(1, {"type": "tool_use", "id": "c1", "name": "paint", "input": {}}, *deltas)
            reason = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}[finish]
            counts = {"input_tokens": 10, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 1}
            wire.script = (
                claude.started(**counts),
                claude.words(*words),
                *([block] if call else []),
                claude.ended(reason, output_tokens=7),
            )
        else:
            first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "paint", "arguments": ""}}
            rest = [{"index": 0, "function": {"arguments": piece}} for piece in call]
            details = {"cached_tokens": 20, "cache_write_tokens": 1}
            wire.script = (
                *(speak["chunk"](word) for word in words),
                *(speak["chunk"](tool_calls=[piece]) for piece in ([first, *rest] if call else [])),
                speak["chunk"](finish=finish),
                speak["usage"](31, 7, prompt_tokens_details=details),
                speak["DONE"],
            )

    return answer


@pytest.mark.asyncio
async def test_the_openai_client_streams_text_and_calls_of_either(far: RunningService, answers: Any) -> None:
    answers("Let ", "me.", call=('{"color": ', '"red"}'), finish="tool_calls")
    tools: Any = [{"type": "function", "function": {"name": "paint", "parameters": TOOL}}]
    async with (
        openai.AsyncOpenAI(base_url=f"{far.url}/v1", api_key="any", max_retries=0) as client,
        client.chat.completions.stream(model="far/m", messages=HELLO, tools=tools) as stream,
    ):
        kinds = [event.type async for event in stream]
        done = await stream.get_final_completion()
    (choice,) = done.choices
    assert choice.message.content == "Let me."
    (call,) = choice.message.tool_calls or ()
    assert (call.id, call.function.name, call.function.arguments) == ("c1", "paint", '{"color": "red"}')
    assert choice.finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.delta") >= 2


@pytest.mark.asyncio
async def test_the_anthropic_client_streams_text_and_calls_of_either(far: RunningService, answers: Any) -> None:
    answers("Let ", "me.", call=('{"color": ', '"red"}'), finish="tool_calls")
    tools: Any = [{"name": "paint", "input_schema": TOOL}]
    async with (
        anthropic.AsyncAnthropic(base_url=far.url, api_key="any", max_retries=0) as client,
        client.messages.stream(model="far/m", max_tokens=50, messages=HELLO, tools=tools) as stream,
    ):
        message = await stream.get_final_message()
    text, call = message.content
    assert text.type == "text"
    assert text.text == "Let me."
    assert call.type == "tool_use"
    assert (call.id, call.name, call.input) == ("c1", "paint", {"color": "red"})
    assert message.stop_reason == "tool_use"
    usage = message.usage
    counts = (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens)
    assert (*counts, usage.output_tokens) == (10, 20, 1, 7)


@pytest.mark.asyncio
async def test_a_schema_reaches_either_and_its_answer_is_parsed(
    far: RunningService, wire: Any, answers: Any, protocol: str
) -> None:
    answers('{"color": ', '"red"}')
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": TOOL}}
    async with openai.AsyncOpenAI(base_url=f"{far.url}/v1", api_key="any", max_retries=0) as client:
        done = await client.chat.completions.create(model="far/m", messages=HELLO, response_format=form)
    assert done.choices[0].message.content == '{"color": "red"}'
    body = wire.received[0].json
    if protocol == "anthropic":
        sent = body["output_config"]["format"]["schema"]
        assert sent == {**TOOL, "additionalProperties": False}
    else:
        assert body["response_format"]["json_schema"]["schema"] == TOOL


@pytest.mark.asyncio
async def test_an_answer_that_breaks_off_is_an_error_in_the_clients_dialect(
    far: RunningService, wire: Any, speak: Any, claude: Any, protocol: str
) -> None:
    if protocol == "anthropic":
        broken = claude.said("error", error={"type": "overloaded_error", "message": "busy"})
        wire.script = (claude.started(), claude.words("re"), broken)
    else:
        wire.script = (speak["chunk"]("re"), speak["event"]({"error": {"message": "busy", "code": 529}}))
    async with anthropic.AsyncAnthropic(base_url=far.url, api_key="any", max_retries=0) as client:
        with pytest.raises(anthropic.APIStatusError, match="busy"):
            async with client.messages.stream(model="far/m", max_tokens=50, messages=HELLO) as stream:
                await stream.get_final_message()
    ready = await asyncio.to_thread(far.client.get, "/ready")
    assert ready.status_code == 200


@pytest.mark.asyncio
async def test_an_answer_that_was_too_late_tells_what_it_had_sent(far: RunningService, wire: Any) -> None:
    body = {**ASKED, "model": "far/m"}
    await asyncio.to_thread(far.client.post, "/infer", json=body)  # the SDK's client is made for the first one
    wire.script = (10.0,)
    answer = await asyncio.to_thread(far.client.post, "/infer", json={**body, "timeout_s": 1.0})
    error = answer.json()["error"]
    assert (answer.status_code, error["message"]) == (504, "the answer was not whole within 1 s")
    assert error["egress"]["bytes_sent"] == len(wire.received[-1].body)


@pytest.mark.asyncio
async def test_an_alias_of_ones_own_is_asked_by_its_name_and_says_what_it_stands_for(wire: Any) -> None:
    far = f"far=http://127.0.0.1:{wire.port}/v1,m"
    with running(models=("tiny-scenes",), endpoints=(far,), aliases={"claude-4-sonnet": "far/m"}) as service:
        client = service.ready().client
        answer = (await asyncio.to_thread(client.post, "/infer", json={**ASKED, "model": "claude-4-sonnet"})).json()
        (row,) = (row for row in client.get("/targets").json()["targets"] if row["name"] == "far/m")
    assert (answer["text"], answer["target"]) == ("red", "far/m")
    assert "claude-4-sonnet stands for far/m here" in answer["notice"]
    assert "Anthropic retired claude-sonnet-4-20250514 in June 2026" in answer["notice"]
    assert row["aliases"] == ["claude-4-sonnet"]
    assert row["hosted"]["thinking"] is None


def test_targets_state_what_makes_them_fair_and_safe_to_compare_and_no_key() -> None:
    with running({"ANTHROPIC_API_KEY": "sk-ant-secret-0123456789"}, models=("tiny-scenes",)) as service:
        client = service.ready().client
        text = client.get("/targets").text
        rows = {row["name"]: row for row in client.get("/targets").json()["targets"]}
        denied = client.post("/infer", json={**ASKED, "model": "claude-4-sonnet"})
        retired = client.post("/infer", json={**ASKED, "model": "anthropic/claude-sonnet-4-20250514"})
    sonnet = rows["anthropic/claude-sonnet-5-5"]
    assert sonnet["aliases"] == ["claude-4-sonnet"]
    facts = sonnet["hosted"]
    assert (facts["protocol"], facts["headroom_tokens"], facts["fixes_sampling"]) == ("messages", 0, True)
    assert "low effort" in facts["thinking"]
    assert "30 days" in facts["declared"]["retention"]
    assert facts["declared"]["source"].startswith("https://")
    assert facts["rates"]["batch_output_usd"] == facts["rates"]["output_usd"] / 2
    assert rows["local/tiny-scenes@int8"]["hosted"] is None
    assert "sk-ant" not in text
    assert denied.status_code == 403
    assert retired.status_code == 404
    assert retired.json()["error"]["message"] == "Anthropic retired claude-sonnet-4-20250514 in June 2026"


def test_without_its_key_an_alias_says_which_one_is_missing() -> None:
    with running(models=("tiny-scenes",)) as service:
        answer = service.ready().client.post("/infer", json={**ASKED, "model": "claude-4-sonnet"})
    assert answer.status_code == 404
    assert "neither ANTHROPIC_API_KEY nor ANTHROPIC_API_KEY_FILE is set" in answer.json()["error"]["message"]


@pytest.mark.parametrize("aliases", [{"a/b": "far/m"}, {"a": "m"}, {"": "far/m"}, {"a": "far/"}])
def test_an_alias_that_is_no_name_for_a_target_is_refused(aliases: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="an alias is a name"):
        Settings(aliases=aliases)


@pytest.mark.asyncio
async def test_a_far_model_that_answers_in_prose_offers_no_object(far: RunningService, answers: Any) -> None:
    answers('{"color": ', "or rather, ", "red")
    body = {**ASKED, "model": "far/m", "stream": True, "partial": True, "response_format": {"type": "json_object"}}
    if "messages" in far.services.settings.endpoints[0]:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "it", "schema": TOOL}}
    events = events_of((await asyncio.to_thread(far.client.post, "/infer", json=body)).text)
    assert [json.loads(data).get("object") for _, data in events] == [{}, None, None, None]
    assert json.loads(events[-1][1])["text"] == '{"color": or rather, red'
