"""The real SDK against a real socket: what is sent, what is made of the answers, and what happens when things break."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import random
import socket
import struct
import sys
import zlib
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from comparisons.runner import ArmDelta, compare
from models.answerer import collect
from models.errors import BadRequest, PayloadTooLarge, Unavailable, UpstreamError
from models.events import Failed, Finished, TextDelta, Usage
from models.request import GenerationSettings, question
from serving.hosted.hosted_model import HostedModel
from serving.hosted.providers import Provider

KEY = "sk-test-0123456789abcdefghij"
ASKED = question("what colour is it?")


def picture(width: int = 8, height: int = 4, **options: object) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "JPEG", **options)
    return data.getvalue()


def png_without_pixels(width: int, height: int) -> bytes:
    """Its header is whole; whoever decodes it fails."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


async def failure(answerer: HostedModel, request=ASKED) -> UpstreamError:
    events = [event async for event in answerer.stream(request)]
    assert isinstance(events[-1], Failed)
    assert not any(isinstance(event, Finished) for event in events)
    assert "\n" not in events[-1].error.message
    return events[-1].error


@pytest.mark.asyncio
async def test_a_video_and_a_document_go_as_their_pictures_with_times_and_page_numbers(wire, ask_for):
    clip = (Path(__file__).parents[1] / "models" / "golden" / "short.mp4").read_bytes()
    pages = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(pages, "TIFF", save_all=True, append_images=[Image.new("L", (60, 90))])
    request = question("what happens?", document=pages.getvalue(), video=clip)
    finished = (await collect(ask_for().stream(request))).finished
    sent = wire.received[0].json["messages"][0]["content"]
    texts = [part["text"] for part in sent if part["type"] == "text"]
    assert texts[:2] == ["\nPage 1 of 2:", "\nPage 2 of 2:"]
    assert texts[3].startswith("You are provided the following series of five frames from a 0:00:05")
    assert texts[4] == "\nFrame from 00:00:"
    assert texts[-1] == "what happens?"
    kinds = [part["image_url"]["url"].partition(";")[0] for part in sent if part["type"] == "image_url"]
    assert kinds == ["data:image/png"] * 2 + ["data:image/jpeg"] * 5
    assert [(image.page, image.timestamp_s) for image in finished.images[:3]] == [(1, None), (2, None), (None, 0.0)]
    assert finished.egress.bytes_sent == len(wire.received[0].body)


@pytest.mark.asyncio
async def test_a_damaged_video_is_refused_before_anything_is_sent(wire, ask_for):
    assert isinstance(await failure(ask_for(), question("what?", video=b"\x00\x00\x00\x18ftypisom")), BadRequest)
    assert wire.received == []


@pytest.mark.asyncio
async def test_an_answer_streams_and_its_figures_are_filled_in(wire, ask_for):
    data = picture()
    events = [event async for event in ask_for().stream(question("what colour?", (data,), detail="low"))]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["re", "d"]
    finished = events[-1]
    assert isinstance(finished, Finished)
    assert (finished.target, finished.model, finished.finish_reason) == ("far/m", "m", "stop")
    assert finished.usage == Usage(prompt_tokens=31, completion_tokens=2)
    timings = finished.timings
    assert 0 < timings.ttft_ms <= timings.total_ms
    assert timings.decode_ms == pytest.approx(timings.total_ms - timings.ttft_ms)
    assert timings.tokens_per_second == pytest.approx(1 / (timings.decode_ms / 1000))
    assert timings.prefill_ms is None
    assert finished.memory.model_bytes is None
    (report,) = finished.images
    assert (report.width, report.height, report.detail, report.tiles) == (8, 4, "low", None)
    assert report.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.asyncio
