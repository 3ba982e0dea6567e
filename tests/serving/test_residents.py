"""Models that come into memory and go, over HTTP: when, in whose place, and what becomes of those who wait."""

from __future__ import annotations

import base64
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from models.bundle import Bundle
from models.loaded_model import LoadedModel
from models.memory import LEAST_CONTEXT, need_of, total_bytes
from models.onnx_model import Floats, OnnxModel
from models.tiny_scenes import BUNDLES
from serving.engine import prepare
from tests.serving.conftest import RunningService, picture, process, running, server_of, wait_for
from tests.serving.test_models import install
from tests.serving.test_streams import open_request

INT8, FP32 = "local/tiny-scenes@int8", "local/tiny-scenes@fp32"
ONE_FITS = total_bytes([need_of(Bundle.read(BUNDLES["tiny-scenes@fp32"]))], 1, LEAST_CONTEXT)
QUESTION = {"prompt": "x", "max_tokens": 3}
LONG = {"prompt": "x", "max_tokens": 100, "response_format": {"type": "regex", "pattern": "[a-z ]{200}"}}


@pytest.fixture
def narrow() -> Iterator[RunningService]:
    """A service whose budget holds one of its two models."""
    with running(memory_budget=ONE_FITS) as service:
        yield service.ready()


@pytest.fixture
def wide() -> Iterator[RunningService]:
    with running() as service:
        yield service.ready()


@contextmanager
def meanwhile(work: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Future[Any]]:
    """That call in a thread of its own; over when the block is."""
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(work, *arguments, **options)


def states(service: RunningService) -> dict[str, str]:
    return {row["target"]: row["state"] for row in service.client.get("/models").json()["models"]}


def ask(service: RunningService, model: str, **more: Any) -> Any:
    """The answer of that model; fails the test where there is none."""
    response = httpx2.post(
        f"{service.url}/infer", json={**QUESTION, "model": model, **more}, timeout=30, trust_env=False
    )
    assert response.status_code == 200, response.text
    return response.json()


def slowed_model(service: RunningService, target: str | None = None, seconds: float = 0.02) -> threading.Event:
    """Let each token of that loaded model take that long; set once there was one."""
    onnx, begun = service.model(target).onnx, threading.Event()
    real = onnx.decode_together

    def slowly(*arguments: Any) -> Any:
        begun.set()
        time.sleep(seconds)
        return real(*arguments)

    onnx.decode_together = slowly  # type: ignore[method-assign]
    return begun


