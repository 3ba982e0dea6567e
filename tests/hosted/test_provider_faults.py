"""Every way in which a provider is known to fail, in both protocols: one error that says so, and the next answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import pytest

from models.answerer import collect
from models.errors import UpstreamError
from models.events import Failed, Finished, TextDelta, Usage
from models.request import AnswerRequest, Message, TextPart, Tool, ToolUse, question
from serving.hosted.hosted_model import HostedModel
from serving.hosted.progress import Timeouts
from tests.hosted.wire_server import STREAM, Break, Reply, Speech, Step, WireServer, event

pytestmark = pytest.mark.asyncio

KEY = "sk-test-0123456789abcdefghij"
ASKED = question("what colour is it?")
PAINTED = AnswerRequest(
    messages=(Message(role="user", parts=(TextPart(text="paint it"),)),),
    tool_use=ToolUse(tools=(Tool(name="paint"),)),
)
QUICK = Timeouts(first_token_s=0.3)  # pings go on for twice as long
QUICK_BETWEEN = Timeouts(between_s=0.3)
BROKEN = "the connection to far broke before the answer was whole"
CUT = "far ended its stream before the answer was whole"
NO_EVENT = "far sent something that is no event of its protocol"
NO_TEXT, NO_MORE = "far took too long: no text within 0.3 s", "far took too long: no more text within 0.3 s"
LIMIT = "far answered 429, rate or spending limit: later"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One fault, what is said of it, and what had come before it."""

    name: str
    reply: Callable[[Speech], Reply]
    says: str
    status: int | None = None
    retry_after_s: float | None = None
    text: str = ""
    asked: AnswerRequest = ASKED
    timeouts: Timeouts | None = None


def refused(status: int, says: str, header: str = "", retry_after_s: float | None = None) -> Case:
    """An error status with the protocol's own body."""

    def reply(speech: Speech) -> Reply:
        body = speech.error_body("later")
        return Reply(status=status, content_type="application/json", headers=header, script=(body,))

    name = f"{status} {header.strip()}".strip()
    return Case(name=name, reply=reply, says=says, status=status, retry_after_s=retry_after_s)


def page(status: int, kind: str, says: str) -> Case:
    """What a proxy in between shows to people, or what is no stream."""
    reply = Reply(status=status, content_type=kind, script=(b"<html><b>secret</b></html>",))
    return Case(name=f"{kind} with {status}", reply=lambda _: reply, says=says, status=status if status > 399 else None)


def broken(
    name: str, script: Callable[[Speech], Sequence[Step]], says: str, *, text: str = "", status: int | None = None
) -> Case:
    """A stream that begins well and is not whole."""
    return Case(name=name, reply=lambda speech: Reply(script=script(speech)), says=says, text=text, status=status)


def late(name: str, script: Callable[[Speech], Sequence[Step]], says: str, *, text: str = "") -> Case:
    """A stream that does not go on."""
    return replace(broken(name, script, says, text=text), timeouts=QUICK_BETWEEN if text else QUICK)


def cut_call(name: str, arguments: str, reason: str, says: str) -> Case:
    """A tool call that makes no call."""
    cut = broken(name, lambda speech: (speech.begin(), speech.call(arguments), speech.end(reason)), says)
    return replace(cut, asked=PAINTED)


def pinging(speech: Speech) -> list[Step]:
    return [step for ping in speech.pings * 4 for step in (ping, 0.05)]


def garbage(data: bytes) -> Callable[[Speech], Sequence[Step]]:
    return lambda speech: (speech.begin(), speech.text("re"), event(data), speech.end())