async def test_the_bytes_counted_are_the_bytes_the_server_received_and_loopback_does_not_leave(wire, ask_for):
    data = picture(200, 100)
    finished = (await collect(ask_for().stream(question("what?", (data,))))).finished
    (received,) = wire.received
    assert finished.egress.bytes_sent == len(received.body)
    assert finished.egress.left_device is False
    assert finished.egress.destination == f"127.0.0.1:{wire.port}"
    assert (finished.cost.usd, finished.cost.basis) == (None, "no price is known for far")
    url = received.json["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) == data


@pytest.mark.asyncio
async def test_the_address_connected_to_decides_not_the_name(wire, ask_for, monkeypatch):
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real("127.0.0.1", *rest, **more))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = replace(ASKED, policy="any")
    finished = (await collect(ask_for(base_url=f"http://far.test:{wire.port}/v1").stream(asked))).finished
    assert finished.egress.left_device is False
    assert finished.egress.destination == f"far.test:{wire.port}"


@pytest.mark.asyncio
async def test_a_proxy_on_loopback_counts_as_leaving(wire, ask_for, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{wire.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    finished = (await collect(ask_for(base_url="http://far.test/v1").stream(replace(ASKED, policy="any")))).finished
    assert wire.received[0].line.startswith("POST http://far.test/v1/chat/completions")
    assert finished.egress.left_device is True
    assert finished.cost.usd is None


@pytest.mark.asyncio
async def test_proxies_of_the_environment_are_not_used_for_loopback(wire, ask_for, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await collect(ask_for().stream(ASKED))).text == "red"


@pytest.mark.asyncio
async def test_nothing_of_the_environment_and_nothing_about_this_machine_is_sent(wire, ask_for, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-ambient\nX-Mine: yes")
    await collect(ask_for(KEY, api_key_env="FAR_KEY").stream(ASKED))
    headers = wire.received[0].headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert set(headers) <= {
        *("host", "accept", "accept-encoding", "connection", "content-type", "content-length"),
        *("authorization", "user-agent", "x-stainless-raw-response"),
    }
    assert headers["user-agent"] == "nearfar"


@pytest.mark.asyncio
async def test_text_in_one_piece_shows_no_decoding(wire, ask_for, speak):
    wire.script = (speak["chunk"]("red", "stop"), 0.01, speak["usage"](5, 3), speak["DONE"])
    timings = (await collect(ask_for().stream(ASKED))).finished.timings
    assert timings.ttft_ms < timings.total_ms
    assert (timings.decode_ms, timings.tokens_per_second) == (None, None)


@pytest.mark.asyncio
async def test_pings_comments_and_unknown_fields_are_ignored(wire, ask_for, speak):
    wire.script = (
        *(b": ping\n\n", b"event: ping\ndata: {}\n\n", b"retry: 5\n\n"),
        speak["event"]({"choices": None}),
        *(speak["chunk"]("red", reasoning="hm"), speak["chunk"](finish="eos"), speak["DONE"]),
    )
    answer = await collect(ask_for().stream(ASKED))
    assert (answer.text, answer.finished.finish_reason) == ("red", "stop")


@pytest.mark.asyncio
async def test_a_connection_is_used_again_after_a_whole_answer(wire, ask_for):
    answerer = ask_for()
    for _ in range(3):
        await collect(answerer.stream(ASKED))
    assert (len(wire.received), wire.connections) == (3, 1)


@pytest.mark.asyncio
async def test_hidden_thinking_does_not_count_as_decoding_speed(wire, ask_for, speak):
    counts = speak["usage"](5, 102, completion_tokens_details={"reasoning_tokens": 100})
    wire.script = (*(speak["chunk"]("a"), 0.02, speak["chunk"]("b", "stop")), counts, speak["DONE"])
    timings = (await collect(ask_for().stream(ASKED))).finished.timings
    assert timings.tokens_per_second == pytest.approx(1 / (timings.decode_ms / 1000))


@pytest.mark.asyncio
async def test_a_refusal_is_an_answer_that_says_so(wire, ask_for, speak):
    wire.script = (speak["chunk"](refusal="I will not."), speak["chunk"](finish="stop"), speak["DONE"])
    answer = await collect(ask_for().stream(ASKED))
    assert (answer.text, answer.finished.finish_reason) == ("I will not.", "refusal")


@pytest.mark.asyncio
async def test_no_server_at_the_address_is_a_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        provider = Provider(name="far", base_url=f"http://127.0.0.1:{port}/v1", models=("m",))
        answerer = HostedModel(provider, "m", "none")
        assert (await failure(answerer)).message == f"far could not be reached at 127.0.0.1:{port}"
        await answerer.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("parallel", [False, True])
async def test_the_provider_sees_the_reader_of_a_comparison_leave(wire, ask_for, speak, parallel):
    wire.script = (speak["chunk"]("re"), 5.0, speak["DONE"])
    arms = [ask_for(), ask_for(name="farther")]
    compared = compare(ASKED, arms, reference=None, parallel=parallel, rng=random.Random(0), comparison_id="cmp_1")
    async with aclosing(compared) as events:
        assert isinstance(await anext(events), ArmDelta)
    await asyncio.wait_for(wire.left.wait(), 10)


@pytest.mark.asyncio
@pytest.mark.parametrize("script", [[5.0], ["re", 5.0]])
async def test_the_provider_sees_the_reader_being_cancelled(wire, ask_for, speak, script):
    wire.script = [speak["chunk"](step) if isinstance(step, str) else step for step in script]
    task = asyncio.create_task(collect(ask_for().stream(ASKED)))
    await wire.asked.wait()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(wire.left.wait(), 10)


@pytest.mark.asyncio
async def test_closing_the_answerer_ends_running_streams_and_refuses_new_ones(wire, ask_for, speak):
    wire.script = (speak["chunk"]("re"), 5.0, speak["DONE"])
    answerer = ask_for()
    task = asyncio.create_task(failure(answerer))
    await wire.asked.wait()
    await asyncio.sleep(0.02)
    await answerer.aclose()
    assert isinstance(await asyncio.wait_for(task, 10), Unavailable)
    assert isinstance(await failure(answerer), Unavailable)


@pytest.mark.asyncio
@pytest.mark.parametrize("data", [b"no picture", picture()[:20]])
async def test_what_is_no_picture_is_refused_before_anything_is_sent(wire, ask_for, data):
    assert isinstance(await failure(ask_for(), question("what?", (data,))), BadRequest)
    assert not wire.received


@pytest.mark.asyncio
@pytest.mark.parametrize("data", [png_without_pixels(8000, 8000), picture() + bytes(20 * 2**20)])
async def test_a_picture_over_the_caps_is_refused_before_anything_is_sent(wire, ask_for, data):
    assert isinstance(await failure(ask_for(), question("what?", (data,))), PayloadTooLarge)
    assert not wire.received


@pytest.mark.asyncio
async def test_a_picture_is_sent_without_being_decoded(wire, ask_for):
    data = png_without_pixels(7000, 7000)
    finished = (await collect(ask_for().stream(question("what?", (data,))))).finished
    assert (finished.images[0].width, finished.images[0].height) == (7000, 7000)


@pytest.mark.asyncio
async def test_a_picture_that_lies_on_its_side_is_reported_upright(wire, ask_for):
    exif = Image.Exif()
    exif[0x0112] = 6
    finished = (await collect(ask_for().stream(question("what?", (picture(8, 4, exif=exif),))))).finished
    assert (finished.images[0].width, finished.images[0].height) == (4, 8)


@pytest.mark.asyncio
async def test_answers_at_the_same_time_are_counted_apart(wire, ask_for):
    answerer = ask_for()
    asked = [question("x" * length) for length in (10, 1000, 5000)]
    answers = await asyncio.gather(*(collect(answerer.stream(request)) for request in asked))
    assert sorted(len(received.body) for received in wire.received) == [
        answer.finished.egress.bytes_sent for answer in answers
    ]


@pytest.mark.asyncio
async def test_the_settings_go_to_the_wire(wire, ask_for):
    settings = GenerationSettings(max_tokens=5, temperature=0.0)
    await collect(ask_for().stream(question("what?", settings=settings)))
    body = wire.received[0].json
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (5, 0.0, True)


@pytest.mark.asyncio
async def test_without_the_extra_one_line_says_what_to_install(ask_for, monkeypatch):
    monkeypatch.setitem(sys.modules, "serving.hosted.transport", None)
    error = await failure(ask_for())
    assert isinstance(error, Unavailable)
    assert 'pip install "nearfar[hosted]"' in error.message