def slow_loading(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """Let every load from now on take that much longer; the targets that were loaded."""
    real, loads = LoadedModel.load, []

    def load(folder: Path, **options: Any) -> LoadedModel:
        loads.append(Bundle.read(folder).target)
        time.sleep(seconds)
        return real(folder, **options)

    monkeypatch.setattr(LoadedModel, "load", load)
    return loads


def test_models_that_fit_together_are_all_loaded_and_told_with_their_memory(wide: RunningService) -> None:
    assert states(wide) == {INT8: "loaded", FP32: "loaded"}
    listed = wide.client.get("/models").json()
    rows = {row["target"]: row["memory"] for row in listed["models"]}
    assert rows[FP32]["bytes"] > rows[INT8]["bytes"] > 4_400_000
    assert (rows[INT8]["slots"], rows[INT8]["context"]) == (4, 1024)
    assert max(row["bytes"] for row in rows.values()) < listed["memory"]["counted_bytes"]
    assert listed["memory"]["counted_bytes"] <= listed["memory"]["budget_bytes"]
    shown = wide.client.get("/v1/models").json()["data"]
    assert [(row["id"], row["state"], row["memory_bytes"]) for row in shown] == [
        (target, "loaded", rows[target]["bytes"]) for target in (INT8, FP32)
    ]
    assert ask(wide, FP32)["timings"]["load_ms"] is None


def test_where_the_budget_holds_one_the_last_one_asked_is_in_memory(
    narrow: RunningService, red_circle_url: str
) -> None:
    assert states(narrow) == {INT8: "loaded", FP32: "unloaded"}
    assert ask(narrow, INT8)["timings"]["load_ms"] is None
    for model, other in ((FP32, INT8), (INT8, FP32)):
        answer = ask(narrow, model, prompt="What color is the circle?", images=[red_circle_url])
        assert (answer["text"], answer["target"]) == ("red", model)
        assert answer["timings"]["load_ms"] > 0
        assert states(narrow) == {model: "loaded", other: "unloaded"}
        memory = narrow.client.get("/models").json()["memory"]
        assert memory["counted_bytes"] <= memory["budget_bytes"] == ONE_FITS


@pytest.mark.parametrize(("last", "gone"), [("one", "two"), ("two", "one")])
def test_the_least_recently_used_goes_first(tmp_path: Path, last: str, gone: str) -> None:
    folders = [install(tmp_path, name) for name in ("one", "two", "three")]
    two_fit = total_bytes([need_of(Bundle.read(folder)) for folder in folders[:2]], 1, LEAST_CONTEXT)
    names = [folder.name for folder in folders]
    with running(data_dir=tmp_path, models=names, memory_budget=two_fit, max_running=1) as service:
        assert list(states(service.ready()).values()) == ["loaded", "loaded", "unloaded"]
        ask(service, last)
        ask(service, "three")
        assert [name for name, state in states(service).items() if state == "unloaded"] == [f"local/{gone}@int8"]


def test_probes_wake_no_model(narrow: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow.client.post(f"/models/{INT8}/unload")
    loads = slow_loading(monkeypatch)
    for path in ("/health", "/ready", "/metrics", "/models", "/targets", "/v1/models", f"/v1/models/{FP32}", "/"):
        assert narrow.client.get(path).status_code == 200
    assert states(narrow) == {INT8: "unloaded", FP32: "unloaded"}
    assert loads == []


def test_an_idle_model_leaves_memory_and_comes_back_when_it_is_asked() -> None:
    with running(models=("tiny-scenes@fp32",), model_ttl_s=1.0) as service:
        slow = slowed_model(service.ready(), seconds=0.05)
        assert ask(service, FP32, **LONG)["usage"]["completion_tokens"] >= 30  # though that takes longer
        assert slow.is_set()
        assert states(service) == {FP32: "loaded"}
        wait_for(lambda: states(service) == {FP32: "unloaded"})
        assert service.client.get("/ready").status_code == 200
        assert ask(service, FP32)["timings"]["load_ms"] > 0
        assert states(service) == {FP32: "loaded"}


def test_without_a_time_to_live_a_model_stays() -> None:
    with running(models=("tiny-scenes@fp32",), model_ttl_s=0) as service:
        ask(service.ready(), FP32)
        time.sleep(0.3)
        assert states(service) == {FP32: "loaded"}


def test_a_running_answer_is_whole_before_its_model_makes_room_for_another(narrow: RunningService) -> None:
    begun = slowed_model(narrow, INT8)
    with meanwhile(ask, narrow, INT8, **LONG) as answering:
        assert begun.wait(10)
        other = ask(narrow, FP32)
        assert answering.done()
        tokens = answering.result()["usage"]["completion_tokens"]
    assert tokens == LONG["max_tokens"] or answering.result()["finish_reason"] == "stop"
    assert other["timings"]["load_ms"] > other["timings"]["total_ms"]
    assert states(narrow) == {INT8: "unloaded", FP32: "loaded"}


def test_a_model_is_loaded_while_another_answers(wide: RunningService) -> None:
    wide.client.post(f"/models/{FP32}/unload")
    slowed_model(wide, INT8)
    endless = {**LONG, "model": INT8, "stream": True, "max_tokens": 900}
    endless["response_format"] = {"type": "regex", "pattern": "[a-z ]{2000}"}
    with wide.client.stream("POST", "/infer", json=endless) as answering:
        pieces = answering.iter_bytes()
        next(pieces)
        loaded = wide.client.post("/models/tiny-scenes@fp32/load")
        assert (loaded.status_code, loaded.json()["target"], loaded.json()["state"]) == (200, FP32, "loaded")
        assert ask(wide, FP32)["timings"]["load_ms"] is None
        assert wide.engine.loop.running == 1
        assert b"event: delta" in next(pieces)


def test_unloading_waits_for_a_running_answer_and_who_asks_meanwhile_gets_the_next_stay(wide: RunningService) -> None:
    begun = slowed_model(wide, INT8)
    with meanwhile(ask, wide, INT8, **LONG) as answering:
        assert begun.wait(10)
        with meanwhile(wide.client.post, f"/models/{INT8}/unload", timeout=30) as unloading:
            wait_for(lambda: wide.services.residents and wide.services.residents.all[0].state == "unloading")
            later = ask(wide, INT8)
            assert answering.done()
            assert unloading.result().status_code == 200
    assert answering.result()["usage"]["completion_tokens"] >= 30
    assert later["timings"]["load_ms"] > 0
    assert states(wide)[INT8] == "loaded"


def test_unloading_waits_for_a_request_that_is_still_prepared(
    wide: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, preparing, go_on = prepare.decode_image, threading.Event(), threading.Event()

    def slowly(data: bytes) -> Any:
        preparing.set()
        assert go_on.wait(10)
        return decode(data)

    monkeypatch.setattr(prepare, "decode_image", slowly)
    url = "data:image/png;base64," + base64.b64encode(picture(91, 90)).decode()
    with meanwhile(ask, wide, INT8, images=[url]) as answering:
        assert preparing.wait(10)
        with meanwhile(wide.client.post, f"/models/{INT8}/unload", timeout=30) as unloading:
            wait_for(lambda: wide.services.residents and wide.services.residents.all[0].state == "unloading")
            time.sleep(0.1)
            assert not unloading.done()
            go_on.set()
            assert unloading.result().json()["state"] == "unloaded"
    assert answering.result()["target"] == INT8


def test_a_model_is_unloaded_by_name_twice_and_nothing_refers_to_it(wide: RunningService) -> None:
    ask(wide, FP32)
    model = weakref.ref(wide.model(FP32))
    session = weakref.ref(wide.model(FP32).onnx)
    for _ in range(2):
        answer = wide.client.post("/models/tiny-scenes@fp32/unload")
        assert (answer.status_code, answer.json()["state"]) == (200, "unloaded")
    wait_for(lambda: (model(), session()) == (None, None))  # the thread that let go of it may still be returning


@pytest.mark.parametrize("action", ["load", "unload"])
def test_a_name_that_is_no_local_model_is_refused(action: str) -> None:
    with running(endpoints=("box=http://127.0.0.1:9/v1,one",), models=("tiny-scenes",), api_keys=("k",)) as service:
        service.ready()
        post = lambda name, key: service.client.post(f"/models/{name}/{action}", headers={"x-api-key": key})  # noqa: E731
        assert post("nobody", "k").status_code == 404
        assert post("box/one", "k").status_code == 400
        assert post("tiny-scenes", "wrong").status_code == 401
        assert post("tiny-scenes", "k").status_code == 200


def test_who_want_the_same_model_at_once_load_it_once(narrow: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = slow_loading(monkeypatch, 0.3)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: ask(narrow, FP32), range(4)))
    assert loads == [FP32]
    assert all(answer["timings"]["load_ms"] >= 300 for answer in answers)


def test_a_deadline_a_full_queue_and_a_client_that_leaves_hold_while_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running(memory_budget=ONE_FITS, max_waiting=1) as service:
        loads = slow_loading(service.ready() and monkeypatch, 3.0)
        with meanwhile(service.client.post, "/infer", json={**QUESTION, "model": FP32, "timeout_s": 1.0}) as late:
            wait_for(lambda: service.engine.in_hand == 1)
            full = httpx2.post(f"{service.url}/infer", json={**QUESTION, "model": FP32}, trust_env=False)
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) >= 1
            assert (late.result().status_code, late.result().json()["error"]["type"]) == (504, "deadline_exceeded")
        with open_request(service, {**QUESTION, "model": FP32}):
            wait_for(lambda: service.engine.in_hand == 1)
        wait_for(lambda: service.engine.in_hand == 0, timeout_s=1.5)  # before the model is there
        wait_for(lambda: states(service)[FP32] == "loaded")  # what was begun is not thrown away
        assert loads == [FP32]


def test_what_nobody_wants_any_more_by_its_turn_is_not_loaded(
    narrow: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = slow_loading(monkeypatch)
    begun = slowed_model(narrow, INT8)
    with meanwhile(ask, narrow, INT8, **LONG) as answering:
        assert begun.wait(10)
        late = narrow.client.post("/infer", json={**QUESTION, "model": FP32, "timeout_s": 0.1})
        assert late.status_code == 504
        assert not answering.done()
    assert ask(narrow, INT8)
    assert FP32 not in loads


def test_a_model_that_does_not_load_is_one_error_and_the_service_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = install(tmp_path, "mine")
    graph = next((folder / "onnx").glob("decoder*.onnx"))
    whole = graph.read_bytes()
    with running(data_dir=tmp_path, models=("tiny-scenes@fp32", "mine"), memory_budget=ONE_FITS) as service:
        service.ready()
        graph.write_bytes(whole[:-1] + b"?")
        for path, body in (("/infer", {**QUESTION, "model": "mine"}), ("/models/mine/load", {})):
            failed = service.client.post(path, json=body)
            assert (failed.status_code, failed.json()["error"]["type"]) == (503, "bundle_error")
            assert graph.name in failed.json()["error"]["message"]
        assert states(service)["local/mine@int8"] == "unloaded"
        assert service.client.get("/ready").status_code == 200
        assert ask(service, FP32)["target"] == FP32
        graph.write_bytes(whole)
        assert ask(service, "mine")["target"] == "local/mine@int8"
    assert sum("mine@int8 was not loaded" in line for line in caplog.messages) == 2


def test_a_model_that_cannot_fit_is_refused_with_the_sum() -> None:
    with running(models=("tiny-scenes@fp32",), memory_budget=ONE_FITS // 2) as service:
        wait_for(lambda: "too large" in (service.services.not_ready() or ""))
        answer = service.client.get("/ready")
    assert answer.status_code == 503
    assert "GB weights + " in answer.json()["reason"]


@pytest.mark.parametrize("parallel", [False, True])
def test_two_that_do_not_fit_together_are_compared_one_after_the_other(
    narrow: RunningService, red_circle_url: str, parallel: bool
) -> None:
    body = {"prompt": "What color is the circle?", "images": [red_circle_url], "parallel": parallel}
    results = narrow.client.post("/compare", json=body).json()["results"]
    assert [(result["ok"], result["text"]) for result in results] == [(True, "red")] * 2
    assert sorted(states(narrow).values()) == ["loaded", "unloaded"]


def test_every_graph_has_run_in_every_batch_before_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[tuple[str, int]] = set()

    def watched(name: str, length: Callable[..., int]) -> None:
        real = getattr(OnnxModel, name)

        def run(self: OnnxModel, *arguments: Any) -> Floats:
            ran.add((name, length(*arguments)))
            return real(self, *arguments)

        monkeypatch.setattr(OnnxModel, name, run)

    watched("encode_tiles", len)
    watched("decode", lambda embeds, cache: min(2, embeds.shape[1]))
    watched("decode_together", lambda ids, caches: len(ids))
    monkeypatch.setattr("models.loaded_model.check_replay", lambda *_: None)  # it runs graphs too, at the first load
    with running(models=("tiny-scenes",), max_running=3) as service:
        service.ready()
        assert ran >= {("encode_tiles", 1), ("decode", 2), *(("decode_together", rows) for rows in (1, 2, 3))}


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_the_process_gives_the_memory_of_an_unloaded_model_back(tmp_path: Path) -> None:
    with process("tiny-scenes@fp32", data_dir=tmp_path) as client:
        server = server_of(client)
        for _ in range(2):
            loaded = server.memory_info().rss
            assert client.post("/models/tiny-scenes/unload").json()["state"] == "unloaded"
            assert server.memory_info().rss <= loaded - Bundle.read(BUNDLES["tiny-scenes@fp32"]).model_bytes
            assert client.post("/infer", json=QUESTION).status_code == 200