CASES = (
    refused(400, "far answered 400, the request was refused: later"),
    refused(401, "far answered 401, the key was refused: later"),
    refused(402, "far answered 402, payment is required: later"),
    refused(403, "far answered 403, access is forbidden: later"),
    refused(404, "far answered 404, no such model (its name may have been retired) or path: later"),
    refused(413, "far answered 413, the request is too large: later"),
    refused(429, LIMIT),
    refused(429, LIMIT, "Retry-After: 7\r\n", 7.0),
    refused(429, LIMIT, "Retry-After: 9999\r\n", 9999.0),
    refused(429, LIMIT, "Retry-After: Mon, 01 Jan 2024 00:00:00 GMT\r\n", 0.0),
    refused(429, LIMIT, "Retry-After: soon\r\n"),
    refused(429, LIMIT, "Retry-After: -1\r\n"),
    refused(429, LIMIT, f"Retry-After: Mon, 01 Jan 2024 00:00:00 +{'9' * 20}\r\n"),
    refused(500, "far answered 500, it failed: later"),
    refused(502, "far answered 502, it failed: later"),
    refused(503, "far answered 503, it failed: later", "Retry-After: 2\r\n", 2.0),
    refused(529, "far answered 529, it is overloaded: later"),
    page(502, "text/html", "far answered 502, it failed"),
    page(200, "text/html", "far answered 200 with HTML instead of a stream"),
    page(200, "application/json", "far answered 200 with JSON instead of a stream"),
    page(200, "text/plain", "far answered 200 with something else instead of a stream"),
    page(200, STREAM, CUT),
    Case(
        name="307",
        reply=lambda _: Reply(status=307, headers="Location: /elsewhere\r\n", script=()),
        says="far answered 307, redirects are not followed",
        status=307,
    ),
    Case(name="silent at once", reply=lambda _: Reply(silence_s=5.0), says=NO_TEXT, timeouts=QUICK),
    late("silent after the status", lambda _: (5.0,), NO_TEXT),
    late("pings only", lambda speech: (speech.begin(), *pinging(speech)), NO_TEXT),
    late("silent after text", lambda speech: (speech.begin(), speech.text("re"), 5.0), NO_MORE, text="re"),
    late("pings after text", lambda speech: (speech.begin(), speech.text("re"), *pinging(speech)), NO_MORE, text="re"),
    broken("no JSON", garbage(b"{not json"), NO_EVENT, text="re"),
    broken("a list", garbage(b"[1]"), NO_EVENT, text="re"),
    broken("a string", garbage(b'"text"'), NO_EVENT, text="re"),
    broken("nested without end", garbage(b"[" * 100_000), NO_EVENT, text="re"),
    broken("garbage first", lambda speech: (event(b"{not json"), speech.text("red"), speech.end()), NO_EVENT),
    broken(
        "error before the first text",
        lambda speech: (speech.begin(), speech.error("busy"), speech.end()),
        "far broke off with an error: busy",
        status=529,
    ),
    broken(
        "error after the first text",
        lambda speech: (speech.begin(), speech.text("re"), speech.error("busy"), speech.end()),
        "far broke off with an error: busy",
        text="re",
        status=529,
    ),
    broken(
        "an error that tells the key and the prompt",
        lambda speech: (speech.error(f"not with {KEY} for what colour is it?"),),
        "far broke off with an error: not with [...] for [...]",
        status=529,
    ),
    broken("nothing", lambda _: (), CUT),
    broken("no end", lambda speech: (speech.begin(), speech.text("re")), CUT, text="re"),
    broken(
        "no terminator",
        lambda speech: (speech.begin(), speech.text("red"), speech.end().removesuffix(speech.terminator)),
        CUT,
        text="red",
    ),
    broken("a terminator alone", lambda speech: (speech.begin(), speech.text("re"), speech.terminator), CUT, text="re"),
    broken("closed at once", lambda _: (Break.CLOSE,), BROKEN),
    broken("closed early", lambda speech: (speech.begin(), speech.text("re"), Break.CLOSE), BROKEN, text="re"),
    broken("reset mid-chunk", lambda speech: (speech.begin(), speech.text("re"), Break.RESET), BROKEN, text="re"),
    broken(
        "out of tokens before the first word",
        lambda speech: (speech.begin(), speech.end("length", completion=256)),
        "far used up max_tokens before the first word of its answer",
    ),
    broken(
        "more text than any model writes",
        lambda speech: (speech.begin(), *[speech.text("x" * 2**19)] * 9, speech.end()),
        "far sent more than 4194304 characters",
        text="x" * 2**22,
    ),
    cut_call(
        "a call cut by the limit", '{"color": "gr', "length", "far ended a tool call before its arguments were whole"
    ),
    cut_call(
        "a call cut in silence", '{"color": ', "tool_calls", "far ended a tool call before its arguments were whole"
    ),
    cut_call("a call that is no JSON", "{color}", "tool_calls", "far wrote arguments of a tool call that are not JSON"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_a_fault_is_one_error_that_says_so_and_the_next_answer_is_whole(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech, case: Case
) -> None:
    good = Reply(script=(speech.begin(), speech.text("re", "d"), speech.end()))
    wire.reply_to = lambda _: case.reply(speech) if len(wire.received) == 1 else good
    far = ask_for(KEY, api_key_env="FAR_KEY", timeouts=case.timeouts, **speech.row)
    *before, last = [event async for event in far.stream(case.asked)]
    assert isinstance(last, Failed)
    assert not any(isinstance(event, Failed | Finished) for event in before)
    assert isinstance(last.error, UpstreamError)
    assert last.error.message == case.says
    assert (last.error.upstream_status, last.error.retry_after_s) == (case.status, case.retry_after_s)
    assert "".join(event.text for event in before if isinstance(event, TextDelta)) == case.text
    assert len(wire.received) == 1  # it is not asked again here: that is for a route to decide
    if case.timeouts:  # and no longer held open
        await asyncio.wait_for(wire.left.wait(), 10)
    assert (await collect(far.stream(ASKED))).text == "red"


async def test_text_that_drips_without_end_is_given_up(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.script = (speech.begin(), *(speech.text("a"), 0.06) * 90)
    far = ask_for(timeouts=Timeouts(between_s=5.0, total_s=1.0), **speech.row)
    first, *_, failed = [event async for event in far.stream(ASKED)]
    assert first == TextDelta(text="a")
    assert failed.error.message == "far took too long: not done within 1 s"


async def test_an_error_without_end_is_read_no_further_than_its_message(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.status, wire.content_type, wire.script = 500, "application/json", [b"x" * 2**20] * 200
    [failed] = [event async for event in ask_for(**speech.row).stream(ASKED)]
    assert failed.error.message == "far answered 500, it failed"
    await asyncio.wait_for(wire.left.wait(), 10)


async def test_a_date_to_come_back_at_is_seconds_from_now(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.status, wire.headers = 429, "Retry-After: Fri, 01 Jan 2100 00:00:00 GMT\r\n"
    [failed] = [event async for event in ask_for(**speech.row).stream(ASKED)]
    assert failed.error.retry_after_s > 1e9


@pytest.mark.parametrize("kind", ["a byte each", "in the middle of a character", "with CRLF", "in lines"])
async def test_text_comes_whole_however_it_is_cut_and_written(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech, kind: str
) -> None:
    text = "grün 🟩\u2028\r ok"
    whole = speech.begin() + speech.text(text) + speech.end()
    middle = whole.index("🟩".encode()) + 2
    lines = speech.text(text).replace(b', "', b',\ndata: "')  # an event's data may be several lines
    wire.script = {
        "a byte each": [whole[at : at + 1] for at in range(len(whole))],
        "in the middle of a character": (whole[:middle], 0.02, whole[middle:]),
        "with CRLF": (whole.replace(b"\n", b"\r\n"),),
        "in lines": (speech.begin(), lines, speech.end()),
    }[kind]
    assert (await collect(ask_for(**speech.row).stream(ASKED))).text == text


async def test_an_answer_that_tells_no_usage_has_none_and_no_cost(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.script = (speech.begin(prompt=None), speech.text("red"), speech.end(prompt=None, completion=None))
    finished = (await collect(ask_for(**speech.row).stream(ASKED))).finished
    assert finished.usage == Usage()
    assert finished.cost.usd is None


async def test_pings_and_later_inventions_add_nothing(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.script = (*speech.pings, speech.begin(), *speech.pings, speech.text("red"), *speech.pings, speech.end())
    answer = await collect(ask_for(**speech.row).stream(ASKED))
    assert (answer.text, answer.finished.finish_reason) == ("red", "stop")


async def test_a_call_that_nobody_offered_is_an_error_and_no_answer(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.script = (speech.begin(), speech.call("{}"), speech.end("tool_calls"))
    [failed] = [event async for event in ask_for(**speech.row).stream(ASKED)]
    assert failed.error.message == "far called a tool, and was offered none"


async def test_what_a_fault_leaves_of_the_key_and_the_prompt_is_nothing(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for sdk in ("openai", "anthropic"):  # as OPENAI_LOG=debug does
        logging.getLogger(sdk).setLevel(logging.DEBUG)
    said = f"Incorrect key {KEY} (sk-te***ghij) for: what colour is it? {'A' * 50}"
    wire.status, wire.content_type, wire.script = 401, "application/json", (speech.error_body(said),)
    far = ask_for(KEY, api_key_env="FAR_KEY", **speech.row)
    [failed] = [event async for event in far.stream(ASKED)]
    assert failed.error.message == "far answered 401, the key was refused: Incorrect key [...] [...] for: [...] [...]"
    for text in (repr(failed), repr(far), caplog.text):
        assert KEY not in text
        assert "what colour" not in text


async def test_the_provider_sees_the_reader_leave(
    wire: WireServer, ask_for: Callable[..., HostedModel], speech: Speech
) -> None:
    wire.script = (speech.begin(), speech.text("re"), 5.0, speech.end())
    async with aclosing(ask_for(**speech.row).stream(ASKED)) as events:
        assert await anext(events) == TextDelta(text="re")
    await asyncio.wait_for(wire.left.wait(), 10)
