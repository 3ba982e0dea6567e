"""What an operator sees: metrics, the log, keys with their limits."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterator

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.events import AnswerEvent, Attempt, Cost, Egress, Finished, Memory, Timings, Usage
from serving.engine.loop import EngineFigures
from serving.logs import JsonLines
from serving.metrics import Metrics
from tests.serving.conftest import RunningService, running, wait_for
from tests.serving.test_streams import LONG, serve_script, slowed

LOCAL = {"target": "local/tiny-scenes@fp32"}


@pytest.fixture
def fresh() -> Iterator[RunningService]:
    with running(models=("tiny-scenes@fp32",)) as service:
        yield service.ready()


def figures(service: RunningService) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of /metrics, as another reader of the format reads it."""
    response = service.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def figure(service: RunningService, name: str, **labels: str) -> float:
    return figures(service).get((f"nearfar_{name}", frozenset(labels.items())), 0.0)


def test_an_answer_is_counted_with_its_tokens_and_its_stages(fresh: RunningService, red_circle: bytes) -> None:
    answer = fresh.client.post("/infer", files={"image": red_circle}, data={"prompt": "What color is it?"}).json()
    assert figure(fresh, "answers_total", **LOCAL, outcome="finished") == 1  # the warm-up is no answer
    assert figure(fresh, "prompt_tokens_total", **LOCAL, cache="miss") == answer["usage"]["prompt_tokens"]
    assert figure(fresh, "completion_tokens_total", **LOCAL) == answer["usage"]["completion_tokens"]
    assert figure(fresh, "images_total", **LOCAL, cache="miss") == 1
    assert figure(fresh, "time_to_first_token_seconds_count", **LOCAL, cache="cold") == 1
    assert figure(fresh, "answer_seconds_count", **LOCAL) == 1
    for stage in ("image_decode", "preprocess", "vision", "prefill"):
        assert figure(fresh, "stage_seconds_count", **LOCAL, stage=stage) == 1
        in_answer = answer["timings"][f"{stage}_ms"] / 1000
        assert figure(fresh, "stage_seconds_sum", **LOCAL, stage=stage) == pytest.approx(in_answer, abs=1e-6)


