"""`POST /infer` on the contract's fields, over real HTTP with the embedded model."""

from __future__ import annotations

import hashlib
import json

import httpx2
import pytest

from tests.serving.conftest import RunningService, events_of, picture, wait_for
from tests.serving.test_streams import slowed

TOP = {"id", "model", "target", "text", "finish_reason", "usage", "timings", "images", "memory", "egress", "cost",
       "energy", "notice", "confidence", "attempts"}  # fmt: skip
STAGES = ("queue_ms", "image_decode_ms", "preprocess_ms", "vision_ms", "prefill_ms", "ttft_ms", "total_ms")


def ask(client: httpx2.Client, image: bytes, **fields: str) -> httpx2.Response:
    return client.post(
        "/infer", files={"image": ("picture", image)}, data={"prompt": "What color is the circle?", **fields}
    )


def test_a_picture_as_multipart_gets_the_right_answer_and_every_figure(
    client: httpx2.Client, red_circle: bytes
) -> None:
    answer = ask(client, red_circle + b" ").json()  # other bytes: no cache has seen them
    assert set(answer) == TOP
    assert answer["text"] == "red"
    assert (answer["model"], answer["target"]) == ("tiny-scenes", "local/tiny-scenes@int8")
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["image_tokens"] == 16
    assert answer["usage"]["completion_tokens"] == 2  # "red" and the stop token
    assert all(answer["timings"][stage] > 0 for stage in STAGES)
    assert answer["timings"]["ttft_ms"] <= answer["timings"]["total_ms"]
    assert answer["egress"] == {"left_device": False, "bytes_sent": 0, "destination": None, "withheld": None}
    assert answer["cost"]["usd"] == 0.0
    assert "toy" in answer["notice"]
    assert answer["memory"]["process_peak_bytes"] > answer["memory"]["model_bytes"] > 1_000_000


def test_the_image_report_tells_sizes_tiles_tokens_and_the_received_hash(client: httpx2.Client) -> None:
    image = picture(300, 200)
    report = ask(client, image).json()["images"][0]
    assert report == {
        "width": 300, "height": 200, "used_width": 128, "used_height": 64, "tiles": 3, "tokens": 48,
        "sha256": hashlib.sha256(image).hexdigest(), "detail": "auto",
        "reduced": False, "metadata_bytes_removed": None,
    }  # fmt: skip


@pytest.mark.parametrize(("detail", "tiles"), [("low", 1), ("auto", 1), ("high", 5)])
def test_detail_decides_the_tiles(client: httpx2.Client, detail: str, tiles: int) -> None:
    answer = ask(client, picture(200, 200), detail=detail).json()
    assert answer["images"][0]["tiles"] == tiles
    assert answer["images"][0]["detail"] == detail
    assert answer["usage"]["image_tokens"] == 16 * tiles


def test_json_and_multipart_give_the_same_answer(client: httpx2.Client, red_circle: bytes, red_circle_url: str) -> None:
    body = {"prompt": "What color is the circle?", "images": [red_circle_url]}
    assert client.post("/infer", json=body).json()["text"] == ask(client, red_circle).json()["text"]


def test_a_stream_sends_deltas_that_join_to_the_final_text(client: httpx2.Client, red_circle: bytes) -> None:
    response = ask(client, red_circle, prompt="Describe the image.", stream="true")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert {name for name, _ in events[:-1]} == {"delta"}
    assert events[-1][0] == "finished"
    final = json.loads(events[-1][1])
    assert "".join(json.loads(data)["text"] for _, data in events[:-1]) == final["text"]
    assert set(final) == TOP


def test_a_task_brings_its_own_prompt(client: httpx2.Client, red_circle: bytes) -> None:
    answer = client.post("/infer", files={"image": red_circle}, data={"task": "caption"})
    assert answer.status_code == 200
    assert "circle" in answer.json()["text"]


def test_text_alone_is_answered_and_image_figures_are_null(client: httpx2.Client) -> None:
    answer = client.post("/infer", json={"prompt": "Hello", "max_tokens": 4}).json()
    assert answer["images"] == []
    assert answer["timings"]["vision_ms"] is None
    assert answer["timings"]["image_decode_ms"] is None


def test_the_other_recipe_can_be_named_in_short(client: httpx2.Client, red_circle: bytes) -> None:
    assert ask(client, red_circle, model="tiny-scenes@fp32").json()["target"] == "local/tiny-scenes@fp32"
    assert ask(client, red_circle, model="tiny-scenes").json()["target"] == "local/tiny-scenes@int8"


def test_max_tokens_ends_the_answer_with_length(client: httpx2.Client, red_circle: bytes) -> None:
    answer = ask(client, red_circle, prompt="Describe the image.", max_tokens="2").json()
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_the_same_seed_gives_the_same_sample(client: httpx2.Client, red_circle: bytes) -> None:
    def sample(seed: int) -> str:
        fields = {"temperature": "2", "seed": str(seed), "max_tokens": "24", "prompt": "Describe the image."}
        return str(ask(client, red_circle, **fields).json()["text"])

    assert sample(5) == sample(5)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_a_client_that_leaves_frees_its_place(
    service: RunningService, red_circle_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(service, monkeypatch, "decode_together", 0.01)
    engine = service.engine
    body = {
        "max_tokens": 900, "stream": True, "ignore_eos": True,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": red_circle_url}}]}],
    }  # fmt: skip
    with service.client.stream("POST", "/v1/chat/completions", json=body) as response:
        pieces = response.iter_bytes()
        next(pieces)
        wait_for(lambda: engine.in_hand == 1)
    wait_for(lambda: engine.in_hand == 0 and not engine.loop.running, timeout_s=5.0)  # of the nine that it would take


def test_a_plain_request_is_given_up_when_its_client_leaves(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed(service, monkeypatch, "decode_together", 0.01)
    engine = service.engine
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, "ignore_eos": True}
    with pytest.raises(httpx2.TimeoutException):
        service.client.post("/v1/chat/completions", json=body, timeout=0.15)
    wait_for(lambda: engine.in_hand == 0 and not engine.loop.running, timeout_s=5.0)  # of the nine that it would take