def test_what_runs_is_a_gauge_and_who_left_is_counted(fresh: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    slowed(fresh, monkeypatch, "decode_together", 0.01)
    with fresh.client.stream("POST", "/v1/chat/completions", json=LONG) as busy:
        pieces = busy.iter_bytes()  # kept: without a reader the response is closed
        next(pieces)
        assert figure(fresh, "requests_running") + figure(fresh, "requests_waiting") == 1
        wait_for(lambda: figure(fresh, "inter_token_seconds_count", **LOCAL) >= 1)
    wait_for(lambda: figure(fresh, "answers_total", **LOCAL, outcome="left") == 1)
    wait_for(lambda: figure(fresh, "requests_running") == 0)  # its slot is free after the step at work


def test_what_was_sent_elsewhere_and_what_was_cached_there_is_counted_by_target(fresh: RunningService) -> None:
    serve_script(fresh, "one", "two")
    for _ in range(2):
        assert fresh.client.post("/infer", json={"prompt": "x", "model": "script/one"}).status_code == 200
    script = {"target": "script/one"}
    assert figure(fresh, "sent_bytes_total", **script, place="elsewhere") == 2 * 1234
    assert figure(fresh, "prompt_tokens_total", **script, cache="hit") == 2 * 4
    assert figure(fresh, "time_to_first_token_seconds_count", **script, cache="cold") == 2  # 4 of 10


def test_what_all_prompts_begin_with_makes_no_answer_warm(fresh: RunningService) -> None:
    long = "How many shapes are there? " * 8
    for prompt, warm in (("What color is it?", 0), (long, 0), (f"{long} Say it.", 1)):
        assert fresh.client.post("/infer", json={"prompt": prompt}).status_code == 200
        assert figure(fresh, "time_to_first_token_seconds_count", **LOCAL, cache="warm") == warm
    assert figure(fresh, "prompt_tokens_total", **LOCAL, cache="hit") > 0


@pytest.mark.asyncio
@pytest.mark.parametrize("counted", [Usage(cached_tokens=4), Usage(prompt_tokens=3, cached_tokens=4)])
async def test_an_endpoint_that_counts_wrongly_loses_no_answer(counted: Usage) -> None:
    finished = Finished(
        model="m", target="t", finish_reason="stop", usage=counted, timings=Timings(), images=(),
        memory=Memory(), egress=Egress(left_device=True, bytes_sent=1, destination="x"), cost=Cost(usd=None, basis="x"),
    )  # fmt: skip

    async def stream() -> AsyncGenerator[AnswerEvent, None]:
        yield finished

    metrics = Metrics(EngineFigures)
    assert [event async for event in metrics.watch("t", stream())] == [finished]
    assert b'nearfar_prompt_tokens_total{cache="miss",target="t"} 0.0' in metrics.text()


@pytest.mark.asyncio
@pytest.mark.parametrize(("server", "fallbacks"), [("first", 0), ("second", 1)])
async def test_an_unsure_answer_given_after_all_is_a_fallback_where_it_is_not_the_firsts(
    server: str, fallbacks: int
) -> None:
    names = ("first", "second", "third")  # the third was asked because the answer was unsure
    attempts = tuple(Attempt(target=name, outcome="served" if name == server else "failed") for name in names)
    finished = Finished(
        model="m", target=server, finish_reason="stop", usage=Usage(), timings=Timings(), images=(), memory=Memory(),
        egress=Egress(left_device=True, bytes_sent=1, destination="x"), cost=Cost(usd=None, basis="x"),
        attempts=attempts,
    )  # fmt: skip

    async def stream() -> AsyncGenerator[AnswerEvent, None]:
        yield finished

    metrics = Metrics(EngineFigures)
    _ = [event async for event in metrics.watch("way", stream())]
    counted = [line for line in metrics.text().splitlines() if line.startswith(b"nearfar_route_fallbacks_total{")]
    assert len(counted) == fallbacks


def test_every_refusal_is_counted_by_its_reason(fresh: RunningService) -> None:
    fresh.client.post("/infer", json={"prompt": "x", "model": "nobody"})
    fresh.client.post("/infer", json={"prompt": ""})
    fresh.client.post("/infer", content=b"x", headers={"content-type": "text/plain"})
    fresh.client.get("/health", headers={"host": "evil.example"})
    for kind in ("not_found", "invalid_request", "unsupported_media", "forbidden"):
        assert figure(fresh, "errors_total", type=kind) == 1


def test_metrics_want_a_key_where_there_are_keys() -> None:
    with running(api_keys=("one",), models=("tiny-scenes@fp32",)) as service:
        assert service.client.get("/metrics").status_code == 401
        assert service.client.get("/metrics", headers={"x-api-key": "one"}).status_code == 200


def test_two_services_in_one_process_count_apart(fresh: RunningService) -> None:
    with running(models=("tiny-scenes@fp32",)) as other:
        other.ready().client.post("/infer", json={"prompt": "x", "max_tokens": 1})
        assert figure(other, "answers_total", **LOCAL, outcome="finished") == 1
    assert figure(fresh, "answers_total", **LOCAL, outcome="finished") == 0


def test_each_request_is_one_line_of_json_without_its_prompt(
    client: httpx2.Client, red_circle: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nearfar.access")
    data = {"prompt": "my-secret-question about it", "max_tokens": "2"}
    client.post("/infer", files={"image": red_circle}, data=data, headers={"x-request-id": "the-one"})
    client.post("/infer", json={"prompt": "my-secret-question", "model": "nobody"})

    def lines() -> list[str]:
        return [JsonLines().format(record) for record in caplog.records if record.name == "nearfar.access"]

    wait_for(lambda: len(lines()) == 2)
    assert "secret" not in "".join(lines())
    good, bad = map(json.loads, lines())
    assert (good["request_id"], good["path"], good["status"]) == ("the-one", "/infer", 200)
    assert (good["target"], good["completion_tokens"]) == ("local/tiny-scenes@int8", 2)
    assert good["duration_ms"] >= good["ttft_ms"] > 0
    assert (bad["status"], bad["error"]) == (404, "not_found")


def test_an_exception_and_a_line_break_stay_one_line_of_json() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord("nearfar", logging.ERROR, "", 0, "a\nb", (), (type(error), error, None))
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "a\nb"
    assert "ValueError" in json.loads(line)["exception"]
